"""Models of the Hugging Face hub as users name them: owner/name, owner/name@revision, owner/name:Q4_K_M.

Downloads, resumption and the cache are huggingface_hub's.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.files import read_json
from model_store.published import by_student
from model_store.spec import SpecError, resolved_config
from model_store.store import StoreError, incoming_dir, install, is_disk_full, require_space

logger = logging.getLogger(__name__)

# Top-level files only: repositories also carry ONNX exports, the authors' original format and training logs.
_FILES = re.compile(
    r"[^/]+\.(json|safetensors|jinja)|tokenizer\.model|merges\.txt|LICENSE[^/]*|README\.md"
    r"|additional_chat_templates/[^/]+\.jinja"
)
_IGNORED = re.compile(r"consolidated.*")
_ANSWER_SECONDS = 5.0
_CONFIG = "config.json"
_GGUF = re.compile(r"(?P<stem>.*?)(-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE)
# A quantisation at the end of a file's name: Q4_K_M, IQ3_XXS, BF16, UD-Q4_K_XL.
_LABEL = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|T?Q\d_\d|MXFP4\w*|BF16|F16|F32|FP16|FP32))$", re.IGNORECASE)


@dataclass(frozen=True)
class HubName:
    """What a user writes: a repository, and optionally a revision and a quantisation."""

    repository: str
    revision: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None for what cannot be the name of a model on the hub."""
        match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?(?::([\w.-]+))?", text)
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repository + revision + (f":{self.label}" if self.label else "")

    @property
    def stored(self) -> str:
        """As one folder's name."""
        return re.sub(r"[/@:]", "--", str(self))


def label_of(file: str) -> str:
    """The quantisation that a GGUF file's name ends with, in capitals; the whole name where none is recognised."""
    match = _GGUF.fullmatch(file)
    stem = match["stem"] if match else file
    label = _LABEL.search(stem)
    return label[1].upper() if label else stem.rsplit("/", 1)[-1]


def offers(files: Iterable[str]) -> dict[str, list[str]]:
    """GGUF models among a repository's files by label, each with its parts in order."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not file.rsplit("/", 1)[-1].lower().startswith(("mmproj", "imatrix")):
            found.setdefault(label_of(file), []).append(file)
    return found


def choose(name: HubName, files: Iterable[str]) -> list[str]:
    """The parts of the GGUF model that is meant. StoreError lists what there is, if it is not one."""
    found = offers(files)
    listed = ", ".join(f"{name.repository}:{label}" for label in found)
    if not found:
        raise StoreError(f"{name.repository} has no GGUF files, so {name} names nothing")
    if name.label is None:
        if len(found) > 1:
            raise StoreError(f"{name.repository} offers several models; name one: {listed}")
        return next(iter(found.values()))
    wanted = name.label.upper().removesuffix(".GGUF")
    for fits in (
        lambda label, parts: label.upper() == wanted,
        lambda label, parts: any(wanted == part.rsplit("/", 1)[-1].upper().removesuffix(".GGUF") for part in parts),
        lambda label, parts: label.upper().removeprefix("UD-").startswith(wanted),
    ):
        matching = [label for label, parts in found.items() if fits(label, parts)]
        if len(matching) == 1:
            return found[matching[0]]
        if matching:
            some = ", ".join(f"{name.repository}:{label}" for label in matching)
            raise StoreError(f"{name} names several models; name one: {some}")
    raise StoreError(f"{name.repository} has no {name.label}; it offers {listed}")


def fetch(name: HubName, store: Path | str | None, force: bool) -> Path:
    """The model's folder: downloaded into the store, or where the hub does not answer from its own cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    try:
        # One short question first, so that a machine without the hub learns it in seconds instead of many retries.
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=_ANSWER_SECONDS, files_metadata=True)
    except GatedRepoError as error:
        raise _gated(name) from error
    except RevisionNotFoundError as error:
        raise StoreError(f"{name.repository} has no revision {name.revision!r}") from error
    except HfHubHTTPError as error:
        if error.response is None or getattr(error.response, "status_code", 0) < 500:
            raise StoreError(f"the hub does not give {name}: {str(error).splitlines()[0]}") from error
        return _cached(name, store, force, error)
    except Exception as error:  # whatever the HTTP library calls a host that is not there
        return _cached(name, store, force, error)
    sha = info.sha or name.revision or "main"
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if name.label is None and any(file.endswith(".safetensors") and "/" not in file for file in files):
        return _checkpoint(name, sha, files, store, force)
    if name.label is None and not offers(files):
        raise StoreError(f"{name} has no safetensors and no GGUF files; other formats can run code when read")
    parts = choose(name, files)
    return _gguf(name, sha, parts, sum(files[part] for part in parts), store, force)


