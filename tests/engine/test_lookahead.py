"""One step ahead of the host, with a made-up executor: what is launched, what is dropped, which numbers are drawn."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from server.core.batch import build_batch
from server.core.executor import Executor
from server.core.request import LiveRequest, Request, SampledToken, SamplingParams
from server.engine.extras.lookahead import Lookahead
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from tests.engine.harness import ELASTICITY, make_scheduler

EOS = 3


@dataclass
class Launch:
    values: list[int]

    def wait(self) -> list[int]:
        return self.values


@dataclass
class MadeUpExecutor(Executor):
    """A token is a function of the id before it, the position, the size and the drawn number; so a slip shows."""

    launches: list[bool] = field(default_factory=list)  # whether it followed another
    fail: bool = False

    def launch(self, batch, draws, *, follows=None) -> Launch:
        if self.fail:
            raise RuntimeError("made up")
        self.launches.append(follows is not None)
        ids = batch.input_ids if follows is None else np.asarray(follows[0].values)[follows[1]]
        return Launch(next_tokens(ids, batch.positions, batch.sizes, draws))


def next_tokens(ids, positions, sizes, draws) -> list[int]:
    rows = zip(ids.tolist(), positions.tolist(), sizes.tolist(), draws, strict=True)
    return [(7 * i + 3 * p + s + int(97 * draw.uniform)) % 31 for i, p, s, draw in rows]


class Loop:
    """The engine's loop, with or without looking ahead."""

    def __init__(self, ahead: bool, **changes) -> None:
        self.scheduler: Scheduler = make_scheduler(**changes)
        self.executor, self.sampler = MadeUpExecutor(), Sampler()
        self.lookahead = Lookahead(self.executor, self.scheduler, self.sampler, self.build) if ahead else None

    def build(self, scheduled):
        return build_batch(scheduled, ELASTICITY, self.scheduler.kv_cache.block_tables)

    def step(self) -> None:
        planned = self.lookahead and self.lookahead.planned()
        if planned is None:
            planned = self.scheduler.schedule()
        if self.lookahead is None or not self.lookahead.takes(planned):
            batch = self.build(planned.scheduled)
            requests = [batch.requests[row] for row in batch.sample_requests]
            last = batch.query_start[batch.sample_requests + 1] - 1
            draws = [self.sampler.next_draw(request) for request in requests]
            sizes = batch.sizes[batch.sample_requests]
            tokens = next_tokens(batch.input_ids[last], batch.positions[last], sizes, draws)
        else:
            batch, tokens = self.lookahead.run(planned)
            requests = batch.requests
            assert batch.positions.tolist() == [request.num_computed_tokens for request in requests]
        sampled = {r.request_id: SampledToken(token) for r, token in zip(requests, tokens, strict=True)}
        self.scheduler.update(planned, sampled)
        self.scheduler.clock.now += 0.01
        self.scheduler.check_integrity()


def make_requests(count: int, seed: int) -> list[LiveRequest]:
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 1.0]), seed=i, eos_token_ids=frozenset({EOS}),
            presence_penalty=0.5 * (rng.random() < 0.1),
        )  # fmt: skip
        prompt = [rng.randrange(31) for _ in range(rng.randrange(1, 12))]
        asked = Request(f"r{i}", prompt, sampling, sizes=(rng.choice([4, 5, 6]),), arrival_time=float(i))
        requests.append(LiveRequest(asked))
    return requests


def run(ahead: bool, seed: int, **changes) -> tuple[Loop, list[LiveRequest]]:
    """Requests arrive while others run; some are aborted."""
    loop, requests, rng = Loop(ahead, **changes), make_requests(30, seed), random.Random(seed)
    for number, request in enumerate(requests):
        loop.scheduler.add(request)
        for _ in range(rng.randrange(6)):
            if loop.scheduler.has_work:
                loop.step()
        if number % 7 == 6:
            loop.scheduler.abort([requests[number - 1].request_id])
    while loop.scheduler.has_work:
        loop.step()
    return loop, requests


@pytest.mark.parametrize("num_pages", [512, 130])
@pytest.mark.parametrize("seed", range(3))
def test_same_texts_as_step_by_step(seed, num_pages):
    plain, expected = run(False, seed, num_pages=num_pages)
    loop, requests = run(True, seed, num_pages=num_pages)
    for request, other in zip(requests, expected, strict=True):
        aborted = {request.status.finish_reason, other.status.finish_reason} & {"abort"}
        shorter = min(len(request.output_token_ids), len(other.output_token_ids)) if aborted else None
        assert request.output_token_ids[:shorter] == other.output_token_ids[:shorter]
    assert loop.lookahead.num_ahead > 20 and any(loop.executor.launches)
    assert loop.scheduler.kv_cache.num_free_pages == loop.scheduler.kv_cache.num_pages
    if num_pages < 512:
        assert plain.scheduler.num_preemptions > 0 and loop.scheduler.num_preemptions > 0


def test_numbers_drawn_for_a_step_that_fails_are_drawn_again():
    loop = Loop(True)
    request = make_requests(1, 0)[0]
    request.sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    loop.scheduler.add(request)
    loop.step()
    stream = random.Random(5)
    stream.random()  # the first token
    planned = loop.scheduler.schedule()
    loop.executor.fail = True
    assert loop.lookahead.takes(planned)
    with pytest.raises(RuntimeError):
        loop.lookahead.run(planned)
    assert loop.lookahead.planned() is None
    assert [loop.sampler.uniform(request) for _ in range(2)] == [stream.random() for _ in range(2)]


def test_someone_who_could_be_admitted_ends_the_run():
    loop = Loop(True)
    first, second = make_requests(2, 1)
    first.sampling = SamplingParams(max_tokens=30, temperature=0.0)
    loop.scheduler.add(first)
    for _ in range(3):
        loop.step()
    assert loop.lookahead.planned() is not None
    loop.scheduler.add(second)
    loop.step()  # what was in flight; nothing is launched after it
    assert loop.lookahead.planned() is None and second.decision is None
    loop.step()
    assert second.path is not None
