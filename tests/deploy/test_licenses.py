"""What the images list: the licence of everything inside."""

import re
from importlib.metadata import requires

from packaging.requirements import Requirement

from deploy.licenses import of_debian, of_python


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
