"""Every Triton kernel against plain torch (interpreted where there is no GPU), and all of them compiled for Hopper."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model_store.arrays import in_torch, to_numpy
from model_store.int8 import Int8Matrix, dense, quantise
from model_store.lowrank import LowRankTerm
from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.sampler import Sampler
from server.kernels.cuda.activation import activate
from server.kernels.cuda.draw import draw
from server.kernels.cuda.graphs import Graphs, bucket_of, buckets
from server.kernels.cuda.linear import Factors, add_linear, add_low_rank, linear
from server.kernels.cuda.norm import norm
from server.kernels.cuda.rotary import rotate_and_write
from server.kernels.cuda.staging import Download, Upload
from server.kernels.cuda.tables import DeviceTables
from server.model import decoder_layer
from tests.kernels.tensors import DEVICE, TOLERANCE, assert_close, ints, randn


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind, dtype):
    x, weight = randn(19, 70, dtype=dtype), randn(70, dtype=dtype, around=1.0)
    bias = randn(70, dtype=dtype) if kind == "layer" else None
    spec = SimpleNamespace(norm=kind, norm_eps=1e-5, norm_offset=0.0)
    expected = decoder_layer.norm(x.float(), weight.float(), None if bias is None else bias.float(), spec)
    assert_close(norm(x, weight, bias, kind=kind, eps=1e-5), expected, dtype)


def test_norm_with_two_weights():
    x, weight, other = randn(19, 70), randn(70, around=1.0), randn(70, around=2.0)
    for split in (0, 7, 19):
        got = norm(x, weight, None, kind="rms", eps=1e-5, other=other, split=ints(split))
        expected = norm(x, weight, None, kind="rms", eps=1e-5)
        expected[split:] = norm(x[split:].contiguous(), other, None, kind="rms", eps=1e-5)
        assert torch.equal(got, expected)


def quantised(matrix: torch.Tensor) -> Int8Matrix:
    return in_torch(quantise(to_numpy(matrix)), DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 19, 130])
def test_int8_products(num_rows, dtype):
    x, weight, bias = randn(num_rows, 150, dtype=dtype), quantised(randn(70, 150)), randn(70, dtype=dtype)
    expected = x.float() @ weight.dense(torch.float32).t()
    assert_close(linear(x, weight, bias), expected + bias, dtype)
    out = randn(num_rows, 70, dtype=dtype)
    expected = out.float() + expected
    add_linear(out, x, weight, None)
    assert_close(out, expected, dtype)
    assert linear(x[:0], weight).shape == (0, 70)


@pytest.mark.parametrize("is_int8", [False, True])
def test_low_rank_terms(is_int8):
    """Three terms of different ranks, the first wider than a program; rows before the split stay as they are."""
    store = quantised if is_int8 else torch.Tensor.clone
    spans = [(0, 130, 5), (130, 150, 17), (150, 160, 3)]
    terms = [LowRankTerm(start, stop, store(randn(r, 70)), store(randn(stop - start, r))) for start, stop, r in spans]
    plain = [(dense(term.a, torch.float32), dense(term.b, torch.float32)) for term in terms]
    factors = Factors.of(terms, torch.float32)
    for term, (a, b) in zip(terms, plain, strict=True):  # now views of what was stacked
        assert torch.equal(dense(term.a, torch.float32), a) and torch.equal(dense(term.b, torch.float32), b)
    x, out = randn(40, 70), randn(40, 160)
    for split in (0, 1, 33, 40):
        expected = out.clone()
        for (start, stop, _), (a, b) in zip(spans, plain, strict=True):
            expected[split:, start:stop] += x[split:] @ a.t() @ b.t()
        got = out.clone()
        add_low_rank(got, x, factors, ints(split))
        assert_close(got, expected, torch.float32)
        assert torch.equal(got[:split], out[:split])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activation(kind, dtype):
    up = 3 * randn(5, 138, dtype=dtype)
    apply = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[kind]
    gate, rest = up.float().chunk(2, dim=-1)
    assert_close(activate(up, kind=kind, is_gated=True), apply(gate) * rest, dtype)
    assert_close(activate(up, kind=kind, is_gated=False), apply(up.float()), dtype)


@pytest.mark.parametrize(
    ("rotary_dim", "has_norm", "dtype"),
    [(20, True, torch.float32), (6, False, torch.float32), (0, False, torch.float32), (20, True, torch.bfloat16)],
)
def test_rotary_norm_and_pages(rotary_dim, has_norm, dtype):
    heads, kv_heads, dim, page, tokens, count = 3, 1, 20, 4, 5, 4
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    weights = [randn(dim, dtype=dtype, around=1.0), randn(dim, dtype=dtype, around=2.0)] if has_norm else [None, None]
    pages = [torch.zeros(6, kv_heads, page, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    table, positions, slots = ints([3, 0], [5, 1]), ints(2, 3, 4, 1, 6), ints(0, 0, 0, 1, 1)
    angles = torch.outer(torch.arange(8), 1.0 / 10 ** (torch.arange(max(rotary_dim // 2, 1)) / 3)).to(DEVICE)
    got = rotate_and_write(
        qkv, *pages, table, positions, slots, ints(count), angles.cos(), angles.sin(), rotary_dim=rotary_dim,
        num_heads=heads, q_norm=weights[0], k_norm=weights[1], eps=1e-5,
    )  # fmt: skip
    q, k, v = qkv.float().view(tokens, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    if has_norm:
        spec = SimpleNamespace(norm="rms", norm_eps=1e-5, norm_offset=0.0)
        q, k = (decoder_layer.norm(x, w.float(), None, spec) for x, w in zip((q, k), weights, strict=True))
    if rotary_dim:
        turns = torch.cat((angles, angles), dim=-1)[positions.long(), None]
        q, k = (decoder_layer.rotate(x, turns.cos(), turns.sin()) for x in (q, k))
    assert_close(got[:count], q[:count], dtype)
    expected = [torch.zeros_like(pages[0]) for _ in range(2)]
    for token in range(count):  # the row beyond is padding and leaves no trace
        position = int(positions[token])
        where = int(table[int(slots[token]), position // page])
        expected[0][where, :, position % page] = k[token].to(dtype)
        expected[1][where, :, position % page] = v[token].to(dtype)
    for written, wanted in zip(pages, expected, strict=True):
        assert_close(written, wanted, dtype)


def make_draws(num_rows: int) -> list[LiveRequest]:
    rng = random.Random(5)
    return [
        LiveRequest(Request(f"r{i}", [1], SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]), top_p=rng.choice([1.0, 0.9, 0.4]), top_k=rng.choice([0, 0, 1, 7]),
            min_p=rng.choice([0.0, 0.05]), seed=i,
        ), sizes=(1,))) for i in range(num_rows)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_like_the_sampler(dtype):
    logits = (3 * randn(16, 1200)).to(dtype)
    requests, settings = make_draws(len(logits)), []
    expected = [token.token_id for token in Sampler().sample(to_numpy(logits.float()), requests)]
    for request in requests:
        request.sampler_state = None
    Sampler(draw=lambda _, draws: settings.extend(draws) or [0] * len(draws)).sample(to_numpy(logits.float()), requests)
    tokens = torch.zeros(len(logits), dtype=torch.int32, device=DEVICE)
    draw(logits, torch.tensor(settings, dtype=torch.float64, device=DEVICE).T.contiguous(), tokens)
    for row, (got, wanted) in enumerate(zip(tokens.tolist(), expected, strict=True)):
        assert got == wanted, settings[row]


def test_draw_matches_the_distribution_and_reports_rows_without_numbers():
    num, rng = 60, random.Random(1)  # interpreted, a row takes some 30 ms
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf, 2.0]], device=DEVICE, dtype=torch.bfloat16).repeat(num + 2, 1)
    logits[num], logits[num + 1] = torch.nan, -torch.inf
    settings = torch.zeros(5, num + 2, dtype=torch.float64, device=DEVICE)
    settings[0], settings[1] = 1.0, 0.8
    settings[4, :num] = torch.tensor([rng.random() for _ in range(num)], dtype=torch.float64)
    tokens = torch.zeros(num + 2, dtype=torch.int32, device=DEVICE)
    draw(logits, settings, tokens)
    # Mass by rank: 0.39, 0.39, 0.14, ...: 0.8 is reached with the third.
    probabilities = torch.softmax(logits[0].double(), dim=0)[[1, 4, 2]].cpu()
    expected = probabilities / probabilities.sum() * num
    counts = torch.bincount(tokens[:num], minlength=5)[[1, 4, 2]].cpu()
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all() and int(counts.sum()) == num
    assert tokens[num:].tolist() == [-1, -1]


def test_block_tables_send_only_what_changed():
    tables = DeviceTables(num_layers=3, num_slots=2, num_blocks=4, device=DEVICE)
    host = np.arange(24, dtype=np.int32).reshape(3, 2, 4) + 100
    request = SimpleNamespace(blocks=[object(), object()], path=SimpleNamespace(layers=(0, 2)))

    def send(context: int) -> int:
        batch = SimpleNamespace(
            requests=[request], slots=np.array([1]), context_lens=np.array([context]), block_tables=host
        )
        changes = tables.changes(batch, page_size=8)
        tables.apply(torch.from_numpy(changes).to(DEVICE))
        return len(changes)

    assert send(9) == 4 and send(10) == 0  # two blocks on two layers, then nothing new
    request.blocks.append(object())
    assert send(17) == 2
    assert tables.tables[[0, 2], 1, :3].tolist() == host[[0, 2], 1, :3].tolist() and not tables.tables[1].any()
    request.blocks = list(request.blocks)  # preempted or changed size: new pages in the same places
    host += 50
    assert send(17) == 6
    assert tables.tables[[0, 2], 1, :3].tolist() == host[[0, 2], 1, :3].tolist()


def test_staging_grows_and_keeps_what_was_sent():
    upload = Upload(4, np.int32, DEVICE)
    first = upload.send([np.arange(3)])[0].tolist()
    a, b = upload.send([np.arange(6).reshape(2, 3), np.array([7])])
    assert first == [0, 1, 2] and a.tolist() == [[0, 1, 2], [3, 4, 5]] and b.tolist() == [7]
    assert Download(b).wait() == [7]


def test_buckets_and_direct_calls_without_graphs():
    assert buckets(1) == [1] and buckets(5) == [1, 2, 4, 5]
    assert buckets(256)[-1] == 256 and len(buckets(256)) < 24
    assert [bucket_of(n, buckets(40)) for n in (1, 3, 9, 33, 40)] == [1, 4, 16, 40, 40]
    calls = []
    graphs = Graphs(DEVICE, enabled=False)
    for _ in range(2):
        graphs.run("key", lambda: calls.append(1))
    assert calls == [1, 1] and len(graphs) == 0


def compiled(*arguments: str) -> list[dict]:
    """In a process of its own: here the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "server.kernels.cuda.compile", "--json", "--shapes", "qwen3-4b", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_hopper_without_spilling():
    rows = compiled()
    assert len(rows) > 15
    wanted = {"chunk attention, any splits"} | {f"chunk, reduce {splits} splits" for splits in (2, 4, 8, 16, 32)}
    assert wanted <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= (99 if "codes" in row["kernel"] else 227) * 1024, row


def test_no_warp_repeats_another_ones_unpacking_where_there_is_no_wgmma():
    """The largest tile of codes; with codes to the right it takes 44 instructions a weight and spills: `Tiles` says
    why."""
    (row,) = compiled("--capability", "89", "--kernels", "Q4_K product, 256 rows")
    assert row["spilled"] == 0 and row["shared"] <= 99 * 1024 and row["each"] < 12, row
