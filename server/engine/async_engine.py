"""The engine's asyncio face: one thread runs steps, the event loop submits requests and reads their outputs.

What crosses over is a message: `Request` and `Abort` in, `RequestOutput` out. Per step there is a single wake-up of the
event loop, however many requests advanced; where the executor can, it gives it from outside the interpreter (an
eventfd, `doorbell`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from server.core.request import Abort, Order, Request, RequestOutput
from server.core.size_policy import RequestRefused

if TYPE_CHECKING:  # the engine brings torch, which the port need not wait for
    from server.engine.engine import Engine

logger = logging.getLogger(__name__)


T = TypeVar("T")


class _Call(NamedTuple):
    """Something to be done on the engine's thread."""

    function: Callable[[Engine], Any]
    future: asyncio.Future


class OutputStream:
    """Outputs of one request as an async iterator.

    Outputs that pile up while the reader is busy are merged, so a slow reader costs bounded memory and never holds
    the engine. Closing it early aborts the request.
    """

    def __init__(self, request_id: str, abort: Callable[[str, str | None], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._pending: RequestOutput | None = None
        self._reader: asyncio.Future[None] | None = None  # what the reader waits for
        self._finished = False

    def put(self, output: RequestOutput) -> None:
        """Called on the event loop."""
        if self._finished:
            return
        self._pending = output if self._pending is None else merge(self._pending, output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._finished:
            raise StopAsyncIteration
        if self._pending is None:  # one future a token, where an `asyncio.Event` takes a coroutine and a queue too
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        output, self._pending = self._pending, None
        assert output is not None, "woken without an output"
        self._finished = output.is_finished
        return output

    async def aclose(self, stop_string: str | None = None) -> None:
        """`stop_string`: what the text ended with, if it is complete."""
        if not self._finished:
            self._finished = True
            self._abort(self.request_id, stop_string)


def merge(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    """Two consecutive outputs of one request as one."""
    if then.decision is None:
        then.decision, then.earlier_decisions = first.decision, first.earlier_decisions
    elif first.decision is not None:
        then.earlier_decisions = (*first.earlier_decisions, first.decision, *then.earlier_decisions)
    if first.new_token_ids:
        if not then.new_token_ids:
            then.width, then.earlier_widths = first.width, first.earlier_widths
        elif first.width != then.width or first.earlier_widths or then.earlier_widths:
            num_newest = len(first.new_token_ids) - sum(count for _, count in first.earlier_widths)
            then.earlier_widths = (*first.earlier_widths, (first.width, num_newest), *then.earlier_widths)
    then.new_token_ids = first.new_token_ids + then.new_token_ids
    if first.new_logprobs is not None or then.new_logprobs is not None:
        then.new_logprobs = (first.new_logprobs or []) + (then.new_logprobs or [])
    then.prompt_logprobs = then.prompt_logprobs or first.prompt_logprobs
    then.pooled = first.pooled if then.pooled is None else then.pooled
    then.num_cached_tokens = max(then.num_cached_tokens, first.num_cached_tokens)
    if first.scheduled_time is not None:
        then.scheduled_time = first.scheduled_time
    if first.first_token_time is not None:
        then.first_token_time = first.first_token_time
    if then.last_token_time is None:
        then.last_token_time = first.last_token_time
    return then


class AsyncEngine:
    """Owns the engine thread. All methods are called on the event loop unless they say otherwise."""

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None] | None = None) -> None:
        """`on_failure` is told, on the event loop, when the engine thread dies."""
        self.engine = engine
        self._streams: dict[str, OutputStream] = {}
        self._inbox: deque[Request | Abort | Order | _Call] = deque()
        self._unsent: list[RequestOutput] = []
        self._outbox: deque[list[RequestOutput]] = deque()  # on their way to the event loop
        self._bell: int | None = None  # an eventfd on which the event loop waits
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._step_started: float | None = None  # None while idle
        self.failure: str | None = None  # why the engine thread died
        self._on_failure = on_failure

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self.engine.executor.can_ring:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._loop.add_reader(self._bell, self._answer, self._bell)
        if self.engine.sleeper is not None:
            self.engine.sleeper.notify = self._ring
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def sleep(self) -> None:
        """Have the engine give back what larger sizes need, if it can (`Engine.sleeper`). `wake`: take it up again."""
        self._send(Order.SLEEP)

    def wake(self) -> None:
        self._send(Order.WAKE)

    async def stop(self) -> None:
        """Abort what still runs and end the thread."""
        with self._wake:
            self._inbox.extend(Abort(request_id) for request_id in self._streams)
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 30)
        if self._bell is not None and self._loop is not None and not self.is_alive:
            self._loop.remove_reader(self._bell)
            os.close(self._bell)
            self._bell = None

    def submit(self, request: Request) -> OutputStream:
        """Hand a request to the engine. Its first output is its admission or its refusal."""
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        stream = OutputStream(request.request_id, self.abort)
        if not self.is_alive:
            stream.put(_error(request.request_id, "The engine has stopped.", 503))
            return stream
        self._streams[request.request_id] = stream
        self._send(request)
        return stream

    def abort(self, request_id: str, stop_string: str | None = None) -> None:
        """Idempotent; blocks are free after the engine's current step. `stop_string`: what the text ended with."""
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id, stop_string))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What `function` returns or raises, called on the engine's thread between two steps. RuntimeError if the
        engine has stopped."""
        assert self._loop is not None, "started"
        if not self.is_alive:
            raise RuntimeError("the engine has stopped")
        future: asyncio.Future[T] = self._loop.create_future()
        self._send(_Call(function, future))
        return await future

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has been running; 0 while idle. A wedged step shows here."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    # --- engine thread

    def _ring(self) -> None:
        """Any thread: the engine has something to tend."""
        with self._wake:
            self._wake.notify()

    def _send(self, item: Request | Abort | Order | _Call) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._inbox and not self.engine.has_work and not self._stopping:
                        pause = self.engine.due_in()
                        if pause == 0.0:
                            break
                        self._wake.wait(pause)
                    inbox, self._inbox = self._inbox, deque()
                    stopping = self._stopping
                outputs = self._drain(inbox) if inbox else []
                outputs += self.engine.tend()
                if stopping:
                    self._publish(outputs)
                    self._flush()
                    self._report_leaks()
                    self.engine.scheduler.policy.on_stop()
                    return
                if self.engine.has_work:
                    self._step_started = time.monotonic()
                    outputs += self.engine.step(self._hand_over)
                    self._step_started = None
                self._publish(outputs)
                if self._is_unrung or not self.engine.scheduler.running:
                    self._flush()
                if not self.engine.scheduler.running and self.engine.has_work and not outputs:
                    # Only a policy that holds requests back leads here; look again soon, or when something arrives.
                    with self._wake:
                        if not self._inbox:
                            self._wake.wait(0.002)
        except BaseException as error:
            logger.critical("the engine thread died", exc_info=True)
            self.failure = f"{type(error).__name__}: {error}"
            if self._on_failure is not None:
                self._loop_call(self._on_failure, error)
        finally:
            self.engine.close()
            self._step_started = None
            self._flush()
            self._loop_call(self._fail_all)

    def _report_leaks(self) -> None:
        """Every request has ended by now, so anything still held is a bug worth a line in the log."""
        try:
            self.engine.check_integrity()
            free, pages = self.engine.kv_cache.num_free_pages, self.engine.kv_cache.num_pages
            assert free == pages, f"{pages - free} pages are still held"
        except AssertionError as error:
            logger.error("engine stopped with a leak: %s", error)
        else:
            logger.info("engine stopped: all %d pages are free", pages)

    def _drain(self, inbox: deque[Request | Abort | Order | _Call]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        aborts = [item for item in inbox if isinstance(item, Abort)]
        aborted = {abort.request_id for abort in aborts}
        for item in inbox:
            if isinstance(item, Order):
                self.engine.obey(item)
                continue
            if isinstance(item, _Call):
                self._answer_call(item)
                continue
            if isinstance(item, Abort) or item.request_id in aborted:
                continue
            try:
                self.engine.add_request(item)
            except RequestRefused as error:
                refusal = error.refusal
                output = _error(item.request_id, refusal.message, refusal.status, refusal.param)
                output.retry_after = refusal.retry_after
                outputs.append(output)
            except ValueError as error:
                outputs.append(_error(item.request_id, str(error), 400))
            except Exception:
                logger.exception("request %s could not be queued", item.request_id)
                outputs.append(_error(item.request_id, "The server failed to handle this request.", 500))
        for abort in aborts:
            outputs += self.engine.abort([abort.request_id], abort.stop_string)
        return outputs

    def _answer_call(self, call: _Call) -> None:
        try:
            value = call.function(self.engine)
        except Exception as error:
            self._loop_call(_settle, call.future, None, error)
        else:
            self._loop_call(_settle, call.future, value, None)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs over when the next model call begins, or at once if none is due.

        Then the event loop reads, writes and sends while the model computes. Woken any earlier, it would hold the
        interpreter while this thread prepares the next step.
        """
        self._unsent += outputs

    def _hand_over(self) -> None:
        """The step is about to leave Python: it wakes the event loop as soon as it computes."""
        if self._bell is None:
            self._flush()
        elif self._unsent:
            self._outbox.append(self._unsent)
            self._unsent = []
            self.engine.executor.doorbell = self._bell

    @property
    def _is_unrung(self) -> bool:
        """Whether a step went by that should have rung and did not: it failed before it computed."""
        return self._bell is not None and self.engine.executor.doorbell >= 0

    def _flush(self) -> None:
        """Wake the event loop now, if there is anything for it."""
        if self._unsent:
            self._outbox.append(self._unsent)
            self._unsent = []
        if self._bell is not None:
            self.engine.executor.doorbell = -1
        if self._outbox:
            self._loop_call(self._deliver)

    def _loop_call(self, function: Callable, *args: object) -> None:
        assert self._loop is not None, "the thread starts with a loop"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(function, *args)

    # --- event loop

    def _answer(self, bell: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(bell)
        self._deliver()

    def _deliver(self) -> None:
        while self._outbox:
            for output in self._outbox.popleft():
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put(output)
                    if output.is_finished:
                        del self._streams[output.request_id]
        if self.engine.metrics is not None:
            self.engine.metrics.book_steps()

    def _fail_all(self) -> None:
        """Whatever ended the thread, nobody may wait for it."""
        streams, self._streams = self._streams, {}
        for item in self._inbox:
            if isinstance(item, _Call):
                _settle(item.future, None, RuntimeError("the engine has stopped"))
        for request_id, stream in streams.items():
            stream.put(_error(request_id, "The engine stopped before this request was finished.", 503))


def _settle(future: asyncio.Future[T], value: T, error: Exception | None) -> None:
    if future.done():  # nobody waits any more
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _error(request_id: str, message: str, status: int, param: str | None = None) -> RequestOutput:
    return RequestOutput(request_id, finish_reason="error", error=message, error_status=status, error_param=param)
