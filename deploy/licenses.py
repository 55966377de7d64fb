"""`python -m deploy.licenses FOLDER`: the licence of everything in an image, as a list that names the texts' places.

Python's packages keep theirs in their .dist-info folders, Debian's in /usr/share/doc. One that brings no text gets the
standard one if this folder has it; the command fails if none does.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import shutil
import sys
from pathlib import Path

_TEXT = re.compile(r"(licen[cs]e|copying|notice|copyright)(?!.*\.pyc?$)", re.IGNORECASE)
_APACHE = re.compile(r"Apache", re.IGNORECASE)
_PAGE = Path(__file__).parents[1] / "server/api/playground/vendor"
_DPKG, _DOC = Path("/var/lib/dpkg/status"), Path("/usr/share/doc")


def of_python(standard: Path) -> list[tuple[str, str, str]]:
    """(package and version, licence, place of its text) of all that is installed; an empty place where there is none.

    `standard` is the text of the Apache licence, for packages that are under it and bring none.
    """
    rows = []
    for package in sorted(metadata.distributions(), key=lambda package: package.name.lower()):
        facts = package.metadata.json
        classifiers = [line for line in facts.get("classifier", ()) if line.startswith("License")]
        named = str(facts.get("license_expression") or facts.get("license") or "")
        licence = named if 0 < len(named) <= 100 else "; ".join(line.rpartition(" :: ")[2] for line in classifiers)
        texts = [file for file in package.files or () if _TEXT.match(file.name)]
        if texts:
            place = str(package.locate_file(texts[0]))
        else:
            place = str(standard) if _APACHE.search(licence) else ""
        rows.append((f"{package.name} {package.version}", licence or "see text", place))
    return rows


def of_debian(status: Path = _DPKG, doc: Path = _DOC) -> list[tuple[str, str, str]]:
    """The same of Debian's packages; none elsewhere."""
    rows = []
    for entry in status.read_text().split("\n\n") if status.is_file() else ():
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", entry, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            place = doc / fields["Package"] / "copyright"
            rows.append((f"{fields['Package']} {fields['Version']}", "see text", str(place) if place.is_file() else ""))
    return rows


def of_page(folder: Path = _PAGE) -> list[tuple[str, str, str]]:
    """The same of the libraries that come with the server's own page; none in an image without a server."""
    file = folder / "vendor.json"
    entries = json.loads(file.read_text()) if file.is_file() else {}
    return [
        (f"{name} {entry['version']}", entry["licence"], str(folder / f"LICENSE.{name}.txt"))
        for name, entry in entries.items()
    ]


def main(folder: str) -> int:
    """0, or 1 if the text of a licence is missing."""
    target = Path(folder)
    rows = of_python(target / "LICENSE") + of_page() + of_debian()
    interpreter = Path(sys.base_prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "LICENSE.txt")
    if interpreter.is_file():  # one that is not Debian's
        rows.append((f"Python {sys.version.split()[0]}", "PSF-2.0", str(shutil.copy(interpreter, target / "PYTHON"))))
    (target / "PACKAGES").write_text("".join("\t".join(row) + "\n" for row in rows))
    missing = [name for name, _, place in rows if not place]
    if missing:
        print(f"no text of the licence of {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
