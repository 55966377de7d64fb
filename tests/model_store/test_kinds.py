"""Quality by kind of text and by width: what `evaluate` measures is what the server weighs points by."""

import json

import pytest

from model_store.pair import PairError, open_pair
from server.cli import main
from server.cost.frontier import Point
from server.sizing.points import points_of
from server.sizing.quality import quality_table
from tests.api.tiny import ROOT, make_pair


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(teacher, student, evaluate) of a pair measured on prose and on code, at two widths."""
    folder = tmp_path_factory.mktemp("kinds")
    teacher, student = make_pair(folder)
    (folder / "prose.txt").write_text((ROOT / "LICENSE").read_text())
    (folder / "code.txt").write_text((ROOT / "server" / "core" / "load.py").read_text())
    evaluate = ["evaluate", "--teacher", str(teacher), "--student", str(student), "--dtype", "float32"]
    evaluate += ["--windows", "2", "--window-tokens", "64", "--store", str(folder / "store")]
    kinds = ["--kind", f"prose={folder / 'prose.txt'}", f"code={folder / 'code.txt'}", "--precisions", "q8", "q4"]
    assert main([*evaluate, *kinds]) == 0
    return teacher, student, evaluate


def test_every_kind_has_figures_of_its_own_for_depth_and_width(measured):
    teacher, student, _ = measured
    pair = open_pair(teacher, student)
    assert set(pair.kinds) == {"prose", "code"} and all("kl" not in row for row in pair.quality.values())
    for kind in pair.kinds.values():
        assert set(kind["sizes"]) == {"4", "5", "6"} and kind["sizes"]["6"]["kl"] == pytest.approx(0, abs=1e-5)
        assert 0 < kind["widths"]["8"]["kl"] < kind["widths"]["4"]["kl"]
        assert set(kind["points"]) == {f"{size}L-q{width}" for size in (4, 5, 6) for width in (8, 4)}
    assert pair.kinds["prose"]["sizes"]["4"]["kl"] != pair.kinds["code"]["sizes"]["4"]["kl"]
    assert "prose.txt" in json.loads((student / "quality.json").read_text())["kinds"]["prose"]["text"]


def test_what_was_measured_is_what_points_are_weighed_by(measured):
    teacher, student, _ = measured
    pair = open_pair(teacher, student)
    table = quality_table(pair.quality, pair.kinds, pair.elasticity.sizes, (4, 6, 8, 16))
    own = pair.kinds["code"]
    assert table.kl(Point(4, 8), "code") == own["points"]["4L-q8"]["kl"]
    assert table.kl(Point(6, 4)) == max(kind["widths"]["4"]["kl"] for kind in pair.kinds.values())
    assert table.kl(Point(4, 6), "code") > own["sizes"]["4"]["kl"]  # a width that was not measured: by the usual law
    known = {Point(p.size, p.width): p.is_measured for p in points_of(table, {}, (4, 5, 6), (4, 6, 8, 16))}
    assert known[Point(4, 8)] and known[Point(5, 16)] and not known[Point(4, 6)]


def test_another_kind_is_added_and_names_must_be_sound(measured, capsys):
    teacher, student, evaluate = measured
    other = student.parent / "more.txt"
    other.write_text((ROOT / "CHANGELOG.md").read_text())
    assert main([*evaluate, "--kind", f"notes={other}", "--text", str(other)]) == 0
    assert set(open_pair(teacher, student).kinds) == {"prose", "code", "notes"}
    assert "notes: KL" in capsys.readouterr().out
    for wrong in (["--kind", str(other)], ["--kind", f"worst={other}"], ["--precisions", "q3"]):
        assert main([*evaluate, *wrong]) == 2
        assert f"{wrong[0]}: " in capsys.readouterr().err
    assert main([*evaluate, "--text", str(other), "--precisions", "q8"]) == 2
    assert main([*evaluate, "--kind", f"a={other}", f"a={other}"]) == 2


@pytest.mark.parametrize(
    "kinds", ["[]", '{"code": 1}', '{"code": {"sizes": {"a": {}}}}', '{"a": {"widths": {"8": {}}}}']
)
def test_a_file_that_holds_something_else_is_refused_by_name(tmp_path, kinds):
    teacher, student = make_pair(tmp_path)
    (student / "quality.json").write_text(f'{{"kinds": {kinds}}}')
    with pytest.raises(PairError, match=r"quality\.json: kinds"):
        open_pair(teacher, student)
