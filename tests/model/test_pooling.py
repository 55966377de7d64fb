"""Pooled states against the model assembled in transformers: every family and size, mixed with others, in chunks."""

import random

import numpy as np
import pytest
import torch

from server.core.request import RequestOutput
from server.engine.pooling import PooledStates
from tests.model.test_oracle import executor, family, make_engine, make_request, open_order, run  # noqa: F401 - fixtures
from tests.tiny_pairs import VOCAB


def expected(oracle, elasticity, size, prompt) -> np.ndarray:
    """The mean of what the head would read."""
    model = oracle.model(elasticity, size)
    with torch.no_grad():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
    return states[0].mean(dim=0).numpy()


def test_means_of_every_size(family, executor):  # noqa: F811
    teacher, student, oracle = family
    pair = open_order(teacher, student, "last_to_first")
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(40)]  # in the prefix cache once somebody has computed it
    engine = make_engine(pair, executor)
    run(engine, [make_request(f"cached{size}", shared, size) for size in pair.elasticity.sizes])
    lengths = [1, 2, 7, 24, 25, 60, 90, 33, 5]
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths] + [[*shared, 7]] * 3
    pooled = [
        make_request(f"p{i}", prompt, pair.elasticity.sizes[i % 3], max_tokens=0, pool=True)
        for i, prompt in enumerate(prompts)
    ]
    others = [make_request(f"o{i}", prompts[3 * i], pair.elasticity.sizes[i], logprobs=2) for i in range(3)]
    scored = [make_request(f"s{i}", prompts[4], pair.elasticity.sizes[i], prompt_logprobs=1) for i in range(2)]
    mixed = [request for trio in zip(pooled[::4], pooled[1::4], others, strict=True) for request in trio]
    outputs = run(engine, mixed + scored + pooled[2::4] + pooled[3::4])
    for request in pooled:
        last = outputs[request.request_id][-1]
        assert last.finish_reason == "length" and not request.output_token_ids
        want = expected(oracle, pair.elasticity, request.sizes[0], request.prompt_token_ids)
        assert np.abs(last.pooled - want).max() < 1e-4 * max(np.abs(want).max(), 1.0)
    assert all(output.pooled is None for request in others + scored for output in outputs[request.request_id])
    alone = run(
        make_engine(pair, executor), [make_request(r.request_id, r.prompt_token_ids, r.sizes[0]) for r in others]
    )
    assert [o.new_token_ids for r in others for o in outputs[r.request_id] if o.new_token_ids] == [
        o.new_token_ids for r in others for o in alone[r.request_id] if o.new_token_ids
    ]
    assert not engine.runner.pooled_states._sums


class _Batch:
    """What `gather` reads of a batch: one request with all rows of a chunk."""

    def __init__(self, request, rows):
        self.requests, self.logits_start = [request], np.array([0, rows])


def test_a_chunk_that_is_computed_again_counts_once_and_nan_is_a_fault():
    request = make_request("again", range(6), 4, max_tokens=0, pool=True)
    states, rows = PooledStates(), np.arange(12, dtype=np.float32).reshape(6, 2)
    for begin, end in ((0, 4), (0, 4), (4, 6), (0, 2), (2, 6), (2, 6)):  # a failed step, then a preemption
        request.num_computed_tokens = begin
        assert not states.gather(_Batch(request, end - begin), rows[begin:end])
    output = RequestOutput("again", finish_reason="length")
    states.attach([output], [(request, 6)])
    assert output.pooled.tolist() == [5.0, 6.0]
    request.num_computed_tokens = 0
    assert states.gather(_Batch(request, 6), rows * np.nan) == [request]


@pytest.mark.parametrize("pages", [26])
def test_preempted_prompts_have_the_same_means(family, pages):  # noqa: F811
    teacher, student, oracle = family
    pair = open_order(teacher, student, "last_to_first")
    engine = make_engine(pair, "torch")
    engine = make_engine(pair, "torch", kv_cache_bytes=pages * engine.executor.page_bytes())
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(4)]
    requests = [make_request(f"d{i}", prompts[i], 4, max_tokens=12) for i in range(2)]
    requests += [make_request(f"p{i}", prompts[i], 4, max_tokens=0, pool=True) for i in range(2, 4)]
    outputs = run(engine, requests)
    assert engine.scheduler.num_preemptions
    for request in requests[2:]:
        want = expected(oracle, pair.elasticity, 4, request.prompt_token_ids)
        assert np.abs(outputs[request.request_id][-1].pooled - want).max() < 1e-4 * max(np.abs(want).max(), 1.0)
