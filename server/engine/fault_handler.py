"""What becomes of a request that cannot be computed; and of the engine, where that is not the request's fault."""

from __future__ import annotations

import logging
from collections.abc import Callable

from server.core.request import LiveRequest, Request, RequestOutput, SamplingParams
from server.engine.isolation import EngineBroken, NoTokenLeft, Quarantine, is_out_of_memory
from server.engine.runner import StepRunner
from server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class FaultHandler:
    """Fails requests that `isolation.bisect` or their own numbers showed to be at fault."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, forget: Callable[[list[LiveRequest]], None]) -> None:
        """`forget`: told of the requests that were failed."""
        self._scheduler, self._runner, self._forget = scheduler, runner, forget
        self._quarantine = Quarantine()

    def refuses(self, request: LiveRequest) -> bool:
        """Whether the same request made a step fail a short while ago."""
        return self._quarantine.holds(request)

    def condemn(self, request: LiveRequest, error: Exception) -> list[RequestOutput]:
        """Fail a request that cannot be computed. EngineBroken if a harmless one at its size cannot be either."""
        if request.is_finished:  # aborted, or preempted and refused, in between
            return []
        if isinstance(error, NoTokenLeft):
            return self._fail(request, str(error), 400)
        size = request.path.size
        pages = self._scheduler.kv_cache.discard(request)
        if is_out_of_memory(error):
            message, status = "There is not enough memory to compute this request now.", 503
        else:
            message, status = f"The model step failed on this request: {type(error).__name__}: {error}", 500
        outputs = self._fail(request, message, status)
        self._runner.wipe(pages)
        self.probe(size)
        if status == 500:
            self._quarantine.add(request)
        logger.error("request %s was at fault and is failed: %s", request.request_id, error)
        return outputs

    def _fail(self, request: LiveRequest, message: str, status: int) -> list[RequestOutput]:
        outputs = self._scheduler.fail([request], message, status)
        self._forget([request])
        return outputs

    def probe(self, size: int) -> None:
        """Compute one token at `size`, alone. EngineBroken if that fails or yields no number."""
        probe = Request("probe", [0], SamplingParams(max_tokens=1, temperature=0.0), sizes=(size,))
        error = self._scheduler.borrow(LiveRequest(probe), size, self._run_alone)
        if error is not None:
            raise EngineBroken(f"nothing can be computed at {size}L: {error}")

    def _run_alone(self, request: LiveRequest) -> str | None:
        """What is wrong with a step of only this request, or None."""
        try:
            _, faults = self._runner.run(self._runner.build_batch([(request, 1)]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        fault = faults.get(request.request_id)
        return None if fault is None else str(fault)
