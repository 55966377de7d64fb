"""The oracle of precision: whatever happens around a request, it gets what the torch executor gives it alone, computed
in one go, at its depth and at its widths. Activations are floats on both sides, as rounding them is chaotic."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from model_store.loaded import LoadedPair
from server.core.config import EngineConfig
from server.core.request import LiveRequest, Request, SamplingParams
from server.core.size_policy import LargestSize
from server.core.width import EXACT
from server.engine.engine import Engine
from server.model import linear
from tests.kernels.steps import make_pair
from tests.kernels.test_codes import SHAPE
from tests.kernels.test_widths import ALL, dual

SIZES, VOCAB = (4, 5, 6), 331


class Dial(LargestSize):
    """The width of a step by how many tokens the answers of the running requests have."""

    def __init__(self, widths: tuple[int, ...] = (EXACT,)) -> None:
        self.widths = widths

    def width(self, view, now):
        done = min((len(request.output_token_ids) for request in view.running), default=0)
        return self.widths[min(done, len(self.widths) - 1)]

    def raises_rows(self, scheduled, width):
        return False  # arithmetic is the bound: each row reads what it is given


def small_pair(**changes) -> LoadedPair:
    return dual(make_pair("llama", torch.float32, **SHAPE | changes))


def make_engine(executor: str, widths: tuple[int, ...] = (EXACT,), **changes) -> Engine:
    values = {"max_model_len": 128, "page_size": 32, "kv_cache_bytes": 64 << 20, "max_num_batched_tokens": 1024}
    config = EngineConfig(executor=executor, exact_activations=True, **values | changes)
    return Engine(small_pair(), config, policy=Dial(widths))


def request_of(name: str, prompt: list[int], size: int, width: int | None = None, **changes) -> LiveRequest:
    sampling = SamplingParams(**{"max_tokens": 6, "temperature": 0, "ignore_eos": True} | changes.pop("sampling", {}))
    limits = {} if width is None else {"min_width": width, "max_width": width}
    return LiveRequest(Request(name, list(prompt), sampling, sizes=(size,), **limits | changes))


def run(engine: Engine, requests: list[LiveRequest]) -> dict[str, list]:
    outputs: dict[str, list] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


@functools.cache
def alone(prompt: tuple[int, ...], size: int, widths: tuple[int, ...], tokens: int) -> list[int]:
    """The answer of the torch executor, width by token."""
    request = request_of("alone", list(prompt), size, sampling={"max_tokens": tokens})
    run(make_engine("torch", widths, enable_prefix_caching=False), [request])
    return request.output_token_ids


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(length)]


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    monkeypatch.setattr(linear, "round_activations", lambda x: x.float())


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_every_depth_and_width_mixed_and_in_chunks(executor):
    points = [(size, width) for size in SIZES for width in ALL]
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 7, 33, 40, 12) * 3)]
    requests = [
        request_of(f"{size}L-{width}", prompt, size, width)
        for (size, width), prompt in zip(points, prompts, strict=True)
    ]
    run(make_engine(executor, max_num_batched_tokens=24), requests)
    for (size, width), prompt, request in zip(points, prompts, requests, strict=True):
        assert request.output_token_ids == alone(tuple(prompt), size, (width,), 6), request
        assert request.widths == [(width, 0)]


def test_scores_are_those_of_the_width():
    """Log-probabilities of every position, prompt included, by the width that answers are pinned to."""
    prompt, seen = prompt_of(40, 3), {}
    for executor in ("native", "torch"):
        engine = make_engine(executor, (4,), max_num_batched_tokens=24)
        wanted = {"logprobs": 0, "prompt_logprobs": 0}
        outputs = run(engine, [request_of(str(width), prompt, 5, width, sampling=wanted) for width in ALL])
        for width in ALL:
            scores = [
                s for o in outputs[str(width)] for s in (o.prompt_logprobs or [None])[1:] + (o.new_logprobs or [])
            ]
            seen[executor, width] = torch.tensor([score.logprob for score in scores])
            assert {output.width for output in outputs[str(width)] if output.new_token_ids} == {width}
    for width in ALL:
        assert len(seen["torch", width]) == 39 + 6
        torch.testing.assert_close(seen["native", width], seen["torch", width], rtol=1e-3, atol=1e-3)
        assert width == EXACT or (seen["torch", width] - seen["torch", EXACT]).abs().max() > 1e-3


@pytest.mark.parametrize("speculative_size", [None, 4])
def test_prefix_hits_preemption_and_guesses_change_nothing(speculative_size):
    shared = prompt_of(40, 1)
    prompts = [shared + prompt_of(i, 50 + i) for i in range(1, 8)]
    points = [(SIZES[i % 3], ALL[i % 5]) for i in range(7)]
    page_bytes = make_engine("native").executor.page_bytes()
    engine = make_engine(
        "native", kv_cache_bytes=45 * page_bytes, speculative_size=speculative_size, max_num_batched_tokens=64
    )
    requests = []
    for turn in "ab":
        wave = [
            request_of(f"{turn}{i}", prompt, *point, sampling={"max_tokens": 30})
            for i, (prompt, point) in enumerate(zip(prompts, points, strict=True))
        ]
        run(engine, wave if turn == "a" else wave[::-1])  # the last ones' prefixes are still there
        requests += wave
    assert engine.scheduler.num_preemptions > 0 and engine.kv_cache.prefix_hits > 0
    if speculative_size:
        assert engine.speculator.stats.drafts
    for request, prompt, (size, width) in zip(requests, 2 * prompts, 2 * points, strict=True):
        assert request.output_token_ids == alone(tuple(prompt), size, (width,), 30), request


TURNS = (EXACT, EXACT, 4, 4, 4, 8, 6, 5, EXACT, 4)  # width by token


@pytest.mark.parametrize("state_bytes", [0, 8 << 20])
def test_either_dial_changes_in_the_middle_of_answers(state_bytes):
    """Three depths in lock step while the width changes under them; one request changes its depth as well."""
    engine = make_engine("native", TURNS, state_bytes=state_bytes)
    prompts = [prompt_of(20, seed) for seed in range(4)]
    plan = {"size_schedule": ((6, 4), (5, 0)), "sampling": {"max_tokens": 12}}
    requests = [request_of(f"d{size}", prompts[size - 4], size, sampling={"max_tokens": 12}) for size in SIZES]
    requests.append(request_of("both", prompts[3], 6, **plan))
    run(engine, requests)
    for request in requests[:3]:
        assert request.output_token_ids == alone(tuple(request.prompt_token_ids), request.sizes[0], TURNS, 12)
        assert request.widths == [(16, 0), (4, 2), (8, 5), (6, 6), (5, 7), (16, 8), (4, 9)]
    again = request_of("again", prompts[3], 6, **plan)
    run(make_engine("torch", TURNS, enable_prefix_caching=False, state_bytes=state_bytes), [again])
    assert requests[3].output_token_ids == again.output_token_ids
    assert [decision.size for decision in again.decisions] == [6, 5]


def test_a_prefix_of_another_width_is_taken_as_it_was_made():
    """A free request goes on from better KV; one that is pinned to few bits does not."""
    prompt = prompt_of(70, 9)
    engine = make_engine("native", (8,))
    run(engine, [request_of("first", prompt, 6)])
    narrow, pinned = request_of("free", prompt, 6, max_width=4), request_of("pinned", prompt, 6, 4)
    run(engine, [narrow])
    run(engine, [pinned])
    assert (narrow.num_cached_tokens, pinned.num_cached_tokens) == (64, 0)
    assert pinned.output_token_ids == alone(tuple(prompt), 6, (4,), 6)
