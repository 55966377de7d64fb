"""bfloat16 in twelve bits: the same numbers, wherever and by however many rows they are read."""

import numpy as np
import pytest
import torch

from model_store.arrays import to_numpy, to_torch
from model_store.assembly import Elasticity
from model_store.loaded import LoadedPair
from server.core.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import NativeExecutor, create
from server.kernels.cpu.library import VARIANT_VARIABLE
from tests.kernels.steps import make_pair, make_steps, quantised


def wild(*shape: int) -> torch.Tensor:
    """bfloat16 of all exponents but those of infinity and of subnormal numbers; zeros of both signs, and whole rows."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    exponent = bits >> 7 & 255
    values = bits.view(torch.bfloat16)
    values = torch.where((exponent == 255) | (exponent == 0), torch.zeros_like(values).copysign(values), values)
    plain = torch.randn(shape, generator=generator).to(torch.bfloat16)
    values = torch.where(torch.rand(shape[0], 1, generator=generator) < 0.5, values, plain)  # some rows are ordinary
    values[1] = 0.0
    values[2, 1:] = 0.0
    return values


def executors(monkeypatch: pytest.MonkeyPatch, variant: str, make, page_size: int = 32) -> list[NativeExecutor]:
    """With compressed weights and with plain ones."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    found = [
        create(make(), EngineConfig(page_size=page_size, max_model_len=320, compress_weights=c, num_threads=2))
        for c in (True, False)
    ]
    if isinstance(found[0], str):
        pytest.skip(found[0])
    return found


@pytest.mark.parametrize("num_rows", [1, 3, 8, 12, 30, 70, 210])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_product_with_one_input_gives_the_weights(variant, num_rows, monkeypatch):
    """Rows with a single 1 read the head, column by column: by one row, by blocks of them, and by widened panels."""
    head = wild(331, 70)

    def make() -> LoadedPair:
        pair = make_pair("llama", torch.bfloat16)
        for end in pair.ends.values():
            end.embed = end.head = to_numpy(head)
        return pair

    native, _ = executors(monkeypatch, variant, make)
    inputs = torch.eye(70).repeat(3, 1)
    for start in range(0, 70, num_rows):
        rows = inputs[start : start + num_rows]
        assert np.array_equal(native.logits(rows.numpy(), len(rows)), (rows @ head.float().T).numpy())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_steps(variant, gated, monkeypatch):
    """With layers that add nothing the embeddings come out as they are; with weights of all magnitudes what plain ones
    give comes out, but for the order of sums."""
    family, elasticity = ("llama" if gated else "gpt2"), Elasticity.last_to_first(6, (0, 2, 4, 5))

    def make(scale: float) -> LoadedPair:
        pair = make_pair(family, torch.bfloat16, elasticity)
        for layer in pair.layers.values():
            for name in ("o_weight", "down_weight", "up_weight", "qkv_weight"):
                weight = to_torch(getattr(layer, name))
                spread = torch.exp2(-30 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)))
                weight.copy_(scale * weight * spread)
        for end in pair.ends.values():
            end.embed[:] = to_numpy(wild(*end.embed.shape).clamp(-2, 2))
        return pair

    for scale in (0.0, 2.0):
        outputs = []
        for native in executors(monkeypatch, variant, lambda scale=scale: make(scale), 8):
            steps = make_steps(elasticity, [[3, 0, 7, 1, 0], [1, 29, 1, 130, 4], [150, 100, 1, 40, 1]])
            native.allocate_kv(steps[0].block_tables.size)
            outputs.append([native.forward(batch) for batch in steps])
        for compressed, plain in zip(*outputs, strict=True):
            assert np.isfinite(plain).all()
            if (
                scale == 0.0 and gated
            ):  # gpt2's biases go through activations that are exact as well, but through sums too
                assert np.array_equal(compressed, plain)
            assert np.linalg.norm(compressed - plain) <= 5e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_without_a_code_in_deep_products(variant, monkeypatch):
    """All that counts of a matrix deeper than the pieces that tiles take it in: beside a large weight, whose input is
    zero, the others have no code."""

    def make() -> LoadedPair:
        pair = make_pair("llama", torch.bfloat16, hidden_size=96, intermediate_size=1290, head_dim=32)
        for layer in pair.layers.values():
            layer.up_weight[0] = 0.0
            layer.down_weight[:, 0] = 2.0**20
        return pair

    outputs = []
    for native in executors(monkeypatch, variant, make):
        steps = make_steps(native._pair.elasticity, [[213, 150, 141, 90, 60], [1, 2, 40, 29, 1], [1, 0, 0, 0, 0]])
        native.allocate_kv(steps[0].block_tables.size)
        outputs.append([native.forward(batch) for batch in steps])
    for compressed, plain in zip(*outputs, strict=True):
        assert np.linalg.norm(compressed - plain) <= 5e-3 * np.linalg.norm(plain)


def test_bytes(monkeypatch):
    """Three quarters, and one base per channel and input of a line."""
    found = executors(monkeypatch, "avx512_bf16", lambda: make_pair("llama", torch.bfloat16, hidden_size=512))
    compressed, plain = (native._weights.num_bytes() for native in found)
    assert 0.75 < compressed / plain < 0.77
    shapes = [shape for _ in range(10) for shape in found[0].spec.matrix_shapes.values()] + 2 * [(331, 512)]
    lists = sum(tensor.nbytes for tensor in found[0]._weights._beside if tensor.dtype == np.int32)
    assert sum(found[0].matrix_bytes(*shape) for shape in shapes) == compressed - lists
    assert "12 bits" in found[0].describe() and "12 bits" not in found[1].describe()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_what_is_not_bfloat16_is_left_alone(kind):
    pair = make_pair("llama", torch.float32) if kind == "float32" else quantised(make_pair("llama", torch.bfloat16))
    native = create(pair, EngineConfig(page_size=32, max_model_len=320))
    if isinstance(native, str):
        pytest.skip(native)
    assert "12 bits" not in native.describe()
