"""KV memory costs nothing until it is written."""

import psutil
import torch

from server.model.attention import TorchAttention


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
