"""The sampler against distributions computed by hand."""

import math

import numpy as np
import pytest

from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.sampler import Sampler

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, -5.0], np.float32)


def make_request(prompt=(1,), output=(), **sampling) -> LiveRequest:
    request = LiveRequest(Request("r", list(prompt), SamplingParams(**sampling), sizes=(4,)))
    request.output_token_ids = list(output)
    return request


def frequencies(request: LiveRequest, logits: np.ndarray = LOGITS, draws: int = 4000) -> np.ndarray:
    sampler = Sampler(seed=0)
    rows = [request] * draws
    tokens = sampler.sample(np.tile(logits, (draws, 1)), rows)
    return np.bincount([t.token_id for t in tokens], minlength=len(logits)) / draws


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits)
    return weights / weights.sum()


def expect(weights: np.ndarray, measured: np.ndarray, draws: int = 4000) -> None:
    probs = weights / weights.sum()
    sigma = np.sqrt(probs * (1 - probs) / draws)
    assert (np.abs(measured - probs) <= 4.5 * sigma + 1e-9).all(), (probs, measured)


def test_greedy_takes_the_largest_logit():
    sampled = Sampler().sample(LOGITS[None].copy(), [make_request(temperature=0)])
    assert sampled[0].token_id == 0 and sampled[0].logprobs is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_sampling_follows_softmax(temperature):
    expect(softmax(LOGITS / temperature), frequencies(make_request(temperature=temperature, seed=1)))


def test_top_k_keeps_k_entries():
    weights = softmax(LOGITS)
    weights[2:] = 0
    expect(weights, frequencies(make_request(top_k=2, seed=2)))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = softmax(LOGITS)  # 0.643 0.237 0.087 0.032 0.001
    expect(probs * np.array([1, 1, 0, 0, 0]), frequencies(make_request(top_p=0.8, seed=3)))
    expect(probs * np.array([1, 0, 0, 0, 0]), frequencies(make_request(top_p=0.6, seed=3)))


def test_top_p_is_relative_to_what_top_k_left():
    # Of {0, 1}, token 0 alone has 0.73: with p = 0.72 nothing else may be drawn.
    assert frequencies(make_request(top_k=2, top_p=0.72, seed=4))[0] == 1.0


def test_min_p_is_relative_to_the_likeliest():
    probs = softmax(LOGITS)
    expect(probs * (probs >= 0.2 * probs[0]), frequencies(make_request(min_p=0.2, seed=5)))


def test_a_wide_nucleus_falls_back_to_the_whole_vocabulary():
    logits = np.zeros(2000, np.float32)
    measured = frequencies(make_request(top_p=0.9, seed=6), logits, draws=4000)
    assert (measured > 0).sum() > 1000  # 256 entries hold only 13 % of a flat distribution


def test_seed_decides_and_batch_does_not_matter():
    logits = np.random.default_rng(0).standard_normal((3, 50), np.float32)
    alone = Sampler(seed=1).sample(logits[1:2].copy(), [make_request(seed=7)])[0].token_id
    others = [make_request(), make_request(seed=7), make_request(temperature=0)]
    assert Sampler(seed=2).sample(logits.copy(), others)[1].token_id == alone


def test_mixed_batch_matches_rows_apart():
    logits = np.random.default_rng(1).standard_normal((4, 500), np.float32)
    kinds = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"seed": 3, "top_k": 7, "min_p": 0.1}]
    together = Sampler().sample(logits.copy(), [make_request(**kind) for kind in kinds])
    apart = [Sampler().sample(logits[i : i + 1].copy(), [make_request(**kind)])[0] for i, kind in enumerate(kinds)]
    assert [t.token_id for t in together] == [t.token_id for t in apart]


def test_penalties():
    request = make_request(prompt=(2,), output=(0, 0, 1), temperature=0, presence_penalty=0.5, frequency_penalty=1.0)
    row = LOGITS[None].copy()
    Sampler().sample(row, [request])
    assert row[0].tolist() == pytest.approx([2 - 0.5 - 2, 1 - 0.5 - 1, 0, -1, -5])
    request = make_request(prompt=(3,), output=(0,), temperature=0, repetition_penalty=2.0)
    row = LOGITS[None].copy()
    Sampler().sample(row, [request])
    assert row[0].tolist() == pytest.approx([1.0, 1.0, 0.0, -2.0, -5.0])


def test_bias_bans_and_allowed_tokens():
    def greedy(**sampling) -> int:
        request = make_request(output=sampling.pop("output", ()), temperature=0, **sampling)
        return Sampler().sample(LOGITS[None].copy(), [request])[0].token_id

    assert greedy(logit_bias={4: 100.0}) == 4
    assert greedy(allowed_token_ids=(2, 3)) == 2
    assert greedy(min_tokens=1, eos_token_ids=frozenset({0})) == 1
    assert greedy(bad_words_ids=((0,),)) == 1
    assert greedy(bad_words_ids=((3, 0),), output=(3,)) == 1
    assert greedy(bad_words_ids=((3, 0),), output=(2,)) == 0


def test_logprobs_are_of_the_raw_logits():
    request = make_request(temperature=0, logit_bias={4: 100.0}, logprobs=2)
    scores = Sampler().sample(LOGITS[None].copy(), [request])[0].logprobs
    expected = np.log(softmax(LOGITS))
    assert scores.token_id == 4 and scores.rank == 5
    assert scores.logprob == pytest.approx(expected[4].item())
    assert scores.top == ((0, pytest.approx(expected[0].item())), (1, pytest.approx(expected[1].item())))
    assert math.isclose(scores.top[0][1], expected[0].item(), rel_tol=1e-6)
