"""Nested codes for a pair: which inputs its matrices meet is measured on a text, then scales are fitted to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import model_store
from model_store import nested_store
from model_store.arrays import FLOAT32
from model_store.loaded import LoadedPair
from model_store.nested_store import Grams, places
from model_store.opening import in_windows, opening
from model_store.pair import Pair
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine

logger = logging.getLogger(__name__)

# Instructions, sums and speeches, a third each: t0_train_50k of yizhongw/self-instruct (Apache-2.0), the training split
# of openai/grade-school-math (MIT), addresses of presidents from nltk_data (public domain).
TEXT = Path(model_store.__file__).parent / "calibration.txt"
_WINDOW, _WINDOWS = 512, 8
# Fitting solves a system of equations per row; beyond so many parameters it would take hours.
_MOST_FITTED_PARAMETERS = 1_500_000_000


def make_nested(pair: Pair, file: Path) -> None:
    """Write the pair's nested codes, scales fitted where the pair is small enough; a minute for 135M parameters."""
    loaded = pair.load(WeightForm(FLOAT32)).in_torch()
    grams: Grams | None = None
    if pair.parameters(pair.elasticity.sizes[-1]) <= _MOST_FITTED_PARAMETERS:
        tokenizer = Tokenizer.from_file(str(pair.tokenizer_path / "tokenizer.json"))
        ids, first = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids, opening(tokenizer)
        texts = in_windows(ids, min(_WINDOW, pair.spec.max_context - 1), first, _WINDOWS)
        num_tokens = sum(map(len, texts))
        logger.info("nested codes: measuring what the matrices of %s meet in %d tokens", pair.name, num_tokens)
        grams = measure_grams(loaded, texts)
    else:
        logger.info("nested codes: scales of %s are fitted to its weights alone, for its size", pair.name)
    with tqdm(total=len({getattr(o, f).data_ptr() for _, o, f in places(loaded)}), unit="matrix") as bar:
        bar.set_description("nesting")
        nested_store.write(loaded, file, grams, lambda _: bar.update() and None)


class _Observed(torch.Tensor):
    """A weight that adds up X^T X of every X it is multiplied with."""

    gram: torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], _Observed) and hasattr(args[1], "gram"):
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            args[1].gram.addmm_(rows.T, rows)
        return super().__torch_function__(func, types, args, kwargs or {})


def measure_grams(pair: LoadedPair, texts: Sequence[list[int]]) -> Grams:
    """X^T X of every matrix over `texts` (token ids each), by the address of the matrix.

    The teacher's layers meet the texts at the largest size, the student's at the smallest. `pair` is loaded in plain
    floats; it is left as it was. RuntimeError if the text cannot be computed.
    """
    observed: dict[int, _Observed] = {}
    plain: list[tuple[Any, str, torch.Tensor]] = []
    for _, owner, field in list(places(pair)):
        matrix = getattr(owner, field)
        if isinstance(matrix, _Observed):  # of a layer that several ids share
            continue
        plain.append((owner, field, matrix))
        if matrix.data_ptr() not in observed:
            watched = observed[matrix.data_ptr()] = matrix.as_subclass(_Observed)
            watched.gram = torch.zeros(matrix.shape[1], matrix.shape[1])
        setattr(owner, field, observed[matrix.data_ptr()])
    try:
        _run(pair, texts)
    finally:
        for owner, field, matrix in plain:
            setattr(owner, field, matrix)
    return {address: matrix.gram for address, matrix in observed.items()}


def _run(pair: LoadedPair, texts: Sequence[list[int]]) -> None:
    longest = max(len(text) for text in texts)
    config = EngineConfig(
        executor="torch", max_model_len=longest + 1, max_num_seqs=1, max_num_batched_tokens=longest,
        kv_cache_bytes=2 * pair.sizes[-1] * pair.spec.kv_bytes_per_token_layer(4) * (longest + 64),
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(pair, config)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)  # the head meets every position
    for size in dict.fromkeys((pair.sizes[-1], pair.sizes[0])):
        for number, text in enumerate(texts):
            engine.add_request(Request(f"{size}-{number}", list(text), sampling, sizes=(size,)))
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(f"measuring the inputs of matrices failed: {output.error}")
