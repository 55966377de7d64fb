"""What happens when a step fails: find the request at fault, spare the others, tell a bad request from a broken engine.

A step writes KV only beyond `num_computed_tokens` and books nothing until it is over, so it can simply be run again
with fewer requests. Halving finds the requests that cannot be run; the rest advance as if nothing had happened. Then a
probe, one token that is known to be harmless, decides whose fault it was: if it runs, the request's (which is failed,
and refused when it comes again); if not, the engine's, which then stops rather than fail everybody one by one.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from server.core.batch import Scheduled
from server.core.request import LiveRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineBroken(RuntimeError):
    """The engine cannot compute anything any more: only a restart helps."""


class ComputeError(Exception):
    """A plan could not be computed; nothing of it has been booked."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class NoTokenLeft(ValueError):
    """A request's constraints (grammar, allowed tokens, banned ones) contradict each other at this position."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might succeed. torch has a class for CUDA only; on CPU the text has to do."""
    torch = sys.modules.get("torch")  # who has not imported it cannot have met its errors
    is_torchs = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or is_torchs or "can't allocate memory" in str(error)


def bisect(
    scheduled: Scheduled,
    error: Exception,
    run: Callable[[Scheduled], T],
    condemn: Callable[[LiveRequest, Exception], T],
) -> list[T]:
    """Run again, in ever smaller parts, what failed as a whole with `error`.

    `run` either advances a part and returns what came of it, or raises and leaves everything as it was. `condemn` gets
    each request that fails alone. A lone request has a second try: the first failure may have been a passing one.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and is_out_of_memory(error):
        torch.cuda.empty_cache()
    middle = (len(scheduled) + 1) // 2
    results = []
    for part in filter(None, (scheduled[:middle], scheduled[middle:])):
        try:
            results.append(run(part))
        except Exception as again:
            if len(part) == 1:
                results.append(condemn(part[0][0], again))
            else:
                results += bisect(part, again, run, condemn)
    return results


class Quarantine:
    """Remembers requests that made a step fail, so that their next attempt is refused before it costs anybody time."""

    def __init__(self, seconds: float = 600.0, capacity: int = 256) -> None:
        self._seconds, self._capacity = seconds, capacity
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: LiveRequest) -> None:
        self._until[_fingerprint(request)] = time.monotonic() + self._seconds
        while len(self._until) > self._capacity:
            self._until.popitem(last=False)

    def holds(self, request: LiveRequest) -> bool:
        if not self._until:
            return False
        return self._until.get(_fingerprint(request), 0.0) > time.monotonic()


def _fingerprint(request: LiveRequest) -> bytes:
    """The same for requests that ask for the same computation: prompt, sizes and sampling, but for the seed."""
    sampling = request.sampling
    digest = hashlib.blake2b(np.asarray(request.prompt_token_ids, np.int32).tobytes(), digest_size=16)
    names = sorted(set(sampling.__dataclass_fields__) - {"seed"})
    digest.update(repr((request.sizes, [getattr(sampling, name) for name in names])).encode())
    return digest.digest()
