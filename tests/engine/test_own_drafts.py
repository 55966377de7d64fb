"""Guesses at fewer bits on a request's own layers and KV: text and scores are those without, to the last bit."""

import random

import pytest
import torch

from server.core.config import EngineConfig
from server.core.request import LiveRequest, Request, SamplingParams
from server.core.width import EXACT
from server.engine.engine import Engine
from server.kernels.cpu import library
from tests.kernels.steps import make_pair
from tests.kernels.test_codes import SHAPE
from tests.kernels.test_widths import dual
from tests.model.test_oracle import run

VOCAB = 331


def make_engine(executor="native", **changes):
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    pair = make_pair("llama", torch.bfloat16 if executor == "native" else torch.float32, **SHAPE)
    for layer in pair.layers.values():  # layers that add little, as those of a trained model do
        layer.o_weight *= layer.o_weight.dtype.type(0.6)
        layer.down_weight *= layer.down_weight.dtype.type(0.6)
    values = {"max_model_len": 160, "page_size": 32, "kv_cache_bytes": 64 << 20, "max_num_batched_tokens": 64}
    return Engine(dual(pair), EngineConfig(executor=executor, **values | changes))


def make_request(name, prompt, size, low=EXACT, high=EXACT, **sampling):
    values = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True} | sampling
    return LiveRequest(Request(name, prompt, SamplingParams(**values), sizes=(size,), min_width=low, max_width=high))


def prompts(count, lengths=(1, 9, 31, 70)):
    rng = random.Random(1)
    return [[rng.randrange(VOCAB) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


def scores(engine, requests):
    """Tokens and the logprobs of the likeliest, by request."""
    outputs = run(engine, requests)
    steps = [[output for output in outputs[r.request_id] if output.new_token_ids] for r in requests]
    return [[(o.new_token_ids, [(s.logprob, s.top) for s in o.new_logprobs]) for o in own] for own in steps]


@pytest.mark.parametrize("changes", [{"speculative_width": 4}, {"speculative_size": 4, "speculative_width": 4}])
def test_scores_are_the_same_to_the_last_bit(changes):
    """One at a time, so that nothing but guesses is beside a row; a step with guesses multiplies other row counts."""
    plain, fast = make_engine(), make_engine(**changes)
    for i, prompt in enumerate(prompts(4)):
        made = [make_request(f"r{i}", prompt, 6, logprobs=3) for _ in range(2)]
        without, with_guesses = scores(plain, made[:1]), scores(fast, made[1:])
        assert without == with_guesses and len(without[0]) == 40
    stats = fast.speculator.stats
    assert 0 < sum(stats.accepted[6]) < stats.draft_tokens[6]
    assert fast.kv_cache.num_free_pages == fast.kv_cache.num_pages and not fast.speculator.pool.drafts


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_every_size_guesses_for_itself_among_others(executor):
    """Mixed sizes and widths, chunked prompts, prefix hits: those that read more than the guesses do are guessed."""
    # What torch rounds otherwise beside other rows, rounded activations make large: floats and exact weights there.
    widths = (EXACT, 8, 4) if executor == "native" else (EXACT, EXACT, EXACT)
    points = [(size, width) for width in widths for size in (6, 5, 4)]
    plain, fast = make_engine(executor), make_engine(executor, speculative_width=5)
    for wave in range(2):
        made = [
            [make_request(f"{wave}.{i}", p, *points[i], points[i][1]) for i, p in enumerate(prompts(9))]
            for _ in range(2)
        ]
        for engine, requests in zip((plain, fast), made, strict=True):
            run(engine, requests)
        assert [r.output_token_ids for r in made[0]] == [r.output_token_ids for r in made[1]]
    assert set(fast.speculator.stats.drafts) == {4, 5, 6} and fast.speculator.pool.name == "q5"


def test_little_memory_and_a_change_of_size():
    """Guesses need pages of their requests only; who is preempted, or has changed size, is guessed for again."""
    page_bytes = make_engine().executor.page_bytes()
    plain, fast = (make_engine(kv_cache_bytes=30 * page_bytes, **c) for c in ({}, {"speculative_width": 4}))
    made = [[make_request(f"p{i}", p, 6 - i % 3) for i, p in enumerate(prompts(6))] for _ in range(2)]
    for engine, requests in zip((plain, fast), made, strict=True):
        run(engine, requests)
    assert fast.scheduler.num_preemptions > 0
    assert [r.output_token_ids for r in made[0]] == [r.output_token_ids for r in made[1]]


def test_what_reads_no_more_than_guesses_is_left_alone():
    fast = make_engine(speculative_width=4)
    run(fast, [make_request("r", [1, 2, 3], 6, 4, 4)])
    assert not fast.speculator.stats.drafts
