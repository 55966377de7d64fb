"""Clients in JavaScript: npm brings their packages, node runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def why_not() -> str:
    """Why none of them can run here; empty if they can."""
    missing = [tool for tool in ("npm", "node") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (https://nodejs.org)" if missing else ""


_REASON = why_not() if os.environ.get("BOOMERANG_TEST_NPM") else "make test-clients: installs npm packages"
needs_npm = pytest.mark.skipif(bool(_REASON), reason=_REASON)


def run(script: str, packages: Sequence[str], url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Install the packages in an empty folder and run the script there; where npm fails, what came of that."""
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "client.mjs").write_text(script)
    install = ["npm", "install", "--loglevel=error", "--no-audit", "--no-fund", *packages]
    for command in (install, ["node", "client.mjs", url]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode:
            break
    return done
