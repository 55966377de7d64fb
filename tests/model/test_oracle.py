"""Every size of every family against the model assembled in transformers: alone, mixed, chunked, cached, preempted."""

import random

import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.engine import Engine
from server.kernels.cpu import library
from tests.tiny_pairs import FAMILIES, VOCAB, Oracle, make_pair

ORDERS = ("last_to_first", "first_to_last", "mixed")
# Nested, neither from the front nor from the back, and the one-layer last station follows a block far from it.
MIXED_THRESHOLDS = [6, 5, 6, 5]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    teacher, student = make_pair(tmp_path_factory.mktemp(request.param), request.param)
    return teacher, student, Oracle(teacher, student)


@pytest.fixture(params=["torch", "native"])
def executor(request):
    """The native one in its best variant: tests/kernels compares all of them with the portable one, by family."""
    if request.param == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    return request.param


def open_order(teacher, student, order):
    if order == "mixed":
        return open_pair(teacher, student, thresholds=MIXED_THRESHOLDS)
    return open_pair(teacher, student, patch_order=order)


def make_engine(pair, executor, dtype=torch.float32, loaded=None, metrics=None, **changes) -> Engine:
    values = {"max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 24, "page_size": 8}
    config = EngineConfig(**(values | {"kv_cache_bytes": 4 << 20, "executor": executor} | changes))
    return Engine(loaded or pair.load(WeightForm(dtype)), config, metrics=metrics)


def run(engine: Engine, requests: list[LiveRequest], check: bool = True) -> dict[str, list]:
    outputs = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        if check:
            engine.check_integrity()
    return outputs


def make_request(name, prompt, size, **sampling) -> LiveRequest:
    values = {"max_tokens": 6, "temperature": 0, "ignore_eos": True} | sampling
    return LiveRequest(Request(name, list(prompt), SamplingParams(**values), sizes=(size,)))


def all_logprobs(outputs) -> torch.Tensor:
    """[positions 1.., vocabulary] of prompt and output, from the `-1 = all` logprobs."""
    prompt = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
    scores = (prompt[0][1:] if prompt else []) + [s for o in outputs for s in (o.new_logprobs or [])]
    rows = torch.empty(len(scores), VOCAB)
    for row, score in zip(rows, scores, strict=True):
        ids, values = zip(*score.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows


@pytest.mark.parametrize("order", ORDERS)
def test_every_size_alone_and_in_a_mixed_batch(family, order, executor):
    teacher, student, oracle = family
    pair = open_order(teacher, student, order)
    assert pair.elasticity.sizes == (4, 5, 6)
    engine = make_engine(pair, executor)
    rng = random.Random(0)
    requests = []
    for i in range(9):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 8, 9, 40]))]
        requests.append(make_request(f"r{i}", prompt, pair.elasticity.sizes[i % 3], logprobs=-1, prompt_logprobs=-1))
    outputs = run(engine, requests)
    for request in requests:
        size = request.sizes[0]
        prompt, answer = request.prompt_token_ids, request.output_token_ids
        expected = oracle.greedy(pair.elasticity, size, prompt, 6, answer)
        assert request.output_token_ids == expected, f"{order} {size}L"
        text = request.prompt_token_ids + expected
        reference = torch.log_softmax(oracle.logits(pair.elasticity, size, text)[:-1], -1)
        measured = all_logprobs(outputs[request.request_id])
        scale = reference.abs().clamp(min=1.0)
        assert ((measured - reference).abs() / scale).max() < 1e-4
    for request in requests[:3]:  # alone
        again = make_request("alone", request.prompt_token_ids, request.sizes[0])
        run(engine, [again])
        assert again.output_token_ids == request.output_token_ids


def test_prefix_hits_and_preemption_change_nothing(family, executor):
    teacher, student, oracle = family
    pair = open_order(teacher, student, "last_to_first")
    # Room for about two whole requests: the others preempt each other.
    page_bytes = make_engine(pair, executor).executor.page_bytes()
    engine = make_engine(pair, executor, kv_cache_bytes=96 * page_bytes)
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    requests = [
        make_request(f"p{i}", shared + [rng.randrange(VOCAB) for _ in range(i)], 4 + i % 3, max_tokens=30)
        for i in range(7)
    ]
    for wave in (requests[:4], requests[4:]):
        run(engine, wave)
    assert engine.scheduler.num_preemptions > 0 and engine.kv_cache.prefix_hits > 0
    for request in requests:
        prompt, answer = request.prompt_token_ids, request.output_token_ids
        assert answer == oracle.greedy(pair.elasticity, request.sizes[0], prompt, 30, answer)


def test_published_counting_and_ends(family):
    teacher, student, _ = family
    last = open_order(teacher, student, "last_to_first").elasticity
    first = open_order(teacher, student, "first_to_last").elasticity
    assert last.sizes == (4, 5, 6)
    # Blocks of the teacher are {0, 1}, {2, 3} and two of one layer, which ride along with {2, 3} or with the full size.
    one = last.path(5)
    assert one.layers == (6, 2, 3, 4, 5)
    assert (one.embed_from, one.norm_from, one.head_from) == ("student", "teacher", "teacher")
    one = first.path(5)
    assert one.layers == (0, 1, 7, 8, 9)
    assert (one.embed_from, one.norm_from, one.head_from) == ("teacher", "student", "student")


def test_long_prompts_in_one_step(family, executor):
    """Enough rows for the kernels that only pay with many of them, and contexts of several attention blocks."""
    teacher, student, oracle = family
    pair = open_order(teacher, student, "last_to_first")
    engine = make_engine(pair, executor, max_model_len=256, max_num_batched_tokens=1024, kv_cache_bytes=16 << 20)
    rng = random.Random(2)
    requests = [
        make_request(f"l{i}", [rng.randrange(VOCAB) for _ in range(length)], size, max_tokens=2, prompt_logprobs=-1)
        for i, (length, size) in enumerate(((250, 6), (131, 5), (97, 4), (1, 5)))
    ]
    outputs = run(engine, requests)
    for request in requests:
        text = request.prompt_token_ids
        reference = torch.log_softmax(oracle.logits(pair.elasticity, request.sizes[0], text)[:-1], -1)
        measured = all_logprobs(outputs[request.request_id])
        assert ((measured - reference).abs() <= 1e-4 * reference.abs().clamp(min=1.0)).all()


def test_bfloat16_stays_close(family, executor):
    teacher, student, oracle = family
    pair = open_order(teacher, student, "last_to_first")
    engine = make_engine(pair, executor, torch.bfloat16, max_model_len=256, max_num_batched_tokens=1024)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (120, 30)]
    requests = [
        make_request(f"b{i}", prompt, size, max_tokens=1, prompt_logprobs=-1)
        for i, (prompt, size) in enumerate((prompt, size) for prompt in prompts for size in pair.elasticity.sizes)
    ]
    outputs = run(engine, requests)
    for request in requests:
        reference = oracle.logits(pair.elasticity, request.sizes[0], request.prompt_token_ids)[:-1]
        measured = all_logprobs(outputs[request.request_id])
        measured, reference = (x - x.mean(-1, keepdim=True) for x in (measured, reference))
        assert torch.cosine_similarity(measured, reference).min() > 0.99
