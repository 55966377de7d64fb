"""KV memory costs nothing until it is written."""

import logging

import psutil
import torch

from model_store.arrays import BFLOAT16
from server.config import Settings
from server.loading import engine_config
from server.model.attention import TorchAttention
from tests.kernels.steps import make_pair


def test_the_portable_pool_is_zero_and_not_resident_before_use():
    process = psutil.Process()
    attention = TorchAttention(page_size=32, scale=1.0, num_heads=2, num_kv_heads=2, head_dim=64)
    before = process.memory_info().rss
    attention.allocate(1 << 16, torch.bfloat16, torch.device("cpu"))  # 2 x 512 MiB
    pages = attention.k_pages, attention.v_pages
    assert all(tensor.shape == (1 << 16, 2, 32, 64) and tensor.dtype == torch.bfloat16 for tensor in pages)
    assert process.memory_info().rss - before < 64 << 20
    for tensor in pages:
        assert not tensor[[0, 1, 999, -1]].any()
        tensor[-1] = 1
        assert tensor[-1].all() and not tensor[-2].any()


def test_a_pool_beyond_what_is_available_is_warned_of(caplog):
    """It would be missed only under load, when the system ends the process."""
    pair = make_pair("llama", torch.bfloat16)
    for size, warns in ((1 << 20, False), (1 << 50, True)):
        with caplog.at_level(logging.WARNING, logger="server.loading"):
            caplog.clear()
            engine_config(Settings(kv_cache_memory=size, max_model_len=64), pair, BFLOAT16, "cpu")
        assert ("--kv-cache-memory" in caplog.text and "available" in caplog.text) == warns
