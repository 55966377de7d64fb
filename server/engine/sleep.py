"""Sleep to the student: weights that only larger sizes need are given back to the system while nobody wants them.

    awake -> falling_asleep -> asleep -> waking -> awake

Asleep, the sizes up to `floor` answer as ever. A request that allows one of them gets it at once, one that does not is
parked until its size is back. What may be given back is decided by one rule: every live request is content with what
stays. New requests are narrowed to that as soon as the state is no longer `awake`, so the rule comes true by itself.

Blocks are read again by a thread of their own, smallest size first; each size is served as soon as it is whole. KV
stays as it is: prefixes of larger sizes are found again.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from server.core.machine import available_memory, trim_heap
from server.core.size_policy import Refusal

if TYPE_CHECKING:
    from model_store.blocks import Part, Stage
    from model_store.weights import EndWeights, LayerWeights
    from server.core.executor import Executor
    from server.core.request import LiveRequest

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0  # after a wake that failed: until then requests for larger sizes are refused


class SleepState(enum.StrEnum):
    """`falling_asleep`: running requests keep the larger sizes; `waking`: they come back one by one."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Reader(Protocol):
    """Where parts come from (`model_store.blocks.BlockReader`). All may raise; the message tells the operator why."""

    def check(self) -> None: ...
    def read(self, part: Part) -> LayerWeights | EndWeights: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SleepReport:
    """What others may know, as of the last change. Sizes in layers."""

    state: SleepState
    largest: int  # that new requests get without waiting
    num_bytes: int = 0  # given back; 0 again once all are taken up
    num_sleeps: int = 0
    num_wakes: int = 0
    wake_seconds: float = 0.0  # of the last one
    total_wake_seconds: float = 0.0
    num_failures: int = 0
    failure: str | None = None  # of the last wake, until one succeeds


