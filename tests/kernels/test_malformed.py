"""Checkpoints that somebody damaged: refused in a sentence, or computed within their own memory.

`make sanitize` runs many of these with kernels that see every access outside a tensor.
"""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_store.errors import BoomerangError
from model_store.pair import open_pair
from model_store.weight_form import Storage, WeightForm
from server.core.executor import Draw
from server.engine.isolation import EngineBroken
from server.kernels.cpu import library
from tests.kernels.test_cpu_sampling import Drawer
from tests.model.test_oracle import make_engine, make_request, run
from tests.model_store.test_oddities import changed, config, originals, tensors, without
from tests.tiny_pairs import FAMILIES

NUM_CHECKPOINTS = int(os.environ.get("BOOMERANG_MALFORMED", "40"))
__all__ = ["originals"]  # a fixture
FORMS = [
    WeightForm(torch.float32),
    WeightForm(torch.bfloat16),
    WeightForm(torch.float32, storage=Storage.INT8),
    WeightForm(torch.bfloat16, storage=Storage.NESTED, bits=4),
]
STRANGE: list[Any] = [
    0, 1, -1, 2, 3, 7, 63, 65, 128, 2**15, 2**31 - 1, 2**31, 2**40, 0.0, 0.5, -0.5, 1e-30, 1e30, math.inf, math.nan,
    None, True, "", "8", "silu", "linear", [], [1], {}, {"rope_type": "linear", "factor": 3.0},
]  # fmt: skip
HARMFUL = (0.0, 1e-40, 1e38, -1e38, math.inf, -math.inf, math.nan)

if isinstance(library.choose(), list):
    pytest.skip("no native kernels here", allow_module_level=True)


def other_number(value: Any, draw: random.Random) -> Any:
    """Near what it was, where the mistakes are that a shape just misses; or anything."""
    if type(value) is int and draw.random() < 0.6:
        return draw.choice([value - 1, value + 1, 2 * value, value // 2, -value, value + 64])
    return draw.choice(STRANGE)


def spoil_config(folder: Path, draw: random.Random) -> None:
    values = json.loads((folder / "config.json").read_text())
    name = draw.choice(sorted(values))
    if draw.random() < 0.15:
        without(name)(folder)
    elif isinstance(values[name], dict) and values[name] and draw.random() < 0.8:
        inner = draw.choice(sorted(values[name]))
        config(**{name: values[name] | {inner: other_number(values[name][inner], draw)}})(folder)
    else:
        config(**{name: other_number(values[name], draw)})(folder)


def spoil_tensor(folder: Path, draw: random.Random) -> None:
    """Another shape, other numbers, none at all, or a second name for it."""
    found = load_file(folder / "model.safetensors")
    name = draw.choice(sorted(found))
    value = found[name]
    kind = draw.choice(["row", "column", "flat", "empty", "numbers", "numbers", "drop", "type", "more"])
    if kind == "numbers":
        value = value.clone()
        value.view(-1)[draw.randrange(value.numel()) :: draw.choice([1, 3, 1000])] = draw.choice(HARMFUL)
    elif kind in ("row", "column"):
        dim = 0 if kind == "row" else -1
        value = draw.choice([value.narrow(dim, 0, value.shape[dim] - 1), torch.cat([value, value], dim)])
    elif kind == "flat":
        value = draw.choice([value.reshape(-1), value.unsqueeze(0), value.swapaxes(0, -1)])
    elif kind == "type":
        value = value.to(draw.choice([torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e5m2]))
    rest = {key: other for key, other in found.items() if key != name}
    new = {"empty": {name: value[:0]}, "drop": {}, "more": {name: value, name + ".more": value.clone()}}
    tensors(lambda _: rest | new.get(kind, {name: value}))(folder)


def spoil_bytes(folder: Path, draw: random.Random) -> None:
    """In the file itself: its header, which says where tensors lie, or the numbers."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    for _ in range(draw.choice([1, 1, 4])):
        data[draw.randrange(8, 8 + header) if draw.random() < 0.6 else draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]))


SPOIL: list[Callable[[Path, random.Random], None]] = [spoil_config, spoil_tensor, spoil_bytes]  # in this order


@pytest.mark.parametrize("number", range(NUM_CHECKPOINTS))
def test_whatever_a_checkpoint_says(number, originals, tmp_path):
    draw = random.Random(number)
    family = FAMILIES[number % len(FAMILIES)]
    spoil = sorted(draw.choices(SPOIL, k=draw.choice([1, 1, 2])), key=SPOIL.index)

    def change(folder: Path) -> None:
        for one in spoil:
            one(folder, random.Random(number))

    sides = draw.choice([("teacher",), ("student",), ("teacher", "student")])
    try:
        pair = open_pair(*changed(originals, draw.choice([family, f"{family}/tied"]), tmp_path, change, sides))
        loaded = pair.load(FORMS[number // len(FAMILIES) % len(FORMS)])
    except BoomerangError as error:
        assert "\n" not in str(error)
        return
    length = min(40, pair.spec.max_context)
    try:
        engine = make_engine(pair, "native", loaded=loaded, max_model_len=length)
        vocab = pair.spec.vocab_size
        prompt = [token % vocab for token in (0, vocab - 1, *range(5, length - 5))][: length - 1]
        requests = [make_request(f"{size}", prompt, size, max_tokens=length, logprobs=2) for size in loaded.sizes]
        run(engine, requests, check=False)
    except (BoomerangError, EngineBroken, ValueError) as error:  # weights that are no numbers
        assert "\n" not in str(error)


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_draw_from_hostile_logits_is_a_token_of_the_vocabulary(harm):
    vocab = 1003
    drawer = Drawer(vocab)
    logits = np.random.default_rng(0).standard_normal((6, vocab), np.float32)
    logits[0], logits[1, ::2], logits[2, 7], logits[3, -1] = harm, harm, harm, harm
    logits[4] = harm
    logits[4, 5] = 1.0
    for draw in (
        Draw(1.0, 1.0, 0.0, 0, 0.999999), Draw(1e-6, 0.5, 0.0, 0, 0.0), Draw(1e6, 1.0, 0.9, 0, 0.5),
        Draw(1.0, 1.0, 0.0, 5, 1 - 2**-53), Draw(0.7, 1e-9, 1.0, vocab, 0.3), Draw(0.0, 1.0, 0.0, 0, 0.5),
    ):  # fmt: skip
        tokens = np.array(drawer.draw(logits, [draw] * len(logits)))
        assert ((tokens >= -1) & (tokens < vocab)).all()
