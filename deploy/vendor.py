"""`python -m deploy.vendor [PACKAGE@VERSION ...]`: the libraries of the server's own page, from npm, as published.

Without arguments the versions that `vendor.json` names are fetched anew; a version that is given replaces its own. The
files, their licences and `vendor.json` (for the image's list of licences) lie in the page's folder `vendor`.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "server/api/playground/vendor"
# What of each package is served; its LICENSE comes along.
FILES = {
    "uplot": ("dist/uPlot.iife.min.js", "dist/uPlot.min.css"),
    "marked": ("lib/marked.umd.js",),
    "dompurify": ("dist/purify.min.js",),
}


def fetch(package: str, version: str) -> dict[str, object]:
    """Put the files of one package into the folder; its entry of `vendor.json`. CalledProcessError without npm."""
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        name = subprocess.run(command, cwd=temporary, check=True, capture_output=True, text=True).stdout.strip()
        with tarfile.open(fileobj=io.BytesIO(Path(temporary, name).read_bytes())) as archive:

            def read(path: str) -> bytes:
                member = archive.extractfile(f"package/{path}")
                assert member is not None, f"{package} has no {path}"
                return member.read()

            facts = json.loads(read("package.json"))
            for path in FILES[package]:
                (FOLDER / Path(path).name).write_bytes(read(path))
            (FOLDER / f"LICENSE.{package}.txt").write_bytes(read("LICENSE"))
    files = [Path(path).name for path in FILES[package]]
    return {"version": facts["version"], "licence": facts["license"], "files": files}


def main(wanted: list[str]) -> int:
    file = FOLDER / "vendor.json"
    versions = (
        {name: entry["version"] for name, entry in json.loads(file.read_text()).items()} if file.is_file() else {}
    )
    versions |= dict(name.rsplit("@", 1) for name in wanted)
    file.write_text(json.dumps({name: fetch(name, versions[name]) for name in FILES}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