def _gated(name: HubName) -> StoreError:
    return StoreError(f"{name.repository} is gated: accept its licence on the hub and set HF_TOKEN")


def _checkpoint(name: HubName, sha: str, files: dict[str, int], store: Path | str | None, force: bool) -> Path:
    wanted = [file for file in files if _FILES.fullmatch(file) and not _IGNORED.fullmatch(file)]

    def fill(folder: Path) -> dict[str, Any]:
        if _CONFIG in wanted:  # before gigabytes of what cannot be served
            _download(name, sha, folder, [_CONFIG])
            try:
                resolved_config(read_json(folder / _CONFIG))
            except SpecError as error:
                raise StoreError(f"{name}: {error}") from error
        _require_space(name, folder, sum(files[file] for file in wanted))
        _download(name, sha, folder, wanted)
        _add_student_config(name.repository, folder)
        return {"source": name.repository, "revision": sha}

    return install(name.stored, fill, store, replace=force, keep_partial=True)


def _add_student_config(repository: str, folder: Path) -> None:
    """Students distilled by others do not say which layers they kept; for those known by name we do."""
    pair = by_student(repository)
    if pair and pair.kept and not (folder / "student_config.json").exists():
        (folder / "student_config.json").write_text(json.dumps({"copied_teacher_layers": list(pair.kept)}))


def _gguf(name: HubName, sha: str, parts: list[str], size: int, store: Path | str | None, force: bool) -> Path:
    from model_store.gguf_import import import_gguf

    downloads = incoming_dir(store) / f"{name.stored}.gguf"

    def fill(folder: Path) -> dict[str, Any]:
        downloads.mkdir(exist_ok=True)
        _require_space(name, downloads, 2 * size)  # the file, and a checkpoint that is at least as large
        _download(name, sha, downloads, parts)
        import_gguf(downloads / parts[0], folder)
        shutil.rmtree(downloads, ignore_errors=True)
        return {"source": f"{name.repository}, {parts[0]}", "revision": sha}

    return install(name.stored, fill, store, replace=force)


def _require_space(name: HubName, folder: Path, size: int) -> None:
    """StoreError if `size` bytes do not fit beside what an earlier try left in `folder`."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    require_space(folder, size - there, str(name))


def _download(name: HubName, sha: str, folder: Path, files: list[str]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        snapshot_download(name.repository, revision=sha, local_dir=folder, allow_patterns=files)
    except GatedRepoError as error:
        raise _gated(name) from error
    except Exception as error:
        if "gated repo" in str(error).lower():  # it may come wrapped
            raise _gated(name) from error
        if is_disk_full(error):
            raise
        raise StoreError(f"the download of {name} broke off ({error}): pull again to resume it") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes for resumption


def _cached(name: HubName, store: Path | str | None, force: bool, reason: Exception) -> Path:
    """What the hub's own cache (HF_HOME) holds of the model; StoreError if that is nothing whole."""
    from huggingface_hub import snapshot_download

    said = f"the hub does not answer ({type(reason).__name__})"
    try:
        snapshot = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    except Exception as error:
        raise StoreError(f"{said} and its cache has no {name}") from error
    files = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    if name.label is None and _is_whole(snapshot):
        logger.warning("%s: taking %s from its cache", said, name)
        return snapshot
    if not offers(files):
        raise StoreError(f"{said} and its cache has only a part of {name} ({snapshot})")
    logger.warning("%s: taking %s from its cache", said, name)
    from model_store.sources import import_gguf_file

    return import_gguf_file(snapshot / choose(name, files)[0], store)


def _is_whole(snapshot: Path) -> bool:
    """Whether a cached snapshot has config and all weights: the cache may hold any part of a repository."""
    from model_store.weights import WeightError, weight_files

    if not (snapshot / _CONFIG).is_file():
        return False
    try:
        return bool(weight_files(snapshot))
    except WeightError:
        return False
