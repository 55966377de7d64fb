"""KV in 8 bits: both executors do the same with the same codes, and stay near what wide KV gives."""

import functools

import numpy as np
import pytest
import torch

from model_store.arrays import to_numpy
from model_store.assembly import Elasticity
from server.core.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import create
from server.kernels.cpu.library import VARIANT_VARIABLE
from server.model.executor import create_executor
from server.model.int8_attention import round_to_codes
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import FAMILIES, PAGE, assert_same_logits, logits_of, make_pair, make_steps
from tests.kernels.test_cpu_executor import portable_of

# A difference in the last bit of a float moves some codes by a whole step; what 8 bits cost these random models.
ROUNDED, EIGHT_BITS = 5e-3, 0.03
STEPS = [[3, 0, 7, 1, 0], [1, 29, 1, 130, 4], [1, 1, 1, 150, 1], [1, 2, 1, 1, 1]]


def native_of(pair, page_size=PAGE, **changes):
    config = EngineConfig(page_size=page_size, max_model_len=320, kv_cache_dtype="int8", **changes)
    native = create(pair, config)
    if isinstance(native, str):
        pytest.skip(native)
    return native


@functools.cache
def expected(family: str, page_size: int) -> list[np.ndarray]:
    """What the portable executor computes: the same for every variant of the native one."""
    pair = make_pair(family, torch.float32)
    portable = TorchExecutor(pair, page_size=page_size, kv_cache_dtype="int8")
    return logits_of(portable, make_steps(pair.elasticity, STEPS))


@pytest.mark.parametrize("page_size", [PAGE, 32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_and_torch_agree(family, variant, page_size, monkeypatch):
    """Heads of 20 and 24 channels; whole prompts, chunks beyond one block of the softmax, decode rows beside them."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    native = native_of(make_pair(family, torch.float32), page_size, num_threads=3)
    steps = make_steps(native._pair.elasticity, STEPS)
    assert_same_logits(native, expected(family, page_size), steps, ROUNDED)


@pytest.mark.parametrize("page_size", [48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_wide_kv(page_size, dtype):
    """Large heads, more than one group of positions in a page, many rows at once, contexts that threads share."""
    changes = {"head_dim": 80, "num_heads": 4, "num_kv_heads": 1}
    native = native_of(make_pair("llama", dtype, **changes), page_size, num_threads=2)
    portable = portable_of(make_pair("llama", dtype, **changes), page_size)
    steps = make_steps(native._pair.elasticity, [[213, 150, 141, 90, 60], [1, 2, 150, 1, 1], [1, 1, 1, 1, 1]])
    assert_same_logits(native, portable, steps, EIGHT_BITS)


def test_a_page_takes_what_its_bytes_say():
    """A byte per value; float16 scales, of K per 32 channels of a head, of V per head."""
    changes = {"head_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    pair = make_pair("llama", torch.bfloat16, **changes)
    expected = 32 * 2 * (64 + 64 + 2 * 2 + 2)
    assert pair.spec.kv_bytes_per_token_layer(2, "int8") * 32 == expected
    portable = TorchExecutor(pair, page_size=32, kv_cache_dtype="int8")
    for executor in (portable, native_of(pair, 32)):
        assert executor.page_bytes() == expected and "int8" in executor.describe()
        executor.allocate_kv(5)
        assert sum(tensor.nbytes for tensor in executor.kv_tensors()) == 5 * expected


def test_codes_are_within_half_a_step():
    x = torch.randn(7, 3, 40, generator=torch.Generator().manual_seed(0))
    x[2, 1, :32] = 0
    codes, scales = round_to_codes(x, 32)
    wide = scales.float().repeat_interleave(32, dim=-1)[..., :40]
    assert ((codes * wide - x).abs() <= 0.51 * wide).all() and codes.dtype == torch.int8


@pytest.mark.parametrize("name", ["native", "torch"])
def test_what_is_no_number_reaches_the_logits_of_its_request_only(name):
    """Codes cannot say NaN; their scales do, and wiped pages are as good as new."""
    elasticity = Elasticity.last_to_first(2, (0,))
    pair = make_pair("llama", torch.float32, elasticity)
    executor = native_of(pair) if name == "native" else TorchExecutor(pair, page_size=PAGE, kv_cache_dtype="int8")
    first, second = make_steps(elasticity, [[9, 9], [1, 1]], (2, 2))
    executor.allocate_kv(first.block_tables.size)
    executor.forward(first)
    pages = first.block_tables[:, 0, :2].ravel()
    for tensor in map(to_numpy, executor.kv_tensors()):
        tensor.view(np.uint8)[pages] = 255  # NaN in scales of float16
    logits = executor.logits(executor.forward(second), 2)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    for tensor in map(to_numpy, executor.kv_tensors()):
        tensor.view(np.uint8)[pages] = 0
    logits = executor.logits(executor.forward(second), 2)
    assert np.isfinite(logits).all()


def test_cuda_refuses_it_by_name():
    pytest.importorskip("triton")
    config = EngineConfig(executor="cuda", kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="cuda: takes no --kv-cache-dtype int8"):
        create_executor(make_pair("llama", torch.float32), config)


def test_values_without_numbers_are_seen_as_they_are_written():
    """One channel of a layer's K comes out infinite: the logits say so, though a maximum of it might not."""
    elasticity = Elasticity.last_to_first(2, (0,))
    for build in (native_of, lambda pair: TorchExecutor(pair, page_size=PAGE, kv_cache_dtype="int8")):
        pair = make_pair("qwen2", torch.float32, elasticity)
        for layer in pair.layers.values():
            layer.qkv_bias[pair.spec.q_size + 3] = np.nan
        executor = build(pair)
        (step,) = make_steps(elasticity, [[9, 1]], (2, 2))
        executor.allocate_kv(step.block_tables.size)
        assert np.isnan(executor.logits(executor.forward(step), 2)).all()
