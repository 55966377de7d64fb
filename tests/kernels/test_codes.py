"""Matrices in codes: the native kernels give what the torch executor gives with the same codes, whatever their type."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from model_store.arrays import BFLOAT16, FLOAT32, in_torch
from model_store.int8 import Matrix, dense
from model_store.loaded import LoadedPair
from model_store.quantized import BLOCK_TYPES, CodedMatrix, stacked
from model_store.weights import MATRICES
from server.core.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import NativeExecutor, create
from server.kernels.cpu.library import VARIANT_VARIABLE
from server.model.linear import linear
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import FAMILIES, PAGE, assert_same_logits, logits_of, make_pair, make_steps
from tests.model_store.test_quantized import random_matrix

# Inputs of 256, so that every type fits; rows that do not fill panels.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
STEPS = [[3, 0, 7, 1, 0], [1, 29, 1, 130, 4], [1, 1, 1, 1, 1], [2, 0, 0, 0, 1]]


def in_codes(pair: LoadedPair, types: dict[str, list[str]]) -> LoadedPair:
    """The pair with random codes: `types` of each matrix, one for each of the file's tensors that are fused."""
    spec, seed = pair.spec, 0

    def coded(shape: tuple[int, ...], names: list[str], rows: list[int]) -> CodedMatrix:
        nonlocal seed
        parts = []
        for name, n in zip(names, rows, strict=True):
            seed += 1
            parts.append(random_matrix(name, n, shape[1], seed))
        return stacked(parts)

    for layer in pair.layers.values():
        for name in MATRICES:
            shape, names = getattr(layer, name).shape, types[name]
            rows = [shape[0]]
            if name == "qkv_weight" and len(names) > 1:
                rows = [spec.q_size, spec.kv_size, spec.kv_size]
            elif len(names) > 1:
                rows = [shape[0] // 2] * 2
            setattr(layer, name, coded(shape, names, rows))
    for end in {id(end): end for end in pair.ends.values()}.values():
        end.embed = end.head = coded(end.head.shape, types["head"], [end.head.shape[0]])
    return pair


def all_of(name: str) -> dict[str, list[str]]:
    return {key: [name] for key in (*MATRICES, "head")}


def native_of(
    pair: LoadedPair, variant: str, monkeypatch: pytest.MonkeyPatch, threads: int = 2, **config
) -> NativeExecutor:
    if variant:
        monkeypatch.setenv(VARIANT_VARIABLE, variant)
    native = create(pair, EngineConfig(page_size=PAGE, max_model_len=320, num_threads=threads, **config))
    if isinstance(native, str):
        pytest.skip(native)
    return native


def densified(pair: LoadedPair) -> LoadedPair:
    """The same in float32, without codes."""
    for part in (*pair.layers.values(), *{id(e): e for e in pair.ends.values()}.values()):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if not isinstance(value, int | str | None):
                setattr(part, field.name, dense(value, FLOAT32))
    return pair


_expected: dict[tuple, list[np.ndarray]] = {}


def expected(make: Callable[[], LoadedPair], exact: bool, counts: list[list[int]], *key: str) -> list[np.ndarray]:
    """What the portable executor computes of the pair that `key` names: for every variant of the native one."""
    if (exact, *key) not in _expected:
        pair = densified(make()) if exact else make()
        steps = make_steps(pair.elasticity, counts)
        _expected[exact, *key] = logits_of(TorchExecutor(pair, page_size=PAGE), steps)
    return _expected[exact, *key]


def assert_same_products(native: NativeExecutor, head: Matrix) -> None:
    """Rounded activations times codes are those of the portable executor; a row's sums do not depend on its company."""
    x = np.random.default_rng(1).standard_normal((40, 256), np.float32)
    x[3, 32:64] = 0
    everything = native.logits(x, len(x))
    expected = linear(torch.from_numpy(x), in_torch(head)).numpy()
    assert np.linalg.norm(everything - expected) < 1e-6 * np.linalg.norm(expected)
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 12, 13, 23):
        assert np.array_equal(native.logits(x[:num_rows], num_rows), everything[:num_rows])


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_every_type_and_number_of_rows(variant, name, monkeypatch):
    """Rounded activations times codes are those of the portable executor; a row's sums do not depend on its company."""
    pair = in_codes(make_pair("llama", torch.float32, **SHAPE), all_of(name))
    head = dataclasses.replace(pair.ends["teacher"].head)  # packing changes the matrix
    native = native_of(pair, variant, monkeypatch)
    assert_same_products(native, head)


