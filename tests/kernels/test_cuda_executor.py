"""The CUDA executor against the portable one, without a GPU: kernels interpreted, recorded steps called directly.

Everything but the recording itself runs: buckets and padding, both sides and the moves between them, block tables,
staging, drawing, steps that follow on the device.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from model_store.arrays import BFLOAT16, in_torch, to_numpy
from model_store.assembly import Elasticity
from model_store.int8 import Matrix, quantise
from model_store.loaded import LoadedPair
from model_store.lowrank import LowRankDelta, LowRankTerm
from server.config import Settings
from server.core.config import EngineConfig
from server.core.executor import GREEDY, Draw
from server.core.request import LiveRequest, Request, SamplingParams
from server.core.width import EXACT
from server.engine.engine import Engine
from server.engine.extras import lookahead
from server.kernels.cuda.executor import CudaExecutor, create
from server.loading import engine_config
from server.model import linear as portable_products
from server.model.executor import create_executor
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import FAMILIES, PAGE, assert_same_logits, make_pair, make_steps, quantised
from tests.kernels.test_codes import MIXED, all_of, densified, in_codes
from tests.kernels.test_nested import nested
from tests.kernels.test_widths import assert_same, dual, with_widths
from tests.model.test_widths_oracle import Dial

VOCAB = 61
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORDERS = {  # two stations of two layers each; in the last one the cut moves both ways
    "last_to_first": Elasticity.last_to_first(4, (0, 2)),
    "first_to_last": Elasticity.first_to_last(4, (0, 2)),
    "middle": Elasticity(6, (0, 2, 4), (6, 4, 5)),
}
SMALL = {"hidden_size": 24, "intermediate_size": 40, "head_dim": 16, "vocab_size": VOCAB}


def make_small(family: str = "qwen3", order: str = "last_to_first", dtype: torch.dtype = torch.float32) -> LoadedPair:
    is_grouped = FAMILIES[family].get("num_kv_heads", 2) == 2
    rotary_dim = FAMILIES[family].get("rotary_dim", SMALL["head_dim"])
    shape = SMALL | {"num_heads": 2, "num_kv_heads": 1 if is_grouped else 2, "rotary_dim": rotary_dim}
    return make_pair(family, dtype, ORDERS[order], **shape).in_torch(DEVICE)


def make_low_rank(order: str, *, is_int8: bool, dtype: torch.dtype = torch.float32) -> LoadedPair:
    """Student layers are differences of ranks of their own, but the last, which is the teacher's; ends are shared."""
    pair = make_small("llama", order, dtype)
    pair.ends["student"] = pair.ends["teacher"]
    generator, num_teacher = torch.Generator().manual_seed(3), pair.elasticity.num_teacher_layers
    *differing, last = range(len(pair.elasticity.kept))
    pair.layers[num_teacher + last] = pair.layers[pair.elasticity.kept[last]]

    def factor(rows: int, columns: int) -> Matrix:
        value = (0.2 * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype)
        return in_torch(quantise(to_numpy(value)), DEVICE) if is_int8 else value

    for index in differing:
        del pair.layers[num_teacher + index]
        base = pair.layers[pair.elasticity.kept[index]]
        terms = {}
        for name, parts in (("qkv", (32, 16, 16)), ("o", (24,)), ("up", (40, 40)), ("down", (24,))):
            width, stops = getattr(base, f"{name}_weight").shape[1], np.cumsum(parts).tolist()
            terms[name] = [
                LowRankTerm(stop - rows, stop, factor(3 + i, width), factor(rows, 3 + i))
                for i, (rows, stop) in enumerate(zip(parts, stops, strict=True))
            ]
        norms = [(1 + 0.3 * torch.randn(24, generator=generator)).to(DEVICE, dtype) for _ in range(2)]
        pair.low_rank[num_teacher + index] = LowRankDelta(pair.elasticity.kept[index], terms, *norms)
    return pair


def make_config(**changes) -> EngineConfig:
    values = {"page_size": PAGE, "max_model_len": 320, "max_num_seqs": 5, "max_num_batched_tokens": 64}
    return EngineConfig(**(values | {"executor": "cuda", "kv_cache_bytes": 1 << 20} | changes))