class Sleeper:
    """The engine thread calls everything but `report`, which any thread may read."""

    def __init__(
        self,
        executor: Executor,
        sizes: Sequence[int],
        stages: Sequence[Stage],
        reader: Reader,
        after: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int] = available_memory,
    ) -> None:
        """`stages`: the sizes above the floor, with what each adds; `after`: idle seconds until it falls asleep."""
        self.executor, self.stages, self.reader, self.after = executor, tuple(stages), reader, after
        self.largest = sizes[-1]
        self.floor = max(size for size in sizes if size < stages[0].size)
        self.clock, self.memory = clock, memory
        self.notify: Callable[[], None] = lambda: None  # tells the engine thread that there is news
        self.report = SleepReport(SleepState.AWAKE, self.largest)
        self._whole = self.largest  # the largest size that is in memory, with all below it
        self._is_ordered = False  # somebody said so: only a wish that nothing else can meet wakes it
        self._sleep_next = False  # as soon as it is awake
        self._idle_since = clock()
        self._retry_at = 0.0
        self._woken_at = 0.0
        self._news: deque[int | BaseException | None] = deque()  # of the thread that reads: size, failure, the end
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def state(self) -> SleepState:
        return self.report.state

    # --- requests

    def enter(self, request: LiveRequest) -> Refusal | bool:
        """Before a request is queued: narrow its sizes to what is here. True: it must be parked until `can_serve`."""
        if self.state is SleepState.AWAKE:
            return False
        here = tuple(size for size in request.sizes if size <= self.report.largest)
        if here and not request.size_schedule:
            if here != request.sizes:
                request.sizes, request.size_reason = here, "asleep"
                if not self._is_ordered:
                    self.wake()
            return False
        if self.can_serve(request):  # while its size is still here
            return False
        self.wake()
        if self.state is SleepState.WAKING:
            return True
        wait = max(self._retry_at - self.clock(), 1.0)
        return Refusal(f"This size is asleep and could not be woken: {self.report.failure}.", 503, wait)

    def can_serve(self, request: LiveRequest) -> bool:
        """Whether all sizes that a request may run at are in memory."""
        return _most(request) <= self._whole

    # --- orders

    def sleep(self) -> None:
        """Fall asleep as soon as the running requests allow it, until `wake` or a request that needs a larger size."""
        self._is_ordered = True
        if self.state is SleepState.WAKING:
            self._sleep_next = True
        elif self.state is SleepState.AWAKE:
            self.report = replace(self.report, state=SleepState.FALLING_ASLEEP, largest=self.floor)

    def wake(self, is_order: bool = False) -> None:
        """Begin to read what is missing, unless that has just failed (`is_order`: then too)."""
        if is_order:
            self._is_ordered = self._sleep_next = False
        if self.state in (SleepState.AWAKE, SleepState.WAKING):
            return
        if self._whole == self.largest:
            self.report = replace(self.report, state=SleepState.AWAKE, largest=self.largest)
        elif self.state is SleepState.ASLEEP and (is_order or self.clock() >= self._retry_at):
            self._woken_at = self.clock()
            self.report = replace(self.report, state=SleepState.WAKING)
            self._thread = threading.Thread(target=self._read, name="wake", daemon=True)
            self._thread.start()

    # --- between steps

    def rest(self) -> None:
        """The engine has nothing to do from here on."""
        self._idle_since = self.clock()

    def due_in(self) -> float | None:
        """Seconds until `tend` has something to do on an idle engine; None: not before somebody says so."""
        if self._news or self.state is SleepState.FALLING_ASLEEP:
            return 0.0
        if self.after is None or self.state is not SleepState.AWAKE:
            return None
        return max(self._idle_since + self.after - self.clock(), 0.0)

    def tend(self, live: Collection[LiveRequest]) -> None:
        """Take in what was read, and give back what none of the `live` requests needs."""
        if live:
            self._idle_since = self.clock()
        while self._news:
            self._hear(self._news.popleft())
        if self.state is SleepState.AWAKE and not live and self.due_in() == 0.0:
            self._is_ordered = False
            self.report = replace(self.report, state=SleepState.FALLING_ASLEEP, largest=self.floor)
        if self.state is SleepState.FALLING_ASLEEP and all(_most(request) <= self.floor for request in live):
            self._give_back()

    def close(self) -> None:
        """The engine ends. Nothing is written any more when this returns."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.join()

    # --- parts

    def _give_back(self) -> None:
        started, parts = time.perf_counter(), [part for stage in self.stages for part in stage.parts]
        num_bytes = max(self.executor.release(parts), self.report.num_bytes)  # after a failure some are missing already
        trim_heap()
        self._whole = self.floor
        count = self.report.num_sleeps + 1
        self.report = replace(
            self.report, state=SleepState.ASLEEP, largest=self.floor, num_bytes=num_bytes, num_sleeps=count
        )
        logger.info(
            "asleep: %dL answers; %.1f MiB of larger sizes are given back (%.0f ms)",
            self.floor, num_bytes / 2**20, (time.perf_counter() - started) * 1e3,
        )  # fmt: skip

    def _read(self) -> None:
        """On a thread of its own: read everything, smallest size first."""
        try:
            self.reader.check()
            if (need := self.report.num_bytes) > (there := self.memory()):
                raise MemoryError(f"{need / 2**20:.0f} MiB are needed and {there / 2**20:.0f} MiB are available")
            for stage in self.stages:
                for part in stage.parts:
                    if self._is_closed:
                        return
                    self.executor.restore(part, self.reader.read(part))
                self._tell(stage.size)
            self._tell(None)
        except BaseException as error:
            self._tell(error)
        finally:
            self.reader.close()

    def _tell(self, news: int | BaseException | None) -> None:
        self._news.append(news)
        self.notify()

    def _hear(self, news: int | BaseException | None) -> None:
        if isinstance(news, int):
            self._whole = news
            self.report = replace(self.report, largest=news)
            return
        report, seconds = self.report, self.clock() - self._woken_at
        if isinstance(news, BaseException):
            self._retry_at = self.clock() + RETRY_SECONDS
            is_expected = isinstance(news, OSError | ValueError | MemoryError)
            logger.error("could not wake up: %s", news, exc_info=None if is_expected else news)
            self.report = replace(
                report,
                state=SleepState.FALLING_ASLEEP,
                largest=self.floor,
                num_failures=report.num_failures + 1,
                failure=str(news) or type(news).__name__,
            )
            return
        trim_heap()
        logger.info("awake: all sizes up to %dL answer again (%.2f s)", self.largest, seconds)
        self.report = replace(
            report,
            state=SleepState.AWAKE,
            num_bytes=0,
            num_wakes=report.num_wakes + 1,
            wake_seconds=seconds,
            total_wake_seconds=report.total_wake_seconds + seconds,
            failure=None,
        )
        self._idle_since = self.clock()
        if self._sleep_next:
            self._sleep_next = False
            self.sleep()


def _most(request: LiveRequest) -> int:
    """The largest size that a request may run at."""
    return max([request.sizes[-1], *(size for size, _ in request.size_schedule)])
