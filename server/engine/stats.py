"""What an engine reports: snapshots for gauges, one record per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.core.request import LiveRequest, SizeDecision
from server.engine.step_clock import Gap


@dataclass(slots=True)
class EngineStats:
    """A snapshot for gauges and load reports."""

    num_running: int
    num_waiting: int  # those included that wait for their size to wake
    num_parked: int  # of them
    num_waiting_tokens: int
    kv_usage: float
    num_pages: int
    num_free_pages: int
    running_by_size: dict[int, int]
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int


@dataclass(slots=True)
class StepStats:
    """What one step did. Times in seconds; `gap` is the time between the end of the last model call and this one."""

    num_scheduled_tokens: int
    num_prompt_tokens: int
    num_generation_tokens: int
    step_time: float
    model_time: float
    gap: Gap
    num_preempted: int = 0
    num_first_tokens: int = 0  # of the generated ones, those that were their request's first


class MetricsSink(Protocol):
    """Who hears of steps and requests. Subclass it to hear of some only: the rest does nothing."""

    def on_step(self, stats: StepStats) -> None: ...

    def book_steps(self) -> None:
        """Called off the engine's thread while it computes: the time for what `on_step` has put off."""

    def on_first_token(self, request: LiveRequest) -> None:
        """The first token of an answer has been booked; not again after a preemption or a change of size."""

    def on_request_finished(self, request: LiveRequest) -> None: ...
    def on_size_decision(self, decision: SizeDecision) -> None: ...
