"""The codes of GGUF files mean what the gguf package says they mean."""

import gguf
import numpy as np
import pytest
import torch

from model_store.arrays import FLOAT32
from model_store.quantized import BLOCK_TYPES, CodedMatrix, CodedRows, q5_1, stacked
from server.model.linear import round_activations


def random_blocks(name: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Any codes; scales such that weights are about 0.05."""
    kind = BLOCK_TYPES[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, width // kind.inputs, kind.num_bytes), np.uint8)
    codes = {"4": 4.6, "5": 9.2, "6": 18.5, "8": 74.0}[name[1]]  # their deviation
    halves = {208 if name == "Q6_K" else 0: codes * (64.0 if name == "Q6_K" else 32.0 if name.endswith("K") else 1.0)}
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        halves[2] = 32.0 if name.endswith("K") else 1.0
    for at, spread in halves.items():
        values = (rng.standard_normal(blocks.shape[:2]) * 0.05 / spread).astype(np.float16)
        blocks[..., at : at + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def random_matrix(name: str, rows: int, width: int, seed: int = 0) -> CodedMatrix:
    return CodedMatrix((CodedRows(random_blocks(name, rows, width, seed), BLOCK_TYPES[name]),))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_dense_values_are_those_of_the_gguf_package(name):
    matrix = random_matrix(name, 7, 768)
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (BLOCK_TYPES[name].inputs, BLOCK_TYPES[name].num_bytes)
    expected = gguf.dequantize(matrix.parts[0].blocks, kind)
    assert matrix.shape == expected.shape == (7, 768)
    assert np.array_equal(matrix.dense(FLOAT32), expected)
    assert np.array_equal(matrix.rows(np.array([3, 3, 0])), expected[[3, 3, 0]])


def test_stacked_matrices_keep_their_types():
    parts = [random_matrix(name, 5, 256, seed) for seed, name in enumerate(("Q4_K", "Q4_K", "Q6_K"))]
    whole = stacked(parts)
    assert [(p.type.name, len(p.blocks)) for p in whole.parts] == [("Q4_K", 10), ("Q6_K", 5)]
    assert whole.kind == "Q4_K + Q6_K" and whole.shape == (15, 256)
    assert whole.nbytes == sum(part.nbytes for part in parts)
    assert np.array_equal(whole.dense(FLOAT32), np.concatenate([part.dense(FLOAT32) for part in parts]))


def test_activations_are_rounded_by_blocks():
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    x[1, 32:64] = 0
    rounded = round_activations(x)
    steps = x[:, :64].unflatten(1, (2, 32)).abs().amax(-1, keepdim=True) / 127
    error = (rounded - x)[:, :64].unflatten(1, (2, 32)).abs()
    assert (error <= 0.5001 * steps).all() and not rounded[1, 32:64].any()


def test_own_codes_are_nearer_than_those_of_the_gguf_package():
    matrix = np.random.default_rng(0).standard_normal((70, 96), np.float32)
    matrix[3, :32], matrix[4, :32] = 0.0, 7.5
    matrix[5] *= 1e-6  # scales below what float16 has at full precision
    kind, coded = gguf.GGMLQuantizationType.Q5_1, q5_1(matrix)
    dense = coded.dense(FLOAT32)
    assert np.array_equal(dense, gguf.dequantize(coded.parts[0].blocks, kind))
    assert not dense[3, :32].any() and np.array_equal(dense[4, :32], matrix[4, :32])
    theirs = gguf.dequantize(gguf.quantize(matrix, kind), kind)
    ours, reference = (np.square(found - matrix).reshape(70, 3, 32).sum(-1) for found in (dense, theirs))
    assert (ours <= reference + 1e-12).all() and ours.sum() < 0.95 * reference.sum()
    assert np.allclose(q5_1(dense).dense(FLOAT32), dense, atol=2e-3)  # what lies on a grid stays near it
