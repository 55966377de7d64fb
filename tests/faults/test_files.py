"""Damaged, tampered and dangerous model files; a disk that is full."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.store import install
from server.cli import main
from tests import tiny_pairs
from tests.api.tiny import QUICK, ROOT, RunningServer, make_tokenizer, noted
from tests.faults.ledger import Ledger
from tests.model_store.gguf_files import TOKENS, write_gguf
from tests.tiny_pairs import make_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(pair, tmp_path):
    """Teacher and student folders that a test may damage."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in pair)


def refuses_to_start(pair, *flags: str, env: dict[str, str] | None = None) -> str:
    """The log of a server that exits with 1, having never been ready."""
    server = RunningServer(pair, *QUICK, *flags, env=env)
    try:
        assert server.process.wait(90) == 1, "".join(server.log)
    finally:
        server.process.kill()
    server.reader.join(5)
    return "".join(server.log)


def record(fault: str, after: str) -> None:
    Ledger().record(fault, after)


@pytest.mark.parametrize("share", [0.6, 0.001])
def test_truncated_weights_are_refused_by_name(copied, share):
    file = copied[0] / WEIGHTS
    os.truncate(file, int(file.stat().st_size * share))
    log = refuses_to_start(copied)
    assert str(file) in log and "not a readable safetensors file" in log and "Traceback" not in log
    record("truncated weights", "refuses to start, names the file")


def test_weights_that_are_not_numbers_are_refused_at_start(copied):
    tensors = load_file(copied[0] / WEIGHTS)
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, copied[0] / WEIGHTS, {"format": "pt"})
    log = refuses_to_start(noted(*copied))
    assert "no finite number" in log
    record("a NaN in the weights of a user's own folder", "refuses to start")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_tampered_file_of_the_store_is_caught_by_its_digest(pair, tmp_path, name):
    def fill(folder):
        shutil.copytree(pair[0], folder, dirs_exist_ok=True)
        return {"source": "a test"}

    teacher = install("tiny", fill, tmp_path)
    file = teacher / name
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as somebody would who does not want to be noticed
    log = refuses_to_start((teacher, pair[1]))
    assert f"{file} does not match its recorded digest" in log and "pull the model again" in log
    record(f"one bit of {name} in the store flipped, its time set back", "refuses to start, names the file")


def test_pickles_are_never_opened(copied, tmp_path):
    mark = tmp_path / "executed"
    (copied[0] / WEIGHTS).unlink()

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    (copied[0] / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    log = refuses_to_start(copied)
    assert "never read" in log and not mark.exists()
    record("a checkpoint that is a pickle", "refuses to start, the pickle is not opened")


def test_code_that_comes_with_a_model_is_not_run(copied, tmp_path):
    mark = tmp_path / "executed"
    (copied[0] / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((copied[0] / name).read_text())
        auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (copied[0] / name).write_text(json.dumps(config | {"auto_map": auto}))
    with RunningServer(copied, *QUICK) as server:
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert not mark.exists()


def full_disk(limit: int):
    """For `preexec_fn`: no file of the process may grow beyond `limit` bytes, as if the disk were full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def pull(source, store, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "server", "pull", str(source), "--store", str(store)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_a_full_disk_while_importing_leaves_no_half_model(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_pairs, "VOCAB", len(TOKENS))
    source, store = tmp_path / "model.gguf", tmp_path / "store"
    write_gguf(make_model("llama", 3, seed=1, tied=True), source)
    failed = pull(source, store, preexec_fn=full_disk(100_000))
    assert failed.returncode == 1 and failed.stderr.strip(), failed.stderr
    assert "Traceback" not in failed.stderr, failed.stderr
    assert "could not be written" in failed.stderr and "network" not in failed.stderr
    assert not list((store / "models").glob("*")) if (store / "models").exists() else True
    assert main(["pull", str(source), "--store", str(store)]) == 0
    assert [folder.name for folder in (store / "models").iterdir()]
    record("full disk during an import", "exit 1 with the reason; the store is as before; the next try succeeds")


def test_a_full_disk_does_not_keep_the_server_from_serving(pair, tmp_path):
    flags = ("--store", str(tmp_path / "store"), "--size-policy", "auto")
    with RunningServer(pair, *flags, *QUICK, preexec_fn=full_disk(16)) as server:
        ledger = Ledger()
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        ledger.answered += 1
        ledger.record("full disk while serving (calibration cannot be kept)", "healthy")


def test_a_tokenizer_alone_is_no_model(tmp_path, pair):
    make_tokenizer(tmp_path / "empty")
    assert "config.json" in refuses_to_start((tmp_path / "empty", pair[1]))
