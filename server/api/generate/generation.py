"""One HTTP request's sequences: submitted, followed, detokenised, and aborted when nobody wants them any more."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from server.api.generate.detokenizer import Detokenizer
from server.api.generate.submission import PromptInput, Submission
from server.api.http.errors import APIError
from server.core.request import Request, RequestOutput, SamplingParams, TokenLogprobs
from server.core.width import EXACT, precision_name
from server.engine.async_engine import OutputStream, merge
from server.sizing.spec import size_name

if TYPE_CHECKING:
    import numpy as np

    from server.api.http.state import ServerState

_serial = itertools.count()


@dataclass(slots=True)
class Delta:
    """What is new for one choice. `logprobs` and `offsets` are parallel to `token_ids`, if logprobs were asked for."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    offsets: list[int]  # where the text of each token begins
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice while it is being generated."""

    index: int
    prompt: PromptInput
    request: Request
    detokenizer: Detokenizer
    text_start: int = 0  # characters of echoed prompt in front of the text
    stream: OutputStream | None = None
    is_queued: bool = False
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: np.ndarray | None = None  # float32 [E], of a request that asked, once it is finished
    scheduled_time: float | None = None  # these on the clock of `Request.arrival_time`
    first_token_time: float | None = None
    last_token_time: float | None = None
    is_finished: bool = False
    finish_reason: str | None = None

    @property
    def outputs(self) -> OutputStream:
        """Once it has been submitted."""
        assert self.stream is not None
        return self.stream

    @property
    def prompt_scores(self) -> list[TokenLogprobs | None]:
        """One entry per prompt token; a prompt of one token has nothing to score, and the engine sends nothing."""
        return self.prompt_logprobs or [None] * len(self.prompt.token_ids)

    def feed(self, output: RequestOutput) -> Delta:
        """Turn engine output into text. Sets `is_finished` when a stop string ends the sequence early."""
        sampling, detokenizer = self.request.sampling, self.detokenizer
        token_ids = output.new_token_ids
        offsets: list[int] = []
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.pooled is not None:
            self.pooled = output.pooled
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        last = len(token_ids) - 1
        for position, token_id in enumerate(token_ids):
            if output.new_logprobs is not None:
                offsets.append(self.text_start + detokenizer.offset(token_id))
            ended_by_token = (
                position == last
                and finish_reason == "stop"
                and (token_id in sampling.eos_token_ids or token_id in sampling.stop_token_ids)
            )
            if ended_by_token and not detokenizer.includes_stop:
                break  # the stop token counts, but is no part of the text
            if detokenizer.push(token_id):
                # Tokens that the engine produced past the stop string are not part of the answer.
                token_ids = token_ids[: position + 1]
                finish_reason, stop_reason = "stop", detokenizer.stop_string
                break
        self.num_output_tokens += len(token_ids)
        logprobs = None if output.new_logprobs is None else output.new_logprobs[: len(token_ids)]
        if finish_reason is not None:
            if detokenizer.finish():
                finish_reason, stop_reason = "stop", detokenizer.stop_string
            self.is_finished, self.finish_reason = True, finish_reason
        text = detokenizer.take(is_final=finish_reason is not None)
        return Delta(self.index, text, token_ids, logprobs, offsets, finish_reason, stop_reason)


class Generation:
    """All choices of one HTTP request. Close it in any case: closing aborts what is unfinished."""

    def __init__(self, state: ServerState, submission: Submission) -> None:
        self.state = state
        self.submission = submission
        self.size = 0
        self.width = EXACT  # of the newest tokens
        self.reason = ""
        self.changes: list[tuple[int, int, int]] = []  # (size, width, output tokens before it) of the first choice
        self.num_changes = 0  # of size or of width, of the first choice
        self.num_tokens_at: Counter[int] = Counter()  # output tokens of the first choice, by width
        self._num_prompt_tokens = submission.num_prompt_tokens
        self._num_output_tokens = self._num_cached_tokens = 0
        self._first: RequestOutput | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.sequences: list[Sequence] = []
        for prompt, choices in zip(submission.prompts, submission.sampling, strict=True):
            for sampling in choices:
                self.sequences.append(self._sequence(len(self.sequences), prompt, sampling))

    def _sequence(self, index: int, prompt: PromptInput, sampling: SamplingParams) -> Sequence:
        asked, shares_cache = self.submission, self.state.settings.share_prefix_cache
        request = Request(
            request_id=f"{asked.answer_id}-{next(_serial)}",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            sizes=asked.sizes.sizes,
            size_reason=asked.sizes.reason,
            budget=asked.sizes.budget,
            priority=asked.sizes.priority,
            tenant=asked.caller.tenant,
            size_schedule=tuple((size, tokens) for size, tokens, _ in asked.sizes.schedule),
            width_schedule=tuple(width for _, _, width in asked.sizes.schedule),
            min_width=asked.sizes.min_width,
            max_width=asked.sizes.max_width,
            workload=asked.sizes.workload,
            # What is cached shows in an answer's `cached_tokens` and in its time: each key has a cache of its own.
            cache_salt=asked.cache_salt if shares_cache else f"{asked.caller.tenant}\0{asked.cache_salt}",
            grammar=asked.grammar() if asked.grammar else None,
            arrival_time=asked.caller.arrival_time,
        )
        detokenizer = Detokenizer(
            self.state.tokenizer,
            prompt.token_ids,
            stop=asked.stop,
            include_stop=asked.include_stop,
            skip_special_tokens=asked.skip_special_tokens,
            min_tokens=sampling.min_tokens,
            marks=asked.marks,
        )
        return Sequence(index, prompt, request, detokenizer)

    # --- running

    async def start(self) -> None:
        """Submit, and wait until the first sequence has its size. APIError if it is refused.

        Where a policy picks the size, the other sequences are pinned to what it picked: one answer, one size.
        """
        waiting = sum(len(sequence.request.prompt_token_ids) for sequence in self.sequences)
        self.state.admission.check(self.sequences[0].request.tenant, len(self.sequences), waiting)
        for sequence in self.sequences:  # all of them now, though some are submitted later
            self.state.admission.enter(sequence.request.tenant, len(sequence.request.prompt_token_ids))
            sequence.is_queued = True
        seconds = self.state.settings.max_request_seconds
        if seconds:
            left = self.sequences[0].request.arrival_time + seconds - now()
            self._deadline = asyncio.get_running_loop().call_later(max(left, 0), self._expire, seconds)
        first, rest = self.sequences[0], self.sequences[1:]
        self._submit(first)
        is_pinned = len(first.request.sizes) == 1
        if is_pinned:
            for sequence in rest:
                self._submit(sequence)
        self._first = output = await anext(first.outputs)
        self._note(first, output)
        self._raise_if_failed(output)
        if not is_pinned:
            for sequence in rest:
                if self.size:
                    sequence.request = replace(sequence.request, sizes=(self.size,), size_reason=self.reason)
                self._submit(sequence)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Everything that follows, in the order in which it happens. APIError if a sequence fails."""
        assert self._first is not None  # `start` has come first
        if len(self.sequences) == 1:
            sequence = self.sequences[0]
            output, outputs = self._first, sequence.outputs
            while True:
                if output.finish_reason is not None:
                    self._raise_if_failed(output)
                delta = self._feed(sequence, output)
                yield delta
                if sequence.is_finished:
                    await self._retire(sequence, delta)
                    return
                output = await anext(outputs)
                self._note(sequence, output)
        else:
            async for delta in self._interleaved():
                yield delta

    async def _interleaved(self) -> AsyncIterator[Delta]:
        """Outputs of several sequences as they come; those of one that is not read in time are merged."""
        assert self._first is not None
        pending: dict[int, RequestOutput] = {0: self._first}
        ready = asyncio.Event()
        ready.set()

        async def follow(sequence: Sequence) -> None:
            async for output in sequence.outputs:
                self._note(sequence, output)
                before = pending.get(sequence.index)
                pending[sequence.index] = output if before is None else merge(before, output)
                ready.set()

        followers = [asyncio.ensure_future(follow(sequence)) for sequence in self.sequences]
        try:
            unfinished = len(self.sequences)
            while unfinished:
                await ready.wait()
                ready.clear()
                while pending:
                    index, output = pending.popitem()
                    sequence = self.sequences[index]
                    if sequence.is_finished:
                        continue
                    self._raise_if_failed(output)
                    delta = self._feed(sequence, output)
                    yield delta
                    if sequence.is_finished:
                        unfinished -= 1
                        await self._retire(sequence, delta)
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.gather(*followers, return_exceptions=True)

    async def close(self) -> None:
        """Abort whatever still runs. Safe to call twice."""
        if not self._is_closed and self._first is not None:
            longest = max(sequence.num_output_tokens for sequence in self.sequences)
            self.state.metrics.observe_choices(self.submission.n, longest)
        self._is_closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for sequence in self.sequences:
            self._leave_queue(sequence)
            if sequence.stream is not None:
                await sequence.stream.aclose()

    # --- parts

    def _feed(self, sequence: Sequence, output: RequestOutput) -> Delta:
        num_output, num_cached = sequence.num_output_tokens, sequence.num_cached_tokens
        delta = sequence.feed(output)
        self._num_output_tokens += sequence.num_output_tokens - num_output
        if sequence.index % self.submission.n == 0:
            self._num_cached_tokens += max(sequence.num_cached_tokens, 0) - max(num_cached, 0)
        return delta

    def _submit(self, sequence: Sequence) -> None:
        sequence.stream = self.state.async_engine.submit(sequence.request)

    def _note(self, sequence: Sequence, output: RequestOutput) -> None:
        if sequence.is_queued:
            self._leave_queue(sequence)
        if output.scheduled_time is not None:
            sequence.scheduled_time = output.scheduled_time
        if output.first_token_time is not None:
            sequence.first_token_time = output.first_token_time
        if output.last_token_time is not None:
            sequence.last_token_time = output.last_token_time
        if sequence.index:
            return
        if output.decision is not None:
            for decision in (*output.earlier_decisions, output.decision):
                if decision.size != self.size:
                    self.changes.append((decision.size, decision.width, decision.after_tokens))
                self.size, self.width, self.reason = decision.size, decision.width, decision.reason
            self.num_changes += 1
        if output.new_token_ids:
            if output.width != self.width:
                self.width = output.width
                self.num_changes += 1
            num_newest = len(output.new_token_ids)
            for width, count in output.earlier_widths:
                self.num_tokens_at[width] += count
                num_newest -= count
            self.num_tokens_at[output.width] += num_newest

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.is_queued:
            sequence.is_queued = False
            self.state.admission.leave(sequence.request.tenant, len(sequence.request.prompt_token_ids))

    async def _retire(self, sequence: Sequence, delta: Delta) -> None:
        """A stop string ends a sequence before the engine knows: tell it, and the metrics why."""
        is_stop_string = delta.finish_reason == "stop" and isinstance(delta.stop_reason, str)
        await sequence.outputs.aclose(str(delta.stop_reason) if is_stop_string else None)

    def _raise_if_failed(self, output: RequestOutput) -> None:
        if output.finish_reason == "error":
            raise APIError(
                output.error or "The engine failed.",
                param=output.error_param,
                status=output.error_status,
                retry_after=output.retry_after,
            )
        if output.finish_reason == "abort":
            raise APIError("The request was aborted because the server is stopping.", status=503)

    def _expire(self, seconds: float) -> None:
        message = f"The request took longer than the {seconds:g} s that this server allows."
        for sequence in self.sequences:
            if sequence.stream is not None and not sequence.is_finished:
                sequence.stream.put(
                    RequestOutput(sequence.request.request_id, finish_reason="error", error=message, error_status=408)
                )
                self.state.async_engine.abort(sequence.request.request_id)

    # --- reports

    def usage(self) -> dict[str, Any]:
        """Token counts so far, which may be asked for with every token of a thousand sequences. A prompt that `n`
        choices share counts once."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }

    @property
    def model_id(self) -> str:
        """The size that answers, as a model id; the name that was asked for where the operator wants it back."""
        if self.state.settings.echo_requested_model:
            return self.submission.model
        return self.state.catalog.model_id(self.size, self.width)

    def size_summary(self) -> dict[str, Any]:
        """The precision is the narrowest that made a token; `precisions` counts them where there are several."""
        width = min(self.num_tokens_at, default=self.width)
        summary = self.state.catalog.infos[self.size].summary(width, self.reason)
        if len(self.num_tokens_at) > 1:
            summary["precisions"] = {precision_name(width): n for width, n in sorted(self.num_tokens_at.items())}
        if len(self.changes) > 1:
            summary["changes"] = [
                {"layers": size, "precision": precision_name(width), "after_tokens": count}
                for size, width, count in self.changes
            ]
        return summary

    def timings(self) -> dict[str, float]:
        """Milliseconds of the first choice, in vLLM's names; those that are known by now."""
        sequence = self.sequences[0]
        scheduled, first, last = sequence.scheduled_time, sequence.first_token_time, sequence.last_token_time
        if scheduled is None or first is None or last is None:
            return {}
        num_tokens, arrival = sequence.num_output_tokens, sequence.request.arrival_time
        known = {
            "queue_time_ms": scheduled - arrival,
            "time_to_first_token_ms": first - arrival,
            "generation_time_ms": last - first,
        }
        if num_tokens > 1:
            known["mean_itl_ms"] = (last - first) / (num_tokens - 1)
        report = {name: round(seconds * 1000, 3) for name, seconds in known.items()}
        if num_tokens > 1 and last > first:
            report["tokens_per_second"] = round((num_tokens - 1) / (last - first), 3)
        return report

    def phases(self) -> list[tuple[str, float, float]]:
        """(name, begin, end) of what the first choice went through, on the clock of `time.monotonic`."""
        sequence = self.sequences[0]
        arrival = sequence.request.arrival_time
        marks = (arrival, sequence.scheduled_time, sequence.first_token_time, sequence.last_token_time)
        spans = zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False)
        return [(name, begin, end) for name, begin, end in spans if begin is not None and end is not None]

    def timing_report(self) -> dict[str, Any]:
        """`metrics` of an answer, where the operator wants them."""
        return {"metrics": self.timings()} if self.state.settings.enable_per_request_metrics else {}

    def headers(self) -> dict[str, str]:
        return {"x-boomerang-size": size_name(self.size, self.width), "x-boomerang-size-reason": self.reason}


def now() -> float:
    """The clock of `Request.arrival_time`."""
    return time.monotonic()
