"""The sampler against distributions computed by hand."""

import math

import pytest
import torch

from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.sampler import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def make_request(prompt=(1,), output=(), **sampling) -> LiveRequest:
    request = LiveRequest(Request("r", list(prompt), SamplingParams(**sampling), sizes=(4,)))
    request.output_token_ids = list(output)
    return request


def frequencies(request: LiveRequest, logits: torch.Tensor = LOGITS, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(seed=0)
    rows = [request] * draws
    tokens = sampler.sample(logits.expand(draws, -1).clone(), rows)
    return torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=len(logits)) / draws


def expect(weights: torch.Tensor, measured: torch.Tensor, draws: int = 4000) -> None:
    probs = weights / weights.sum()
    sigma = (probs * (1 - probs) / draws).sqrt()
    assert ((measured - probs).abs() <= 4.5 * sigma + 1e-9).all(), (probs, measured)


def test_greedy_takes_the_largest_logit():
    sampled = Sampler().sample(LOGITS[None].clone(), [make_request(temperature=0)])
    assert sampled[0].token_id == 0 and sampled[0].logprobs is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_sampling_follows_softmax(temperature):
    expect(torch.softmax(LOGITS / temperature, -1), frequencies(make_request(temperature=temperature, seed=1)))


def test_top_k_keeps_k_entries():
    weights = torch.softmax(LOGITS, -1)
    weights[2:] = 0
    expect(weights, frequencies(make_request(top_k=2, seed=2)))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = torch.softmax(LOGITS, -1)  # 0.643 0.237 0.087 0.032 0.001
    expect(probs * torch.tensor([1, 1, 0, 0, 0]), frequencies(make_request(top_p=0.8, seed=3)))
    expect(probs * torch.tensor([1, 0, 0, 0, 0]), frequencies(make_request(top_p=0.6, seed=3)))


def test_top_p_is_relative_to_what_top_k_left():
    # Of {0, 1}, token 0 alone has 0.73: with p = 0.72 nothing else may be drawn.
    assert frequencies(make_request(top_k=2, top_p=0.72, seed=4))[0] == 1.0


def test_min_p_is_relative_to_the_likeliest():
    probs = torch.softmax(LOGITS, -1)
    expect(probs * (probs >= 0.2 * probs[0]), frequencies(make_request(min_p=0.2, seed=5)))


def test_a_wide_nucleus_falls_back_to_the_whole_vocabulary():
    logits = torch.zeros(2000)
    measured = frequencies(make_request(top_p=0.9, seed=6), logits, draws=4000)
    assert (measured > 0).sum() > 1000  # 256 entries hold only 13 % of a flat distribution


def test_seed_decides_and_batch_does_not_matter():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone = Sampler(seed=1).sample(logits[1:2].clone(), [make_request(seed=7)])[0].token_id
    others = [make_request(), make_request(seed=7), make_request(temperature=0)]
    assert Sampler(seed=2).sample(logits.clone(), others)[1].token_id == alone


def test_mixed_batch_matches_rows_apart():
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    kinds = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"seed": 3, "top_k": 7, "min_p": 0.1}]
    together = Sampler().sample(logits.clone(), [make_request(**kind) for kind in kinds])
    apart = [Sampler().sample(logits[i : i + 1].clone(), [make_request(**kind)])[0] for i, kind in enumerate(kinds)]
    assert [t.token_id for t in together] == [t.token_id for t in apart]


def test_penalties():
    request = make_request(prompt=(2,), output=(0, 0, 1), temperature=0, presence_penalty=0.5, frequency_penalty=1.0)
    row = LOGITS[None].clone()
    Sampler().sample(row, [request])
    assert row[0].tolist() == pytest.approx([2 - 0.5 - 2, 1 - 0.5 - 1, 0, -1, -5])
    request = make_request(prompt=(3,), output=(0,), temperature=0, repetition_penalty=2.0)
    row = LOGITS[None].clone()
    Sampler().sample(row, [request])
    assert row[0].tolist() == pytest.approx([1.0, 1.0, 0.0, -2.0, -5.0])


def test_bias_bans_and_allowed_tokens():
    def greedy(**sampling) -> int:
        request = make_request(output=sampling.pop("output", ()), temperature=0, **sampling)
        return Sampler().sample(LOGITS[None].clone(), [request])[0].token_id

    assert greedy(logit_bias={4: 100.0}) == 4
    assert greedy(allowed_token_ids=(2, 3)) == 2
    assert greedy(min_tokens=1, eos_token_ids=frozenset({0})) == 1
    assert greedy(bad_words_ids=((0,),)) == 1
    assert greedy(bad_words_ids=((3, 0),), output=(3,)) == 1
    assert greedy(bad_words_ids=((3, 0),), output=(2,)) == 0


def test_logprobs_are_of_the_raw_logits():
    request = make_request(temperature=0, logit_bias={4: 100.0}, logprobs=2)
    scores = Sampler().sample(LOGITS[None].clone(), [request])[0].logprobs
    expected = torch.log_softmax(LOGITS, -1)
    assert scores.token_id == 4 and scores.rank == 5
    assert scores.logprob == pytest.approx(expected[4].item())
    assert scores.top == ((0, pytest.approx(expected[0].item())), (1, pytest.approx(expected[1].item())))
    assert math.isclose(scores.top[0][1], expected[0].item(), rel_tol=1e-6)
