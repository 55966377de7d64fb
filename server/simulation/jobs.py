"""What a trace asks for, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core.request import Budget
from server.core.width import EXACT


@dataclass(slots=True)
class Job:
    """One request of a trace. Times in seconds from the start of the trace."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    sizes: tuple[int, ...] | None = None  # None: all
    budget: Budget = field(default_factory=Budget)
    min_width: int = 0
    max_width: int = EXACT


@dataclass(slots=True)
class Record:
    """What became of a job; times in seconds, `size` 0 and NaN times if it was never answered."""

    job: Job
    size: int
    reason: str
    ttft: float
    tpot: float
    e2e: float
    preemptions: int
    replica: int
    error_status: int = 0
    tokens_at: dict[int, int] = field(default_factory=dict)  # tokens of the answer by width; {}: all as loaded

    @property
    def met(self) -> bool:
        """All limits the job came with, and an answer at all."""
        budget = self.job.budget
        return (
            self.error_status == 0
            and (budget.ttft is None or self.ttft <= budget.ttft)
            and (budget.tpot is None or self.tpot <= budget.tpot)
            and (budget.e2e is None or self.e2e <= budget.e2e)
        )
