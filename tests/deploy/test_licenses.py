"""What the images list: the licence of everything inside."""

import json
import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from deploy import vendor
from deploy.licenses import of_debian, of_page, of_python


def test_every_package_that_serving_needs_has_the_text_of_its_licence(tmp_path):
    rows = {
        re.sub(r"[-_.]+", "-", name.split()[0]).lower(): place for name, _, place in of_python(tmp_path / "LICENSE")
    }
    needed, waiting = set(), ["boomerang-serve"]
    while waiting:
        if (name := re.sub(r"[-_.]+", "-", waiting.pop()).lower()) in needed or name not in rows:
            continue
        needed.add(name)
        parsed = map(Requirement, requires(name) or ())
        waiting += [item.name for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]
    assert len(needed) > 30 and not [name for name in needed if not rows[name]]
    assert rows["tokenizers"] == str(tmp_path / "LICENSE")  # it names Apache-2.0 and brings no text


def test_debians_packages(tmp_path):
    status = tmp_path / "status"
    status.write_text(
        "Package: told\nStatus: install ok installed\nVersion: 1\n\n"
        "Package: silent\nStatus: install ok installed\nVersion: 2-1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 3\n"
    )
    (tmp_path / "doc/told").mkdir(parents=True)
    (tmp_path / "doc/told/copyright").write_text("free")
    rows = of_debian(status, tmp_path / "doc")
    assert rows == [("told 1", "see text", str(tmp_path / "doc/told/copyright")), ("silent 2-1", "see text", "")]
    assert of_debian(tmp_path / "none") == []


def test_the_libraries_of_the_page(tmp_path):
    rows = of_page()
    assert [name.split()[0] for name, _, _ in rows] == ["uplot", "marked", "dompurify"] == list(vendor.FILES)
    for name, licence, place in rows:
        text = Path(place).read_text()
        assert {"MIT": "Permission is hereby granted, free of charge"}.get(licence, "Apache License") in text, name
    assert of_page(tmp_path) == []  # the autoscaler's image


def test_the_libraries_are_those_that_the_record_names():
    entries = json.loads((vendor.FOLDER / "vendor.json").read_text())
    kept = {path.name for path in vendor.FOLDER.iterdir()} - {"vendor.json"}
    assert kept == {name for entry in entries.values() for name in entry["files"]} | {
        f"LICENSE.{n}.txt" for n in entries
    }
    for name, entry in entries.items():
        script = next(file for file in entry["files"] if file.endswith(".js"))
        assert entry["version"] in (vendor.FOLDER / script).read_text()[:4000], name
