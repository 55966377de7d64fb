"""Tokenizer folders as they are in the wild: the tokens that transformers makes of them, or a sentence."""

import json
import logging
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model_store.errors import BoomerangError
from model_store.store import StoreError
from model_store.tokenizer_files import read_tokenizer_files
from server.api.generate.tokenizer import ServingTokenizer

TOKENS = ["<s>", "</s>", *bytes_to_unicode().values(), "th", "the", "Ġthe"]
SIZE = len(TOKENS)
TEXTS = [
    "the<|extra|>x",
    "<|extra|> the <|two|>",
    "<s>the</s>",
    "a <|extra|>\n",
    " <|two|><|extra|>",
    "[PAD]the",
    "12 3",
    "",
]
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
EXTRA = {
    "content": "<|extra|>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))


def write(folder, config=CLASS, added=(), post_processor=None, **files):
    """A byte-level tokenizer; `files`: contents by name, with __ for the dot."""
    folder.mkdir(exist_ok=True)
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(TOKENS)}, [("t", "h"), ("th", "e"), ("Ġ", "the")])
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(list(added))
    if post_processor:
        backend.post_processor = post_processor
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def bos_first():
    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])


def flagged(**flags):
    return {str(SIZE): EXTRA | flags}


SAME = {
    "plain": {},
    "no tokenizer_config.json": {"config": None},
    "no class": {"config": {"eos_token": "</s>"}},
    "added_tokens_decoder": {"config": CLASS | {"added_tokens_decoder": {str(SIZE): EXTRA}}},
    "added_tokens_decoder, two": {
        "config": CLASS | {"added_tokens_decoder": {str(SIZE): EXTRA, str(SIZE + 1): EXTRA | {"content": "<|two|>"}}}
    },
    "added_tokens_decoder, not special": {"config": CLASS | {"added_tokens_decoder": flagged(special=False)}},
    "added_tokens_decoder, lstrip": {"config": CLASS | {"added_tokens_decoder": flagged(lstrip=True)}},
    "added_tokens_decoder, rstrip": {"config": CLASS | {"added_tokens_decoder": flagged(rstrip=True)}},
    "added_tokens_decoder, single_word": {"config": CLASS | {"added_tokens_decoder": flagged(single_word=True)}},
    "added_tokens_decoder, normalized": {"config": CLASS | {"added_tokens_decoder": flagged(normalized=True)}},
    "additional_special_tokens": {"config": CLASS | {"additional_special_tokens": ["<|extra|>", "<|two|>"]}},
    "additional_special_tokens, with flags": {
        "config": CLASS | {"additional_special_tokens": [EXTRA | {"__type": "AddedToken"}]}
    },
    "extra_special_tokens": {"config": CLASS | {"extra_special_tokens": ["<|extra|>"]}},
    "extra_special_tokens by name": {"config": CLASS | {"extra_special_tokens": {"image_token": "<|extra|>"}}},
    "a pad token": {"config": CLASS | {"pad_token": "[PAD]"}},
    "a pad token with flags": {"config": CLASS | {"pad_token": EXTRA | {"content": "[PAD]", "__type": "AddedToken"}}},
    "a token of a name that nobody knows": {"config": CLASS | {"image_token": "<|extra|>"}},
    "added_tokens.json": {"added_tokens__json": {"<|extra|>": SIZE}},
    "added_tokens.json, two": {"added_tokens__json": {"<|extra|>": SIZE, "<|two|>": SIZE + 1}},
    "special_tokens_map.json": {"special_tokens_map__json": {"pad_token": "[PAD]", "bos_token": "<s>"}},
    "special_tokens_map.json, more": {"special_tokens_map__json": {"additional_special_tokens": ["<|extra|>"]}},
    "in tokenizer.json already": {
        "added": ["<|extra|>"],
        "config": CLASS | {"added_tokens_decoder": flagged(special=False)},
    },
    "in tokenizer.json, special elsewhere": {
        "added": ["<|extra|>"],
        "config": CLASS | {"additional_special_tokens": ["<|extra|>"]},
    },
    "bos first": {"post_processor": bos_first()},
    "bos first, add_bos_token false": {"post_processor": bos_first(), "config": CLASS | {"add_bos_token": False}},
    "add_bos_token true, no post-processor": {"config": CLASS | {"add_bos_token": True}},
    "add_eos_token true": {"config": CLASS | {"add_eos_token": True}},
}


