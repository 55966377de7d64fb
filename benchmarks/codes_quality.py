"""What serving from a file's own codes costs in quality, by size, against the same weights multiplied in float32.

    python -m benchmarks.codes_quality --text wikitext2_valid.txt [--windows 8] [--sizes 16,22,28,30]

A student that is a low-rank difference runs in two forms: as a difference to the teacher's codes, and expanded into
Q5_1. KL (nats per token) and top-1 agreement: of each form to the student's exact sum with the dequantised teacher, and
of that and of each form to the dequantised teacher. Windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.int8_quality import WINDOW, logprobs
from model_store.arrays import FLOAT32
from model_store.int8 import dense
from model_store.loaded import LoadedPair
from model_store.pair import Pair, open_pair
from model_store.weight_form import Storage, WeightForm
from server.config import Settings
from server.engine.engine import Engine
from server.loading import engine_config


def exact(pair: Pair) -> LoadedPair:
    """float32: the teacher's dequantised values, students added to them in float32."""
    loaded = pair.load(WeightForm(torch.float32, low_rank=True, storage=Storage.CODES))
    for part in [*loaded.layers.values(), *{id(end): end for end in loaded.ends.values()}.values()]:
        for field in dataclasses.fields(part):
            if not isinstance(value := getattr(part, field.name), int | str | None):
                setattr(part, field.name, dense(value, FLOAT32))
    for end in loaded.ends.values():
        end.head = end.embed if pair.spec.tie_word_embeddings else end.head
    student = pair.low_rank_student
    for layer in loaded.low_rank:
        index = layer - pair.spec.num_layers
        base = loaded.layers[student.kept[index]]
        loaded.layers[layer] = student.layer(index, base, WeightForm(torch.float32), student.sums(index, base))
    return dataclasses.replace(loaded, low_rank={})


def make_engine(loaded: LoadedPair, pair: Pair) -> Engine:
    config = engine_config(Settings(executor="native"), pair, loaded.form.dtype, "cpu")
    changes = {"max_num_seqs": 1, "max_model_len": WINDOW + 1, "max_num_batched_tokens": WINDOW}
    return Engine(loaded, dataclasses.replace(config, kv_cache_bytes=96 << 20, **changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sizes", default="16,22,28,30", help="layers, separated by commas")
    arguments = parser.parse_args()
    pair = open_pair()
    tokenizer = Tokenizer.from_file(str(pair.tokenizer_path / "tokenizer.json"))
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[: 8 * WINDOW * arguments.windows]).ids
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(arguments.windows)]
    sizes, teacher = [int(size) for size in arguments.sizes.split(",")], pair.elasticity.sizes[-1]
    forms = {"difference": True, "expanded": False}
    engines = {
        name: make_engine(pair.load(WeightForm(low_rank=low_rank, storage=Storage.CODES)), pair)
        for name, low_rank in forms.items()
    }
    reference = make_engine(exact(pair), pair)
    sums = {(size, name): np.zeros(4) for size in sizes for name in engines}
    for window in windows:
        top = logprobs(reference, teacher, window)
        for size in sizes:
            itself = logprobs(reference, size, window)
            for name, engine in engines.items():
                ours = logprobs(engine, size, window)
                sums[size, name] += [
                    (itself.exp() * (itself - ours)).sum(-1).mean().item(),
                    (ours.argmax(-1) == itself.argmax(-1)).float().mean().item(),
                    (top.exp() * (top - itself)).sum(-1).mean().item(),
                    (top.exp() * (top - ours)).sum(-1).mean().item(),
                ]
    table = Table(title=f"{pair.name}, {len(windows)} windows of {WINDOW} tokens")
    for column in ("size", "form", "KL to itself", "top-1 as itself", "itself to the teacher", "form to the teacher"):
        table.add_column(column, justify="right")
    for (size, name), row in sums.items():
        kl, agreement, *to_teacher = row / len(windows)
        table.add_row(f"{size}L", name, f"{kl:.5f}", f"{agreement:.4f}", *(f"{value:.4f}" for value in to_teacher))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
