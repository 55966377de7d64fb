"""What `export --gguf` writes of a tokenizer: templates from wherever they are, ends, what goes before a text."""

import json

import gguf
import pytest
from tokenizers import Tokenizer, models

from model_store.export import ExportError
from model_store.export_gguf import verify_gguf, write_gguf
from tests.model_store.test_tokenizer_files import CLASS, NAMED, SIZE, bos_first, jinja, write
from tests.tiny_pairs import make_model

FAMILY = "qwen3"


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))


def export(tmp_path, monkeypatch, rows=SIZE + 4, templates=None, **changes):
    """Metadata of the file that is written of a tiny model with the tokenizer."""
    monkeypatch.setattr("tests.tiny_pairs.VOCAB", rows)
    folder = tmp_path / "model"
    make_model(FAMILY, 1, seed=0).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    write(folder, **changes)
    if "config__json" not in changes:
        (folder / "config.json").write_text(json.dumps(config))
    jinja(folder, **(templates or {}))
    write_gguf(folder, tmp_path / "out.gguf")
    verify_gguf(folder, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}


TEMPLATES = {
    "a file": ({"chat_template__jinja": "F"}, {"": "F"}),
    "in the config": ({"config": CLASS | {"chat_template": "C"}}, {"": "C"}),
    "named": ({"config": CLASS | {"chat_template": NAMED}}, {"": "D", ".tool_use": "T {{ tools }}"}),
    "a folder": ({"chat_template__jinja": "F", "templates": {"rag": "R"}}, {"": "F", ".rag": "R"}),
    "none": ({}, {}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_from_wherever_they_are(name, tmp_path, monkeypatch):
    changes, expected = TEMPLATES[name]
    fields = export(tmp_path, monkeypatch, **changes)
    start = "tokenizer.chat_template"
    written = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
    written.pop("s", None)  # the list of names
    assert written == expected


@pytest.mark.parametrize("is_first", [True, False])
def test_bos_as_the_tokenizer_does_it(is_first, tmp_path, monkeypatch):
    fields = export(tmp_path, monkeypatch, post_processor=bos_first() if is_first else None)
    assert fields["tokenizer.ggml.add_bos_token"] is is_first and fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.pre"] == "starcoder" and fields["tokenizer.ggml.add_eos_token"] is False


ENDS = {
    "one": (2, [1, 2]),
    "a list": ([1, 3], [1, 3]),
    "none: the tokenizer's": ([], [1]),
    "three": ([1, 2, 5], [1, 2, 5]),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends(name, tmp_path, monkeypatch):
    given, expected = ENDS[name]
    fields = export(tmp_path, monkeypatch, generation_config__json={"eos_token_id": given})
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    assert [fields[key] for key in keys if key in fields] == expected


def test_added_tokens_beyond_the_vocabulary_are_left_out(tmp_path, monkeypatch, caplog):
    fields = export(tmp_path, monkeypatch, rows=SIZE + 1, added=["<|extra|>", "<|two|>"])
    assert len(fields["tokenizer.ggml.tokens"]) == SIZE + 1 and fields["tokenizer.ggml.tokens"][-1] == "<|extra|>"
    assert "1 added tokens beyond the" in caplog.text


def byte_fallback():
    return json.loads(Tokenizer(models.BPE({"a": 0, "▁": 1}, [], byte_fallback=True)).to_str())


REFUSED = {
    "byte fallback": ({"tokenizer__json": byte_fallback()}, "not sentencepiece's with byte fallback"),
    "five ends": (
        {"generation_config__json": {"eos_token_id": [1, 2, 3, 4, 5]}},
        "up to three tokens that end an answer, not 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name, tmp_path, monkeypatch):
    changes, message = REFUSED[name]
    with pytest.raises(ExportError, match=message):
        export(tmp_path, monkeypatch, **changes)
