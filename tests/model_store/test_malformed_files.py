"""The small files of a checkpoint, each value in them replaced by others: refused in a sentence, or read."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model_store.errors import BoomerangError
from model_store.gguf_file import GgufError, read_gguf
from model_store.nested_store import nested_file, put, write
from model_store.pair import open_pair
from model_store.quantized import CODES_FILE
from model_store.sources import resolve
from model_store.spec import ModelSpec, SpecError
from model_store.store import StoreError
from model_store.weight_form import Storage, WeightForm
from model_store.weights import WeightError
from server.api.generate.chat_template import ChatTemplate, TemplateError
from server.api.generate.sampling_defaults import read_sampling_defaults
from server.api.generate.tokenizer import ServingTokenizer
from server.core.width import EXACT
from server.sizing.quality import quality_table
from tests.api.tiny import VOCAB, make_pair, make_tokenizer
from tests.fuzz.mutate import STRANGE, places
from tests.model.test_codes_pair import keep_codes
from tests.tiny_pairs import make_model

NUM_FILES = int(os.environ.get("BOOMERANG_TEST_MALFORMED_FILES", "150"))
MORE = {
    "generation_config.json": {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    "special_tokens_map.json": {"pad_token": {"content": "<|endoftext|>"}, "additional_special_tokens": ["<|im_end|>"]},
    "added_tokens.json": {"<|im_end|>": 2},
    "pair.json": {"name": "p", "thresholds": [6, 6, 6, 6], "embed_threshold": 5, "norm_threshold": None},
    "quality.json": {
        "sizes": {"4": {"kl": 0.5, "perplexity": 3.0}, "5": {"kl": 0.2}, "6": {"kl": 0.0}},
        "kinds": {"text": {"sizes": {"4": {"kl": 0.5}, "5": {"kl": 0.2}}, "points": {"4L-q6": {"kl": 0.6}}}},
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pair in which every small file is there."""
    teacher, student = make_pair(tmp_path_factory.mktemp("whole"))
    make_tokenizer(student)
    for folder in (teacher, student):
        for name, content in MORE.items():
            (folder / name).write_text(json.dumps(content))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {f"model-0000{i}-of-00002.safetensors": [*tensors][i - 1 :: 2] for i in (1, 2)}
        for shard, names in shards.items():
            save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return teacher, student


def spoil(content: Any, draw: random.Random) -> Any:
    """One value replaced, removed, or put under another name. What is inside of long lists is one place like others."""
    content = copy.deepcopy(content)
    where = places(content)
    depth = draw.choice(sorted({len(place) for place in where}))
    *parents, last = draw.choice([place for place in where if len(place) == depth])
    holder = content
    for key in parents:
        holder = holder[key]
    kind = draw.choice(["replace", "replace", "replace", "remove", "rename"])
    if kind == "remove":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice([str(name) for name in STRANGE if isinstance(name, str)])] = holder.pop(last)
    else:
        holder[last] = copy.deepcopy(draw.choice(STRANGE))
    return content


def read_all(teacher: Path, student: Path) -> None:
    """What a start reads."""
    pair = open_pair(teacher, student)
    quality_table(pair.quality, pair.kinds, pair.elasticity.sizes, (6, EXACT))
    tokenizer = ServingTokenizer.from_folder(teacher, vocab_size=VOCAB)
    assert all(0 <= end < pair.spec.vocab_size for end in tokenizer.eos_token_ids)
    tokenizer.info()
    try:
        read_sampling_defaults([teacher], None)
    except ValueError as error:
        assert "generation_config.json" in str(error)


@pytest.mark.parametrize("number", range(NUM_FILES))
def test_whatever_a_small_file_says(number, folders, tmp_path):
    draw = random.Random(number)
    copies = [tmp_path / folder.name for folder in folders]
    for folder, target in zip(folders, copies, strict=True):
        shutil.copytree(folder, target, copy_function=os.link)
    files = [file for folder in copies for file in sorted(folder.glob("*.json")) if file.name != "config.json"]
    file = draw.choice(files)
    content = json.loads(file.read_text())
    file.unlink()
    spoilt = json.dumps(draw.choice(STRANGE) if draw.random() < 0.05 else spoil(content, draw))
    file.write_text(spoilt if draw.random() < 0.95 else spoilt[: draw.randrange(len(spoilt))])
    try:
        read_all(*copies)
    except BoomerangError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


# --- codes beside the weights, which kernels read as they are


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded") / "teacher"
    make_model("llama", 6, seed=1, tied=True).save_pretrained(folder)
    keep_codes(folder)
    return folder