@pytest.mark.parametrize("name", SAME)
def test_tokens_are_transformers_own(name, tmp_path):
    folder = write(tmp_path / "model", **SAME[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    for _ in range(2):  # resolved, and from the store
        ours = read_tokenizer_files(folder).backend
        for text in TEXTS:
            assert ours.encode(text).ids == theirs(text).input_ids, text
            assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


def test_the_pipeline_of_tokenizer_json_is_kept_whatever_the_class_is_called(tmp_path):
    folder = write(tmp_path / "model", config=CLASS | {"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"})
    assert read_tokenizer_files(folder).backend.encode("12[PAD]").tokens == ["1", "2", "[PAD]"]


def test_a_warm_start_imports_no_transformers(tmp_path):
    folder = write(tmp_path / "model", config=CLASS | {"pad_token": "[PAD]"})
    program = (
        "import sys; from pathlib import Path; from model_store.tokenizer_files import read_tokenizer_files as read\n"
        f"print(read(Path({str(folder)!r})).backend.encode('[PAD]').ids, 'transformers' in sys.modules)"
    )
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert said == [f"[{SIZE}] True", f"[{SIZE}] False"]


REFUSED = {
    "tokenizer.json, cut": ({"tokenizer__json": '{"model": '}, "tokenizer.json is not valid JSON"),
    "tokenizer.json, another thing": ({"tokenizer__json": {}}, "tokenizer.json is not a tokenizer that can be read"),
    "tokenizer.json, a list": ({"tokenizer__json": []}, "tokenizer.json is a JSON list, not an object"),
    "tokenizer_config.json, empty": ({"tokenizer_config__json": ""}, "tokenizer_config.json is not valid JSON"),
    "tokenizer_config.json, a BOM": ({"tokenizer_config__json": "\ufeff{}"}, "tokenizer_config.json is not valid JSON"),
    "tokenizer_config.json, a list": (
        {"tokenizer_config__json": []},
        "tokenizer_config.json is a JSON list",
    ),
    "special_tokens_map.json, cut": ({"special_tokens_map__json": "{"}, "special_tokens_map.json is not valid JSON"),
    "added_tokens.json, cut": ({"added_tokens__json": '{"a": 1'}, "added_tokens.json is not valid JSON"),
    "generation_config.json, cut": ({"generation_config__json": "{"}, "generation_config.json is not valid JSON"),
    "generation_config.json, a text": (
        {"generation_config__json": '"x"'},
        "generation_config.json is a JSON str, not an object",
    ),
    "eos as a text": ({"generation_config__json": {"eos_token_id": "</s>"}}, "eos_token_id is '</s>', neither"),
    "eos in a list of texts": (
        {"generation_config__json": {"eos_token_id": ["</s>"]}},
        "eos_token_id is ['</s>'], neither",
    ),
    "template as a number": (
        {"config": CLASS | {"chat_template": 5}},
        "chat_template is neither a text nor texts with names",
    ),
    "template list without names": (
        {"config": CLASS | {"chat_template": [{"template": "x"}]}},
        "chat_template is neither",
    ),
    "added token with an id of another": (
        {"config": CLASS | {"added_tokens_decoder": {"0": "x"}}},
        "added_tokens_decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_told_with_the_file(name, tmp_path):
    changes, message = REFUSED[name]
    folder = write(tmp_path / "model", **changes)
    with pytest.raises(BoomerangError, match=re.escape(message)) as refusal:
        read_tokenizer_files(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_folders_without_tokenizer_json(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match=rf"{folder} has no tokenizer"):
        read_tokenizer_files(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(
        StoreError, match=rf"{folder} has its tokenizer only as tokenizer\.model: make a tokenizer\.json"
    ):
        read_tokenizer_files(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(CLASS | {"tokenizer_class": "GPT2Tokenizer"}))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert all(read_tokenizer_files(folder).backend.encode(text).ids == theirs(text).input_ids for text in TEXTS)


# --- more tokens than rows


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_beyond_the_rows_are_text(where, tmp_path, caplog):
    changes = {
        "tokenizer.json": {"added": ["<|extra|>", "<|two|>"]},
        "tokenizer_config.json": {"config": CLASS | {"additional_special_tokens": ["<|extra|>", "<|two|>"]}},
        "added_tokens.json": {"added_tokens__json": {"<|extra|>": SIZE, "<|two|>": SIZE + 1}},
    }[where]
    folder = write(tmp_path / "model", **changes)
    with caplog.at_level(logging.WARNING):
        tokenizer = ServingTokenizer.from_folder(folder, vocab_size=SIZE + 1)
    assert "1 added tokens beyond the" in caplog.text and "'<|two|>'" in caplog.text
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert max(ids, default=0) <= SIZE and tokenizer.decode(ids) == text
    assert SIZE in tokenizer.encode("<|extra|>")


def test_rows_without_tokens_are_no_matter(tmp_path, caplog):
    ServingTokenizer.from_folder(write(tmp_path / "model", added=["<|extra|>"]), vocab_size=SIZE + 50)
    assert not caplog.text


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(StoreError, match=rf"goes up to token {SIZE - 1} and the model has rows for {SIZE - 1}"):
        ServingTokenizer.from_folder(write(tmp_path / "model"), vocab_size=SIZE - 1)


# --- chat templates


def jinja(folder, **named):
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    for name, text in named.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return folder


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T {{ tools }}"}]
TEMPLATES = {
    "none": {},
    "in the config": {"config": CLASS | {"chat_template": "C"}},
    "a file": {"chat_template__jinja": "F"},
    "a file and the config": {"config": CLASS | {"chat_template": "C"}, "chat_template__jinja": "F"},
    "named ones": {"config": CLASS | {"chat_template": NAMED}},
    "named ones, no default": {"config": CLASS | {"chat_template": NAMED[1:]}},
    "named ones and a file": {"config": CLASS | {"chat_template": NAMED}, "chat_template__jinja": "F"},
}


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
@pytest.mark.parametrize("more", [{}, {"tool_use": "A {{ tools }}", "rag": "R"}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_transformers_own(name, more, tools, tmp_path):
    folder = jinja(write(tmp_path / "model", **TEMPLATES[name]), **more)
    try:
        expected = AutoTokenizer.from_pretrained(folder).get_chat_template(tools=tools)
    except ValueError:  # none, or no default among several
        expected = None
    ours = ServingTokenizer.from_folder(folder)
    template = ours.tool_template if tools else ours.chat_template
    assert (template and template.source) == expected


def test_one_of_the_models_templates_may_be_named(tmp_path):
    folder = write(tmp_path / "model", config=CLASS | {"chat_template": NAMED})
    assert ServingTokenizer.from_folder(folder, chat_template="tool_use").chat_template.source == NAMED[1]["template"]