def check_steps(
    pair: LoadedPair, counts: list[list[int]], sizes: tuple[int, ...], plain: LoadedPair | None = None
) -> CudaExecutor:
    """`plain`: the same numbers for the portable executor, where it would compute otherwise."""
    portable, cuda = TorchExecutor(plain or pair, page_size=PAGE), create(pair, make_config())
    assert isinstance(cuda, CudaExecutor), cuda
    tolerance = 1e-4 if pair.ends["teacher"].final_norm_weight.dtype == torch.float32 else 0.02
    assert cuda.shared_stations == (pair.shared_stations if pair.low_rank else frozenset())
    steps = make_steps(pair.elasticity, counts, sizes, VOCAB, is_shared=bool(cuda.shared_stations))
    assert_same_logits(cuda, portable, steps, tolerance)
    return cuda


@pytest.mark.parametrize(("family", "what"), [("gemma3_text", "norms of what attention"), ("olmo2", "norms of what"),
                                              ("smollm3", "--max-model-len up to 37 is served")])  # fmt: skip
def test_what_no_kernel_computes_is_refused(family, what):
    assert what in create(make_pair(family, torch.float32), make_config())


def test_scales_and_layers_without_angles():
    pair = make_small("llama")
    scales = {"embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.7}
    pair.spec = replace(pair.spec, **scales)
    pair.layers[1].rope = pair.layers[4].rope = "none"
    check_steps(pair, [[3, 0, 5, 1], [1, 9, 1, 3], [1, 1, 1, 1], [0, 0, 1, 1]], sizes=(4, 3, 2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    # Whole prompts beside a first token, a chunk and decode rows together, decode of mixed sizes, of one size.
    check_steps(make_small(family), [[3, 0, 5, 1], [1, 9, 1, 3], [1, 1, 1, 1], [0, 0, 1, 1]], sizes=(4, 3, 2, 2))


@pytest.mark.parametrize(("order", "sizes"), [("first_to_last", (4, 3, 3, 2)), ("middle", (6, 5, 4, 3))])
def test_rows_change_sides_where_the_order_says(order, sizes):
    check_steps(make_small("llama", order), [[2, 2, 2, 2], [1, 1, 1, 1], [1, 0, 0, 1]], sizes)


def test_half_precision_and_chunks_of_several_items():
    pair = make_small("llama", dtype=torch.float16)  # the interpreter cannot multiply bfloat16 matrices
    check_steps(pair, [[0, 3, 1, 0], [70, 1, 0, 0], [1, 1, 1, 0]], sizes=(4, 3, 2, 2))


# Every order, and both kinds of factors; int8 and the order in the middle meet in half precision below.
@pytest.mark.parametrize(
    ("order", "sizes", "is_int8"),
    [("last_to_first", (4, 3, 2, 2), True), ("first_to_last", (4, 3, 3, 2), False), ("middle", (6, 5, 4, 3), False)],
)
def test_students_kept_as_differences(order, sizes, is_int8):
    # Prompts and decode rows of both sides together, decode of mixed sizes, of one size, of the student alone.
    pair = make_low_rank(order, is_int8=is_int8)
    if is_int8:
        quantised(pair)
    steps = [[3, 0, 5, 1], [1, 9, 1, 3], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    check_steps(pair, steps, sizes)
    storages = {t.untyped_storage().data_ptr() for delta in pair.low_rank.values() for t in delta.tensors()}
    # Stacked in place of the plain ones: by group one of a and one of b (and their scales), two norms of a layer.
    assert len(storages) == len(pair.low_rank) * (4 * (4 if is_int8 else 2) + 2)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_int8_weights(family):
    pair = quantised(make_small(family))
    assert "int8 weights" in create(pair, make_config()).describe()
    check_steps(pair, [[3, 0, 5, 1], [1, 9, 1, 3], [1, 1, 1, 1]], sizes=(4, 3, 2, 2))


def test_half_precision_int8_and_differences():
    pair = quantised(make_low_rank("middle", is_int8=True, dtype=torch.float16))
    check_steps(pair, [[3, 0, 5, 1], [1, 1, 1, 1]], sizes=(6, 5, 4, 3))


IN_CODES = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
IN_K_QUANTS = IN_CODES | {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "head_dim": 64}


def make_wide(family: str = "llama", shape: dict = IN_CODES) -> LoadedPair:
    """With rows of whole groups, so that every matrix can be in codes."""
    return make_pair(family, torch.float32, ORDERS["last_to_first"], **shape)


@pytest.mark.parametrize(
    ("family", "types", "shape", "bits"),
    [("llama", MIXED, IN_K_QUANTS, 5.29), ("qwen2", all_of("Q4_1"), IN_CODES, 5.0)],
)
def test_codes_of_a_file(family, types, shape, bits):
    """As they are, against the dequantised model in float32: several types in a matrix, biases, the embedding too."""
    pair, plain = (in_codes(make_wide(family, shape), types) for _ in range(2))
    cuda = check_steps(pair, [[3, 0, 5, 1], [1, 9, 1, 3], [0, 0, 0, 1]], (4, 3, 2, 2), densified(plain))
    assert "weights in codes (qkv" in cuda.describe() and 8 * cuda.bytes_per_weight == pytest.approx(bits, abs=0.01)


def test_nested_codes_at_one_width():
    pair, plain = (nested(make_wide(), 5) for _ in range(2))
    cuda = check_steps(pair, [[3, 0, 5, 1], [1, 1, 1, 1]], (4, 3, 2, 2), densified(plain))
    assert cuda.bytes_per_weight == (5 + 0.75) / 8


@pytest.fixture
def unrounded(monkeypatch):
    """The portable executor rounds activations to eight bits where it multiplies codes; the kernels here do not."""
    monkeypatch.setattr(portable_products, "round_activations", lambda x: x.float())


@pytest.mark.parametrize("keeps_exact", [True, False])
def test_rows_of_several_widths(keeps_exact, unrounded):
    """Mixed and alone, prompts and decode, of both sides; a file's codes as the exact form, or nested codes alone."""
    pair, plain = (dual(in_codes(make_wide(), all_of("Q4_0")), keeps_exact) for _ in range(2))
    cuda, portable = create(pair, make_config()), TorchExecutor(plain, page_size=PAGE)
    widths, counts = portable.widths, [[3, 0, 5, 1], [1, 9, 1, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    steps = make_steps(portable.elasticity, counts, (4, 3, 2, 2), VOCAB)
    mixed = [with_widths(batch, widths, turn) for turn, batch in enumerate(steps[:3])]
    assert_same(cuda, portable, [*mixed, replace(steps[3], widths=np.full(4, 5, np.uint8))], 1e-4)
    bits = [8 * cuda.bytes_per_weight_at(width) for width in cuda.widths]
    assert cuda.widths == widths and bits[:4] == sorted(bits[:4])
    assert 4.75 < bits[0] < 5 and bits[3] == 8.75 and (bits[-1] == 4.5) == keeps_exact


def test_widths_that_change_while_steps_run_ahead(unrounded, monkeypatch):
    """Rows keep their places as widths change, and are sorted anew as one ends: every token is its own request's."""
    monkeypatch.setattr(lookahead, "_MAX_RUN", 1)
    limits, counts = [(4, EXACT), (8, 8), (6, 6)], [5, 5, 4]

    def answers(executor: str, policies: list[Dial], groups: list[list[int]]) -> list[LiveRequest]:
        found = []
        for policy, group in zip(policies, groups, strict=True):
            engine = Engine(dual(make_wide()), make_config(executor=executor, max_model_len=64), policy=policy)
            requests = [
                LiveRequest(Request(
                    f"r{i}", [7 * i + 3, i, 11], SamplingParams(max_tokens=counts[i], temperature=0.0, ignore_eos=True),
                    sizes=(4,), min_width=limits[i][0], max_width=limits[i][1],
                )) for i in group
            ]  # fmt: skip
            for request in requests:
                engine.add(request)
            while engine.has_work:
                engine.step()
            assert engine.num_step_failures == 0 and (executor != "cuda" or engine.lookahead.num_ahead > 0)
            found += requests
        return found

    together = answers("cuda", [Dial((EXACT, EXACT, 4))], [[0, 1, 2]])
    read = []
    for request, count in zip(together, counts, strict=True):
        starts = np.searchsorted([start for _, start in request.widths], np.arange(count), side="right") - 1
        read.append(tuple(request.widths[i][0] for i in starts))
    assert {*read[0]} == {EXACT, 4} and {*read[1], *read[2]} == {8, 6}
    alone = answers("torch", [Dial(widths) for widths in read], [[0], [1], [2]])
    for request, expected in zip(together, alone, strict=True):
        assert request.output_token_ids == expected.output_token_ids


def test_launched_steps_follow_each_other_without_the_host():
    pair = make_small("llama")
    sizes, num_steps = (4, 3, 2), 2
    prompt, *steps = make_steps(pair.elasticity, [[4, 2, 3]] + num_steps * [[1, 1, 1]], sizes, VOCAB)
    draws = [GREEDY, Draw(0.9, 0.9, 0.0, 0, 0.3), Draw(1.2, 1.0, 0.1, 0, 0.6)]
    chains = []
    for on_device in (False, True):
        executor = create(pair, make_config())
        executor.allocate_kv(prompt.block_tables.size)
        hidden = executor.forward(prompt)
        drawn = executor.draw(executor.logits(hidden, int(prompt.logits_start[prompt.head_cut])), draws)
        chain = [drawn]
        last = None
        for step in steps:
            follows = (last, np.arange(3, dtype=np.int32)) if on_device and last else None
            ids = np.array(chain[-1] if follows is None else [0, 0, 0], np.int32)
            last = executor.launch(replace(step, input_ids=ids), draws, follows=follows)
            chain.append(last.wait())
        chains.append(chain)
    assert chains[0] == chains[1]
    assert len({tuple(tokens) for tokens in chains[0]}) > 1


def run_engine(executor: str, pair: LoadedPair, **changes) -> tuple[Engine, list[list[int]]]:
    """Requests of all sizes, greedy and seeded, some with a common prefix, in a pool so small that they preempt."""
    page_bytes = TorchExecutor(pair, page_size=PAGE).page_bytes()
    engine = Engine(pair, make_config(
        executor=executor, max_model_len=64, max_num_seqs=3, max_num_batched_tokens=12, kv_cache_bytes=19 * page_bytes,
        **changes,
    ))  # fmt: skip
    rng = random.Random(0)
    shared = [rng.randrange(VOCAB) for _ in range(10)]
    settings = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 1, "top_p": 0.9}, {"temperature": 1.1, "seed": 2}]
    requests = [
        Request(f"r{i}", [*shared, i], SamplingParams(max_tokens=7, ignore_eos=True, **setting), sizes=(2 + i,))
        for i, setting in enumerate(settings)
    ]
    requests = [engine.add_request(request) for request in requests]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return engine, [request.output_token_ids for request in requests]


@pytest.mark.parametrize("kind", ["plain", "int8 difference"])
def test_same_text_through_the_engine(kind):
    pair = make_small("llama") if kind == "plain" else quantised(make_low_rank("last_to_first", is_int8=True))
    engine, texts = run_engine("cuda", pair)
    assert engine.executor.name == "cuda" and engine.scheduler.num_preemptions > 0 and engine.lookahead.num_ahead > 0
    assert texts == run_engine("torch", pair)[1]


def test_guesses_are_rows_and_change_no_text():
    pair = make_small("llama")
    engine, texts = run_engine("cuda", pair, speculative_size=2)
    assert engine.executor.name == "cuda" and sum(engine.speculator.stats.drafts.values()) > 0
    assert texts == run_engine("torch", pair)[1]


def test_passed_over_with_reasons(caplog):
    pair = make_pair("llama", torch.float32)
    caplog.set_level("INFO", "server.model.executor")
    assert create_executor(pair, make_config(executor="auto")).name != "cuda"
    assert "cuda: runs on cuda only" in caplog.text
    pair = make_low_rank("middle", is_int8=False)
    first = min(pair.low_rank)
    del pair.low_rank[first]
    pair.layers[first] = make_small("llama", "middle").layers[first]
    with pytest.raises(ValueError, match=r"cuda: runs students kept as differences only.*native: not asked for"):
        create_executor(pair, make_config())


def test_kv_cache_that_does_not_fit_names_the_settings(monkeypatch):
    executor = create(make_small(), make_config())

    def refuse(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(executor._layers, "allocate", refuse)
    with pytest.raises(ValueError, match=r"--kv-cache-memory.*--gpu-memory-utilization"):
        executor.allocate_kv(10)


def test_kv_cache_is_what_utilization_leaves_beside_weights_and_workspace(monkeypatch):
    pair = make_small()
    pair.spec = replace(pair.spec, max_position_embeddings=10**6)
    GiB = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GiB, 80 * GiB))
    settings = Settings(max_model_len=10**6, max_num_seqs=256)  # more KV than there is memory
    some = engine_config(settings, pair, BFLOAT16, "cuda").kv_cache_bytes
    # 20 GiB are in use and 8 stay free; the estimate of the workspace is what is missing.
    assert 50 * GiB < some < 52 * GiB - (512 << 20)
    less = engine_config(
        settings.model_copy(update={"gpu_memory_utilization": 0.5}), pair, BFLOAT16, "cuda"
    ).kv_cache_bytes
    assert some - less == 32 * GiB
    with pytest.raises(ValueError, match="--gpu-memory-utilization"):
        engine_config(settings.model_copy(update={"gpu_memory_utilization": 0.25}), pair, BFLOAT16, "cuda")