NAME = "model.layers.1.self_attn.q_proj.weight"
ODD_CODES = {
    "rows": lambda codes, kinds: codes.update({NAME: codes[NAME][:-1].clone()}),
    "a block": lambda codes, kinds: codes.update({NAME: codes[NAME][:, :-20].clone()}),
    "flat": lambda codes, kinds: codes.update({NAME: codes[NAME].reshape(-1)}),
    "none": lambda codes, kinds: codes.update({NAME: codes[NAME][:0].clone()}),
    "another kind": lambda codes, kinds: kinds.update({NAME: "Q8_0"}),
    "an unknown kind": lambda codes, kinds: kinds.update({NAME: "Q2_K"}),
    "numbers": lambda codes, kinds: codes.update({NAME: codes[NAME].to(torch.int16)}),
    "kind without codes": lambda codes, kinds: codes.pop(NAME),
    "of a norm": lambda codes, kinds: kinds.update({"model.norm.weight": "Q8_0"}),
    "of nothing": lambda codes, kinds: kinds.update({"model.layers.9.self_attn.q_proj.weight": "Q8_0"}),
}


@pytest.mark.parametrize("name", ODD_CODES)
def test_codes_that_are_not_those_of_the_matrix_are_refused(name, coded, tmp_path):
    shutil.copytree(coded, tmp_path / "teacher", copy_function=os.link)
    with safe_open(coded / CODES_FILE, "pt") as file:
        codes, kinds = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    ODD_CODES[name](codes, kinds)
    (tmp_path / "teacher" / CODES_FILE).unlink()
    save_file(codes, tmp_path / "teacher" / CODES_FILE, kinds)
    with pytest.raises(WeightError, match=re.escape(CODES_FILE)):
        open_pair(tmp_path / "teacher")


def test_nested_codes_of_another_shape_are_not_taken(coded, tmp_path):
    pair = open_pair(coded)
    loaded = pair.load(WeightForm(torch.float32))
    file = nested_file(pair, tmp_path)
    write(loaded, file)
    with safe_open(file, "pt") as kept:
        tensors, about = {key: kept.get_tensor(key) for key in kept.keys()}, kept.metadata()  # noqa: SIM118
    name = "layers.1.qkv_weight.scales"
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, file, about)
    with pytest.raises(StoreError, match=r"layers\.1\.qkv_weight is not"):
        put(loaded, file, WeightForm(torch.float32, storage=Storage.NESTED, bits=4))


def test_a_manifest_names_files_of_its_folder_only(coded, tmp_path):
    shutil.copytree(coded, tmp_path / "teacher", copy_function=os.link)
    (tmp_path / "secret").write_text("not yours")
    for name in ("../secret", str(tmp_path / "secret")):
        manifest = {"files": {name: {"size": 9, "sha256": "0" * 64}}}
        (tmp_path / "teacher/manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match="which is not a file of its folder"):
            resolve(tmp_path / "teacher")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_value_of_a_config_is_read_or_refused(family):
    raw = make_model(family, 1, seed=1).config.to_dict() | {"model_type": family}
    for key in raw:
        for value in (None, True, -1, 0.5, 10**30, "", "x", [], [[]], [{}], {}, {"": []}):
            with contextlib.suppress(SpecError):
                ModelSpec.from_hf_config(raw | {key: value})


# --- chat templates, which are programs

TEMPLATES = {
    "loops": "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
    "rounds left out": "{% for i in range(2000) %}{% for j in range(2000) if false %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
    "a text many times": "{{ 'x' * 1000000000 }}",
    "lists": "{{ [1] * 100000000 }}",
    "a power": "{{ 10 ** 100 }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_too_long_fails_by_itself(name):
    with pytest.raises(TemplateError):
        ChatTemplate(TEMPLATES[name], {}).render([])


def test_what_a_template_computes_is_what_it_says():
    source = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% else %}none{% endfor %}"
        "{% for m in [] %}x{% else %}none{% endfor %}{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}"
        "{% macro f(x) %}<{{ x }}{{ caller() if caller else '' }}>{% endmacro %}{{ f(3) }}"
        "{% call f(4) %}in{% endcall %}"
        "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 2 * 3.5 }}"
        "{% for n in [1, [2]] recursive %}{{ loop(n) if n is iterable else n }}{% endfor %}"
    )
    text = ChatTemplate(source, {}).render([{"role": role} for role in ("user", "assistant", "user")])
    assert text == "1False2Truenonex1<3><4in>ababab10247.012"


def test_a_small_file_does_not_unfold_to_a_huge_model(tmp_path):
    def entry(name: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1024, 0, 0)

    for names in ([b"a"], [b"a", b"b", b"c"]):
        header = b"GGUF" + struct.pack("<IQQ", 3, len(names), 0) + b"".join(map(entry, names))
        (tmp_path / "odd.gguf").write_bytes(header + bytes(-len(header) % 32) + bytes(4096))
        if len(names) == 1:
            assert read_gguf(tmp_path / "odd.gguf").tensors["a"].shape == (1024,)
    with pytest.raises(GgufError, match="lie one over the other"):
        read_gguf(tmp_path / "odd.gguf")