# Rounding is chaotic: a difference in the last bit of a float moves some activations by a whole step.
ROUNDED, EXACT = 0.15, 3e-3


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_every_type(variant, name, exact, monkeypatch):
    """Embedding, layers and head: rounded activations against rounded ones, floats against the dequantised model."""
    make = lambda: in_codes(make_pair("llama", torch.float32, **SHAPE), all_of(name))  # noqa: E731
    native = native_of(make(), variant, monkeypatch, exact_activations=exact)
    steps = make_steps(native._pair.elasticity, STEPS)
    assert_same_logits(native, expected(make, exact, STEPS, "llama", name), steps, EXACT if exact else ROUNDED)


# As files have them: v and down of more bits; and what no file has, fused tensors whose types share panels.
MIXED = {
    "qkv_weight": ["Q4_K", "Q4_K", "Q6_K"], "o_weight": ["Q5_K"], "up_weight": ["Q4_K", "Q4_K"],
    "down_weight": ["Q6_K"], "head": ["Q8_0"],
}  # fmt: skip
ODD = {
    "qkv_weight": ["Q5_0", "Q8_0", "Q4_1"], "o_weight": ["Q5_1"], "up_weight": ["Q4_0", "Q6_K"],
    "down_weight": ["Q4_1"], "head": ["Q6_K"],
}  # fmt: skip
MANY = [[213, 150, 141, 90, 60], [1, 2, 40, 29, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_types_in_every_family(variant, family, kind, exact, monkeypatch):
    """Many rows go in chunks by threads, few by panels; sizes are mixed."""
    types = MIXED if kind == "mixed" else ODD
    changes = SHAPE | ({"num_kv_heads": 8} if family in ("gpt_neox", "gpt2") else {})
    if kind == "odd":
        changes |= {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64} if family == "gpt2" else {"head_dim": 40}
        changes |= {"hidden_size": 256, "num_heads": 32 if family == "llama" else 8}
        if changes["head_dim"] == 40:  # inputs of the output matrix: 8 x 40 is no multiple of 256
            types = types | {"o_weight": ["Q5_1"]}
    if not FAMILIES[family].get("gated_mlp", True):
        types = types | {"up_weight": types["up_weight"][:1]}
    make = lambda: in_codes(make_pair(family, torch.float32, **changes), types)  # noqa: E731
    native = native_of(make(), variant, monkeypatch, exact_activations=exact)
    steps = make_steps(native._pair.elasticity, MANY)
    assert_same_logits(native, expected(make, exact, MANY, family, kind), steps, EXACT if exact else ROUNDED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_without_codes_beside_codes(variant, monkeypatch):
    """A head in bfloat16, as some files have it, and layers in codes; KV in bfloat16."""

    def make() -> LoadedPair:
        pair = in_codes(make_pair("llama", torch.bfloat16, **SHAPE), all_of("Q4_1"))
        for end in pair.ends.values():
            end.embed = end.head = np.random.default_rng(2).standard_normal((331, 256)).astype(BFLOAT16)
        return pair

    native, pair = native_of(make(), variant, monkeypatch), densified(make())
    assert_same_logits(native, TorchExecutor(pair, page_size=PAGE), make_steps(pair.elasticity, STEPS), ROUNDED)


def test_nothing_lies_twice(monkeypatch):
    """Panels are filled up, 331 rows to 352; the file's blocks are gone."""
    pair = in_codes(make_pair("llama", torch.bfloat16, **SHAPE), all_of("Q4_1"))
    before = pair.num_bytes()
    native = native_of(pair, "", monkeypatch)
    assert native._weights.num_bytes() <= 1.05 * before
    assert all(np.shares_memory(t, native._weights._arena) for t in pair.tensors() if t.dtype == np.uint8)
