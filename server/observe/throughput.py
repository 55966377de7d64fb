"""What the server does while it has work, in one log line every ten seconds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.engine import Engine
    from server.observe.metrics import Metrics

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0
_SAMPLES = 10  # that make a line


class ThroughputLog:
    """Call `sample` once every `SAMPLE_SECONDS`. A line is written where anything ran or waited since the last one."""

    def __init__(self, metrics: Metrics, engine: Engine) -> None:
        self._metrics, self._engine = metrics, engine
        self._before = metrics.token_totals()
        self._num_samples = self._rows = self._layers = 0

    def sample(self) -> None:
        stats = self._engine.stats()
        self._num_samples += 1
        self._rows += stats.num_running
        self._layers += sum(size * count for size, count in stats.running_by_size.items())
        if self._num_samples < _SAMPLES:
            return
        seconds, totals = self._num_samples * SAMPLE_SECONDS, self._metrics.token_totals()
        prompt, generated = ((now - then) / seconds for now, then in zip(totals, self._before, strict=True))
        if self._rows or stats.num_waiting or prompt or generated:
            size = self._layers / self._rows if self._rows else None
            logger.info(
                "%d running, %d waiting, prompts %.1f tokens/s, answers %.1f tokens/s, KV cache %.1f %%, mean size %s",
                stats.num_running, stats.num_waiting, prompt, generated, 100 * stats.kv_usage,
                "-" if size is None else f"{size:.1f}L",
                extra={
                    "running": stats.num_running, "waiting": stats.num_waiting, "prompt_tokens_per_s": round(prompt, 1),
                    "generation_tokens_per_s": round(generated, 1), "kv_usage": round(stats.kv_usage, 4),
                    "mean_size": None if size is None else round(size, 2),
                },
            )  # fmt: skip
        self._before, self._num_samples, self._rows, self._layers = totals, 0, 0, 0
