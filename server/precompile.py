"""Writes the bytecode of everything that a start of the server imports: python -m server.precompile

Installers that leave compiling to the first import (`pip install --no-compile`, most container images) leave it to
every start where nothing may be written then: a read-only image, or PYTHONDONTWRITEBYTECODE. Compiling is most of what
importing torch takes, about two seconds of a start.
"""

from __future__ import annotations

import compileall
import importlib
import sys
from pathlib import Path

# What brings in the libraries that a start needs; tests/test_startup.py notices when one is missing.
MODULES = (
    "server.cli",
    "pydantic_settings",
    "server.process",
    "server.api.generate.serving",
    "server.engine.engine",
    "server.kernels.cpu.executor",
    "server.cost.calibrate",
    "server.sizing.policy",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
)


def main() -> None:
    sys.dont_write_bytecode = False
    here = Path(__file__).parent
    for folder in (here, here.parent / "model_store"):
        compileall.compile_dir(folder, quiet=1)
    for name in MODULES:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
