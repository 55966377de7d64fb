"""Drives the real scheduler and KV manager with a fake clock and made-up tokens: no model, no torch."""

from __future__ import annotations

import itertools
import random

from model_store.assembly import Elasticity
from server.core.config import EngineConfig
from server.core.request import LiveRequest, Request, SampledToken, SamplingParams
from server.core.width import EXACT
from server.engine.kv_cache import KVCacheManager
from server.engine.scheduler import Scheduler, SchedulerOutput

ELASTICITY = Elasticity.last_to_first(6, [0, 2, 4, 5])  # sizes 4, 5, 6
_ids = itertools.count()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_config(**changes) -> EngineConfig:
    values = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 4} | changes
    return EngineConfig(**values)


def make_scheduler(num_pages: int = 512, policy=None, queue=None, widths=(EXACT,), **changes) -> Scheduler:
    config = make_config(**changes)
    kv_cache = KVCacheManager(
        num_pages=num_pages,
        page_size=config.page_size,
        num_layers=10,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        widest=widths[-1],
    )
    return Scheduler(config, ELASTICITY, kv_cache, policy, queue, clock=Clock(), widths=widths)


def make_request(prompt: int | list[int] = 10, size: int | tuple[int, ...] = 6, **kwargs) -> LiveRequest:
    sampling = SamplingParams(**{"max_tokens": 5} | kwargs.pop("sampling", {}))
    tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else list(prompt)
    sizes = size if isinstance(size, tuple) else (size,)
    return LiveRequest(
        Request(f"r{next(_ids)}", tokens, sampling, sizes=sizes, arrival_time=float(next(_ids)), **kwargs)
    )


def run_step(scheduler: Scheduler, draw: random.Random | None = None) -> SchedulerOutput:
    """One step with made-up tokens for every request that reaches its end."""
    output = scheduler.schedule()
    sampled = {
        request.request_id: SampledToken(draw.randrange(50) if draw else 7)
        for request, count in output.scheduled
        if request.num_computed_tokens + count == request.num_tokens and request.sampling.max_tokens
    }
    output.outputs += scheduler.update(output, sampled)
    scheduler.clock.now += 0.01
    scheduler.check_integrity()
    return output


def run_until_idle(scheduler: Scheduler, limit: int = 2000) -> list:
    outputs = []
    for _ in range(limit):
        if not scheduler.has_work:
            return outputs
        outputs += run_step(scheduler).outputs
    raise AssertionError("the scheduler did not come to rest")
