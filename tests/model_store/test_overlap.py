"""Held-out text that was trained on is found: in files of every form, and in the fingerprint that `distill` leaves."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest

from model_store.distill.data import Document
from model_store.evaluate import overlap, store_quality
from model_store.evaluate.overlap import FINGERPRINT_FILE, Fingerprint, OverlapError, check_overlap, fingerprint_of
from model_store.pair import open_pair
from recipes import fingerprint
from server.cli import main
from tests.api.tiny import ROOT, make_pair

SENTENCE = "The quick brown fox jumps over the lazy dog and then it sleeps in the sun until noon."


def words(seed, count):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


ROWS = [
    {"text": f"Before. {SENTENCE} After."},
    {"prompt": "Say it.", "response": SENTENCE},
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": SENTENCE}]},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row)))
def test_every_form_of_training_data_is_read(row, tmp_path):
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "Something else."}) + "\n" + json.dumps(row) + "\n")
    held_out = f"{words(1, 40)} {SENTENCE.upper().replace(' ', '  ')} {words(2, 40)}"
    with pytest.raises(OverlapError, match=r"--text: 6 of 86 .*the quick brown fox"):
        check_overlap("--text", [held_out], [tmp_path], None)
    found = check_overlap("--text", [held_out], [tmp_path / "data.jsonl.gz"], None, allowed=0.1)
    assert found == {"share": pytest.approx(6 / 86), "checked": 86, "against": ["data.jsonl.gz"]}


def test_a_row_without_text_is_an_error_that_names_the_option(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match=r"--training-data: data.jsonl line 1 has none of text"):
        check_overlap("--text", [SENTENCE], [tmp_path / "data.jsonl"], None)


def test_a_short_prompt_is_looked_for_as_a_whole(tmp_path):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "It scatters."}]
    rows = [{"messages": turns}, {"text": "Questions\nHow many minutes are there in a day?\nand: what is tea made of?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompt in ("why is the sky blue", "How many minutes are there in a day?"):
        with pytest.raises(OverlapError, match=f"--chat: 1 of 2 .*{prompt.lower()[:20]}"):
            check_overlap("--chat", ["Who was Marie Curie?", prompt], [data], None)
    found = check_overlap("--chat", ["What is tea made of?", "Why is the sky?"], [data], None)
    assert found == {"share": 0.0, "checked": 2, "against": ["data.jsonl"]}


def test_words_of_every_script_count():
    russian = "тринадцать слов нужны чтобы найти отрывок целиком а здесь их больше чем надо для этого"
    with pytest.raises(OverlapError, match="слов"):
        check_overlap("--text", [russian], [], Fingerprint.of([Document(text=russian)]))


def test_nothing_to_check_against():
    assert check_overlap("--text", [SENTENCE], [], None) is None


def test_a_fingerprint_of_much_text_is_small_and_tells_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "KEPT_HASHES", 500)
    monkeypatch.setattr(overlap, "_BATCH", 3000)
    texts = [words(seed, 1000) for seed in range(10)]
    Fingerprint.of(Document(text=text) for text in texts).save(tmp_path / FINGERPRINT_FILE)
    known = fingerprint_of(tmp_path)
    assert len(known.runs.hashes) == 500 and (tmp_path / FINGERPRINT_FILE).stat().st_size < 6000
    held_out = [texts[3], *(words(seed, 1000) for seed in range(100, 103))]
    found = check_overlap("--text", held_out, [], known, allowed=1.0)
    assert 100 < found["checked"] < 300 and 0.15 < found["share"] < 0.35  # of 4 x 988; one in four is known
    with pytest.raises(OverlapError, match=FINGERPRINT_FILE):
        check_overlap("--text", held_out, [], known)
    assert check_overlap("--text", held_out[1:], [], known)["share"] == 0.0
    (tmp_path / "other.txt").write_text(words(200, 50))  # searched for everything, it must not thin out the sample
    assert check_overlap("--text", held_out, [tmp_path / "other.txt"], known, allowed=1.0)["share"] == found["share"]

    whole = Fingerprint.of(Document(text=text) for text in texts)
    parts = Fingerprint.of(Document(text=text) for text in texts[:3])
    parts.merge(Fingerprint.of(Document(text=text) for text in texts[3:]))
    assert np.array_equal(whole.runs.hashes, parts.runs.hashes) and whole.runs.bound == parts.runs.bound


def test_a_damaged_fingerprint_is_an_error(tmp_path):
    (tmp_path / FINGERPRINT_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{FINGERPRINT_FILE} is not a fingerprint"):
        fingerprint_of(tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("overlap"))[0]


@pytest.fixture
def student(teacher, tmp_path):
    shutil.copytree(teacher.parent / "student", tmp_path / "student")
    return tmp_path / "student"


def test_evaluate_refuses_what_distill_was_given(teacher, tmp_path, capsys):
    text, other = ROOT / "docs" / "architecture.md", ROOT / "docs" / "reliability.md"
    small = ["--tokens", "512", "--row-tokens", "64", "--batch-rows", "4", "--calibration-rows", "2", "--device", "cpu"]
    small += ["--teacher", str(teacher), "--order", "last", "--no-warm-start"]
    assert main(["distill", *small, "--data", str(text), "--out", str(tmp_path / "a")]) == 0
    start = ["--start-from", str(tmp_path / "a" / "checkpoints" / "checkpoint-2"), str(teacher.parent / "student")]
    assert (
        main(["distill", *small, "--data", str(other), "--out", str(tmp_path / "b"), *start, "--keep", "0,2,4,5"]) == 0
    )
    evaluate = ["evaluate", "--teacher", str(teacher), "--windows", "1", "--window-tokens", "64", "--sizes", "6"]
    for name, known in (("a", [text]), ("b", [text, other])):
        for held_out in known:
            assert main([*evaluate, "--student", str(tmp_path / name), "--text", str(held_out), "--no-store"]) == 1
            assert "--text: " in capsys.readouterr().err
    assert main([*evaluate, "--student", str(tmp_path / "b"), "--text", str(ROOT / "LICENSE")]) == 0
    assert "started from student" in capsys.readouterr().err  # of which no text is known
    measured = json.loads((tmp_path / "b" / "quality.json").read_text())["measured"]
    assert measured["text_overlap"]["share"] == 0.0 and measured["text_overlap"]["against"] == [FINGERPRINT_FILE]


def test_what_is_known_of_overlap_is_that_of_the_text_measured(teacher, student, tmp_path):
    def measured(kind, overlap=None):
        pair = open_pair(teacher, student)
        store_quality(pair, {}, {kind: "some file"} | ({f"{kind}_overlap": overlap} if overlap else {}))
        return json.loads((student / "quality.json").read_text())["measured"]

    (student / "quality.json").write_text(json.dumps({"measured": {"overlap_13gram": 0.1}}))
    one = {"share": 0.0, "checked": 9, "against": ["a.txt"]}
    assert measured("dtype") == {"overlap_13gram": 0.1, "dtype": "some file"}
    assert measured("text", one).keys() == {"dtype", "text", "text_overlap"}
    assert measured("chat", one).keys() == {"dtype", "text", "text_overlap", "chat", "chat_overlap"}
    assert measured("text").keys() == {"dtype", "text", "chat", "chat_overlap"}


def test_the_default_pair_brings_a_fingerprint_of_what_it_was_trained_on(tmp_path):
    known = fingerprint_of(ROOT / "model_store" / "default_pair")
    assert known is not None and known.unknown == ("the student of part 7",)
    assert len(known.runs.hashes) == overlap.KEPT_HASHES and len(known.short.hashes) > 10_000
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in (SENTENCE, words(3, 50))))
    fingerprint.main([str(data), "--unknown", "a", "b", "--out", str(tmp_path)])
    found = fingerprint_of(tmp_path)
    assert found.unknown == ("a", "b")
    with pytest.raises(OverlapError, match="6 of 6"):
        check_overlap("--text", [SENTENCE], [], found)
