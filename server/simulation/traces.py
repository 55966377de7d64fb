"""Request traces: arrivals and lengths, in the format of the Azure LLM inference traces (CC-BY 4.0)."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from server.core.request import Budget
from server.simulation.jobs import Job


class TraceError(ValueError):
    """The file is no trace; the message says where."""


def read_trace(path: Path | str, *, limit: int | None = None) -> list[Job]:
    """Rows `TIMESTAMP,ContextTokens,GeneratedTokens` (columns by name), oldest first; arrivals count from the first.

    TIMESTAMP is an ISO date and time or a number of seconds. Raises TraceError.
    """
    jobs: list[Job] = []
    try:
        with open(path, newline="") as lines:
            reader = csv.DictReader(lines)
            missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
            if missing:
                raise TraceError(f"{path} has no column {', '.join(sorted(missing))}")
            for row in reader:
                jobs.append(Job(_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
                if limit is not None and len(jobs) >= limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {path}: {error}") from None
    except (ValueError, TypeError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}, line {len(jobs) + 2}: {error}") from None
    if not jobs:
        raise TraceError(f"{path} has no requests")
    jobs.sort(key=lambda job: job.arrival)
    start = jobs[0].arrival
    for job in jobs:
        job.arrival -= start
    return jobs


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()[:26]).timestamp()


def shape_trace(
    jobs: Iterable[Job],
    *,
    max_prompt: int,
    max_output: int,
    budget: Budget | None = None,
    rate: float | None = None,
    sizes: tuple[int, ...] | None = None,
    width: int | None = None,
) -> list[Job]:
    """Copies with lengths clipped, one budget for all, and time scaled so that the mean rate is `rate` per second;
    all at `width`, if one is given."""
    jobs = list(jobs)
    span = jobs[-1].arrival - jobs[0].arrival
    scale = 1.0 if rate is None or span <= 0 else (len(jobs) - 1) / span / rate
    return [
        Job(
            job.arrival * scale,
            max(min(job.prompt_tokens, max_prompt), 1),
            max(min(job.output_tokens, max_output), 1),
            job.tenant,
            job.priority,
            sizes or job.sizes,
            budget or job.budget,
            job.min_width if width is None else width,
            job.max_width if width is None else width,
        )
        for job in jobs
    ]
