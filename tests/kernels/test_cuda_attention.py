"""Paged attention against plain torch, interpreted where there is no GPU: decode and chunks, whole and split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from server.kernels.cuda.attention import Items, PagedAttention
from server.kernels.cuda.inputs import StepInputs
from server.kernels.cuda.staging import Upload
from tests.kernels.tensors import DEVICE, NO_LIMIT, assert_close, ints, randn


def make_attention(*, num_programs: int, heads: int, kv_heads: int, dim: int, dtype=torch.bfloat16, max_rows=4):
    return PagedAttention(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.3, max_rows=max_rows, num_programs=num_programs,
        dtype=dtype, device=DEVICE,
    )  # fmt: skip


def attend(items: Items, *, num_programs: int, heads=6, kv_heads=2, dim=24, dtype=torch.float32, tokens=40, length=104):
    """Kernel and reference outputs [tokens, H, D] for two requests with `length` positions in shuffled pages."""
    page = 8
    num_blocks = length // page
    attention = make_attention(num_programs=num_programs, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    for scratch in (attention._partial, attention._scores):  # what was not written must not be read
        scratch.fill_(torch.nan)
    keys, values = (randn(2, length, kv_heads, dim, dtype=dtype, around=a) for a in (0.0, 0.1))
    q = randn(tokens, heads, dim, dtype=dtype)
    order = torch.randperm(2 * num_blocks, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table = order.view(2, num_blocks).int()
    shape = (2 * num_blocks, kv_heads, page, dim)
    pages = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    for target, source in zip(pages, (keys, values), strict=True):
        target[order] = source.view(2 * num_blocks, page, kv_heads, dim).transpose(1, 2)
    got = torch.zeros_like(q)
    attention.run(q, got, *pages, table, items, first_token=10)
    expected = torch.zeros_like(q)
    for item in range(min(len(items), int(items.count))):
        row, slot = int(items.tokens[item]) - 10, int(items.slots[item])
        for i in range(int(items.lengths[item])):
            seen = int(items.positions[item]) + i + 1
            k, v = keys[slot, :seen].transpose(0, 1), values[slot, :seen].transpose(0, 1)
            query = q[row + i][:, None].float()
            expected[row + i] = F.scaled_dot_product_attention(
                query[None], k[None].float(), v[None].float(), scale=0.3, enable_gqa=True
            )[0, :, 0].to(dtype)
    return got, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cannot multiply bfloat16 matrices
@pytest.mark.parametrize("num_programs", [1, 32])
def test_decode_attention_whole_and_split(num_programs, dtype):
    # The fourth item is padding: its request, row and position are nonsense.
    items = Items(ints(10, 11, 12, 99), ints(1, 1, 1, 1), ints(0, 1, 1, 77), ints(100, 0, 65, 10**6), ints(3), True)
    got, expected = attend(items, num_programs=num_programs, dtype=dtype)
    assert_close(got, expected, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2)])
def test_chunk_attention(heads, kv_heads):
    # A first chunk, one that goes on, and one of two tokens.
    items = Items(ints(10, 25, 41), ints(15, 16, 2), ints(0, 1, 0), ints(0, 60, 98), NO_LIMIT, False)
    got, expected = attend(items, num_programs=8, heads=heads, kv_heads=kv_heads)
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "num_programs"),
    [
        (6, 2, 24, torch.float32, 64),  # 8 splits; groups of 3 leave a row of the tile without a query
        (2, 2, 24, torch.float32, 16),  # 2
        (4, 1, 80, torch.float32, 128),  # 32, each of one block of 32 keys: some wholly beyond every item
        (6, 2, 24, torch.float16, 64),
    ],
)
def test_split_chunk_attention(heads, kv_heads, dim, dtype, num_programs):
    # A first chunk, which no split but the first has keys of; one whose first four queries see nothing of the split
    # from key 192 on; one of two tokens behind a long prefix; and padding.
    items = Items(ints(10, 25, 41, 99), ints(15, 16, 2, 7), ints(0, 1, 0, 77), ints(0, 188, 298, 10**6), ints(3), False)
    got, expected = attend(
        items, num_programs=num_programs, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, length=304
    )
    assert_close(got, expected, dtype)


def test_one_full_chunk_behind_a_prefix_is_the_same_in_any_number_of_splits():
    # 21 queries of 3 heads: all rows that a tile can have.
    items = Items(ints(12), ints(21), ints(1), ints(250), NO_LIMIT, False)
    for splits in (1, 2, 8, 32):
        got, expected = attend(items, num_programs=2 * splits, length=304)
        assert_close(got, expected, torch.float32)


def test_number_of_splits_fills_the_device_and_no_more():
    attention = make_attention(num_programs=264, heads=32, kv_heads=8, dim=128, max_rows=256)
    assert [attention.num_splits(n) for n in (1, 2, 8, 16, 17, 64, 256)] == [32, 16, 4, 2, 1, 1, 1]
    # A split of a chunk has four blocks of 64 keys or more.
    assert [attention.num_splits(1, keys) for keys in (1, 511, 512, 1100, 8192, 10**6)] == [1, 1, 2, 4, 32, 32]
    assert attention.num_splits(8, 10**6) == 4 and attention.num_splits(17, 10**6) == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (32, 32, 80), (64, 1, 128), (128, 1, 64)]
)
@pytest.mark.parametrize("num_programs", [4, 264])
def test_scratch_holds_every_split_and_is_small(heads, kv_heads, dim, num_programs):
    attention = make_attention(num_programs=num_programs, heads=heads, kv_heads=kv_heads, dim=dim, max_rows=64)
    rows = len(attention._scores)
    assert attention._partial.shape == (rows, dim)
    for num_items in range(1, 1000):
        splits = attention.num_splits(num_items)
        for max_items, queries in ((64, 1), (1000, attention.max_queries)):
            assert splits == 1 or num_items > max_items or num_items * splits * queries * heads <= rows
    tiles = num_programs * attention.tiles.chunk_rows
    assert rows <= max(tiles, heads * max(64, num_programs // kv_heads))


def test_lanes_know_the_most_keys_of_their_chunks():
    # Requests of 1, 40, 1, 3 and 2 tokens, behind 9, 0, 3, 500 and 20 others.
    counts, before = np.array([1, 40, 1, 3, 2]), np.array([9, 0, 3, 500, 20])
    start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(before, counts, strict=True)]).astype(np.int32)
    batch = SimpleNamespace(
        query_start=start, positions=positions, input_ids=positions, slots=np.arange(5, dtype=np.int32),
        logits_rows=start[1:] - 1, tokens=lambda first, last: slice(int(start[first]), int(start[last])),
        widths_of=lambda starts: None,
    )  # fmt: skip
    upload = Upload(1000, np.int32, DEVICE)
    inputs = StepInputs.send(batch, np.zeros((0, 2), np.int32), upload, 16, NO_LIMIT)
    for first, last, num_items, most in ((0, 5, 5, 503), (0, 3, 3, 40), (4, 5, 1, 22), (0, 1, 0, 0)):
        decode, chunks = inputs.lane(first, last).items
        assert (len(chunks), chunks.max_keys) == (num_items, most)
        assert decode.max_keys is None  # the number of their splits is that of recorded steps
