"""`boomerang evaluate` with patch orders that are not the pair's own: searched, compared, adopted."""

import json
import shutil

import pytest
import torch

from model_store.assembly import Elasticity
from model_store.distill.from_pair import load_elastic
from model_store.distill.order import kl_of_paths
from model_store.pair import open_pair
from server.cli import main
from tests.api.tiny import ROOT, make_pair, make_tokenizer

WINDOWS = ["--windows", "1", "--window-tokens", "64", "--dtype", "float32"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("orders"))[0]


@pytest.fixture
def student(teacher, tmp_path):
    return shutil.copytree(teacher.parent / "student", tmp_path / "student")


@pytest.fixture
def texts(tmp_path):
    """A held-out text and one for calibration."""
    files = tmp_path / "held_out.txt", tmp_path / "calibration.txt"
    for file, source in zip(files, ("LICENSE", "docs/architecture.md"), strict=True):
        file.write_text((ROOT / source).read_text())
    return [str(file) for file in files]


def quality(student):
    return json.loads((student / "quality.json").read_text())


def best_first(teacher, student, calibration, tmp_path):
    """Thresholds of the better of the two patch orders and of the other: by trying both blocks, on the same text."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with open(calibration) as file:
        ids = torch.tensor(tokenizer.encode(file.read()).ids[: 8 * 64]).view(8, 64)
    kl = kl_of_paths(load_elastic(open_pair(teacher, student), torch.float32), [ids])
    first = min((0, 1), key=lambda block: kl([block == 0, block == 1, True, True]))
    return [
        list(Elasticity.from_order(6, [0, 2, 4, 5], order).thresholds)
        for order in ([first, 1 - first], [1 - first, first])
    ]


def test_a_searched_order_is_compared(teacher, student, texts, tmp_path):
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), *WINDOWS, "--text", texts[0]]
    assert main([*arguments, "--compare-orders", "--calibration", texts[1]]) == 0
    stored = quality(student)
    assert stored["orders"].keys() == {"last_to_first", "first_to_last", "klpatch"}
    expected, _ = best_first(teacher, student, texts[1], tmp_path)
    same = (
        "last_to_first" if expected == list(Elasticity.last_to_first(6, [0, 2, 4, 5]).thresholds) else "first_to_last"
    )
    assert stored["orders"]["klpatch"]["5"]["kl"] == stored["orders"][same]["5"]["kl"]
    assert stored["measured"]["text_overlap"]["against"] == ["calibration.txt"]
    assert not (student / "pair.json").exists()


def test_a_searched_order_is_adopted(teacher, student, texts, tmp_path):
    best, other = best_first(teacher, student, texts[1], tmp_path)
    (student / "quality.json").write_text(json.dumps({"sizes": {"5": {"kl": 9.0, "repetition": 0.5}}}))
    (student / "pair.json").write_text(json.dumps({"name": "mine", "thresholds": other}))
    (tmp_path / "chat.txt").write_text("Hello?\n")
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), *WINDOWS, "--text", texts[0]]
    arguments += ["--chat", str(tmp_path / "chat.txt"), "--max-new-tokens", "4", "--patch-order", "klpatch"]
    arguments += ["--calibration", texts[1]]
    assert main(arguments) == 0  # measured, and kept apart
    assert open_pair(teacher, student).elasticity.thresholds == tuple(other)
    measured = quality(student)
    assert (
        measured["sizes"] == {"5": {"kl": 9.0, "repetition": 0.5}}
        and "answer_tokens" in measured["orders"]["klpatch"]["5"]
    )
    assert main([*arguments, "--adopt-order"]) == 0
    pair = open_pair(teacher, student)
    assert pair.elasticity.thresholds == tuple(best) and pair.name == "mine"
    assert pair.quality[5]["kl"] == measured["orders"]["klpatch"]["5"]["kl"] != 9.0
    assert json.loads((student / "pair.json").read_text())["patch_order"] == "klpatch"


def test_an_order_is_searched_on_several_files_and_in_some_places(teacher, student, texts, tmp_path, capsys):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "response": "A number. " * 20}) + "\n" for i in "123")
    )
    _, other = best_first(teacher, student, texts[1], tmp_path)
    (student / "pair.json").write_text(json.dumps({"name": "mine", "thresholds": other}))
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), *WINDOWS, "--text", texts[0]]
    arguments += ["--patch-order", "klpatch", "--calibration", texts[1], str(chat), "--search", "down"]
    arguments += ["--calibration-windows", "2", "--adopt-order"]
    assert main([*arguments, "--search-places", "1"]) == 0
    (searched,) = (line for line in capsys.readouterr().err.splitlines() if " blocks: station " in line)
    assert quality(student)["measured"]["text_overlap"]["against"] == ["calibration.txt", "chat.jsonl"]
    thresholds = open_pair(teacher, student).elasticity.thresholds
    assert sorted(thresholds[:2]) == [5, 6]
    assert main(arguments) == 0  # every place: with two blocks the first decides
    assert open_pair(teacher, student).elasticity.thresholds == thresholds
    assert searched in capsys.readouterr().err
    assert main([*arguments, "--search", "up"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "down"], "--search, --search-places: no order is searched without --calibration"),
        (["--search-places", "2"], "--search, --search-places: no order is searched without --calibration"),
        (
            ["--patch-order", "klpatch", "--calibration", "TEXT", "--search-places", "0"],
            "--search-places: input should be",
        ),
        (["--patch-order", "klpatch"], "--patch-order klpatch: name the text"),
        (["--calibration", "TEXT"], "--calibration: no order is searched"),
        (["--adopt-order"], "--adopt-order: name the order"),
        (["--adopt-order", "--patch-order", "last_to_first", "--no-store"], "--adopt-order: name the order"),
        (["--compare-orders", "--calibration", "TEXT"], "--text: "),  # searched on the held-out text itself
        (["--windows", "0"], "--windows: input should be greater than or equal to 1"),
        (["--calibration", "TEXT", "--compare-orders", "--calibration-windows", "0"], "--calibration-windows: input"),
        (["--window-tokens", "1"], "--window-tokens: input should be greater than or equal to 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, teacher, student, texts, capsys):
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), *WINDOWS, "--text", texts[0]]
    assert main([*arguments, *(texts[0] if option == "TEXT" else option for option in options)]) in (1, 2)
    assert message in capsys.readouterr().err
