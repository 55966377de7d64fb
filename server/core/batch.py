"""One step's work as flat arrays: packed tokens, sorted by size, and the program of layers to run over them.

T = tokens of the step, R = requests, S = rows whose logits are wanted.

Requests are sorted by size, largest first. For any nested order the rows at or above a station's threshold are then a
prefix: they run the teacher's block, the rest run the student's layer. A step is thus a list of (layer, first request,
end request) segments over one packed hidden-state array: views only, no gather, no concatenation.

Where a student layer is a difference to the teacher layer it was kept from (or is that layer), both kinds of rows
share one segment: the teacher's weights pass once, and the rows from `split` on are the student's.

A request that has changed size may have several rows: tokens whose hidden state was kept before some station start
there and are left out of the segments below.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from operator import ne
from typing import NamedTuple

import numpy as np

from model_store.assembly import Elasticity, LayerPath
from server.core.request import LiveRequest
from server.core.state_rows import Part, StateCopy, parts_of, state_copies
from server.core.width import EXACT

Scheduled = list[tuple[LiveRequest, int]]  # (request, tokens it advances by)


class Segment(NamedTuple):
    """Run layer `layer` (global id) over requests [start, stop) of the sorted batch.

    With a `split`, requests [split, stop) run the student layer of the station instead, through the same products:
    its KV, its norms, its low-rank terms.
    """

    layer: int
    start: int
    stop: int
    station: int
    split: int | None = None


@dataclass(slots=True)
class ForwardBatch:
    """What an executor gets. All arrays are numpy, int32 unless noted; `block_tables` is shared, not copied."""

    requests: list[LiveRequest]  # [R], sorted by size descending; one may have several rows: each guess is one
    sizes: np.ndarray  # [R]
    input_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    query_start: np.ndarray  # [R + 1], tokens of request r are [query_start[r], query_start[r + 1])
    context_lens: np.ndarray  # [R], positions that hold KV after this step
    slots: np.ndarray  # [R], row of the block tables
    block_tables: np.ndarray  # [global layers, max_num_seqs, max_blocks]
    program: tuple[Segment, ...]  # in running order
    embed_cut: int  # requests [0, cut) take the teacher's embedding, the rest the student's
    norm_cut: int
    head_cut: int
    logits_rows: np.ndarray  # [S], token index of each wanted row, ascending
    logits_start: np.ndarray  # [R + 1], rows of request r are [logits_start[r], logits_start[r + 1])
    # [R'], rows of requests that get a new token: of one with guesses the first, and rows that follow are its own too.
    sample_requests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    # Rows (of those at `logits_rows`) that tokens are drawn from, ascending; int64.
    sample_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    # Only for executors with memory for hidden states. A token that is restored is in no segment below that station.
    saves: list[StateCopy] = field(default_factory=list)
    restores: list[StateCopy] = field(default_factory=list)
    depths: np.ndarray | None = None  # [R] layers that each row runs; None: all of its path
    # Batches of one layout (not 0) differ in input_ids, positions, context_lens and widths alone.
    layout: int = 0
    widths: np.ndarray | None = None  # uint8 [R], bits that each row reads; None: all at the widest

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def widths_of(self, starts: np.ndarray) -> np.ndarray | None:
        """Widths by what each row has several of: `starts` is `query_start` for tokens, `logits_start` for logits."""
        if self.layout or self.widths is None:  # while everybody decodes each has one
            return self.widths
        return np.repeat(self.widths, np.diff(starts))

    def tokens(self, start: int, stop: int) -> slice:
        """Token range of requests [start, stop)."""
        return slice(int(self.query_start[start]), int(self.query_start[stop]))


def build_batch(
    scheduled: Scheduled,
    elasticity: Elasticity,
    block_tables: np.ndarray,
    shared_stations: Collection[int] = (),
    page_size: int = 0,
) -> ForwardBatch:
    """Pack a plan into one batch.

    `shared_stations`: those at which the executor runs teacher and student rows through the same products.
    `page_size` is asked for where requests keep hidden states.
    """
    parts: list[Part] = []
    for request, count in scheduled:
        if request.resume_stop > request.num_computed_tokens:
            parts += parts_of(request, count, page_size)
        elif request.draft_token_ids:  # a row each, as in the steps that they stand for
            parts += [Part(request, request.num_computed_tokens + i, 1) for i in range(count)]
        else:
            parts.append(Part(request, request.num_computed_tokens, count))
    # Within a size rows of one width lie together, the widest first, and of these decode rows come first, so that
    # kernels meet runs of one-token rows. Rows that start above the embedding are last, so that segments are cut as
    # seldom as can be.
    parts.sort(key=lambda part: (-part.request.path.size, part.station, -part.request.width, part.num_tokens > 1))
    requests = [part.request for part in parts]
    counts = np.fromiter((part.num_tokens for part in parts), np.int32, len(parts))
    computed = np.fromiter((part.begin for part in parts), np.int32, len(parts))
    sizes = np.fromiter((request.path.size for request in requests), np.int32, len(requests))
    query_start = np.zeros(len(requests) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])

    input_ids = np.empty(query_start[-1], np.int32)
    positions = np.empty(query_start[-1], np.int32)
    logits_rows: list[int] = []
    logits_start = np.zeros(len(requests) + 1, np.int32)
    samples: list[int] = []
    sample_rows: list[int] = []
    stop = 0
    for row, (request, begin, count, _) in enumerate(parts):
        start, stop = stop, stop + count
        if request.draft_token_ids:
            # The last token or a guess after it; every row's logits tell whether the next guess was right.
            number = begin - request.num_computed_tokens
            input_ids[start] = request.draft_token_ids[number - 1] if number else request.output_token_ids[-1]
            positions[start] = begin
            sample_rows.append(len(logits_rows))
            logits_rows.append(start)
            logits_start[row + 1] = len(logits_rows)
            if not number:
                samples.append(row)
            continue
        if count == 1 and begin + 1 == request.num_tokens and request.output_token_ids:
            input_ids[start] = request.output_token_ids[-1]
            positions[start] = begin
        else:
            input_ids[start:stop] = request.token_ids(begin, begin + count)
            positions[start:stop] = np.arange(begin, begin + count, dtype=np.int32)
        is_last = begin + count == request.num_tokens
        if request.sampling.prompt_logprobs is not None and begin < request.num_prompt_tokens - 1:
            # Position i's logits score token i + 1, so the prompt's own rows end one before its last token.
            logits_rows.extend(range(start, start + min(count, request.num_prompt_tokens - 1 - begin)))
        elif request.sampling.pool:
            logits_rows.extend(range(start, stop))
        if is_last and request.sampling.max_tokens > 0:
            sample_rows.append(len(logits_rows))
            logits_rows.append(stop - 1)
            samples.append(row)
        logits_start[row + 1] = len(logits_rows)

    plan = _plan(elasticity, frozenset(shared_stations), sizes.tobytes())
    program = plan.program
    saves: list[StateCopy] = []
    restores: list[StateCopy] = []
    depths = None
    if any(request.keep_station or request.resume_stop for request in requests):
        saves, restores = state_copies(parts, page_size)
    if restores:
        starts = [part.station for part in parts]
        program = tuple(piece for segment in program for piece in _without(segment, starts))
        depths = sizes - np.array([part.request.path.starts[part.station] for part in parts], np.int32)
    return ForwardBatch(
        requests=requests,
        sizes=sizes,
        input_ids=input_ids,
        positions=positions,
        query_start=query_start,
        context_lens=computed + counts,
        slots=np.fromiter((request.slot for request in requests), np.int32, len(requests)),
        block_tables=block_tables,
        program=program,
        embed_cut=plan.embed_cut,
        norm_cut=plan.norm_cut,
        head_cut=plan.head_cut,
        logits_rows=np.asarray(logits_rows, np.int32),
        logits_start=logits_start,
        sample_requests=np.asarray(samples, np.int32),
        sample_rows=np.asarray(sample_rows, np.int64),
        saves=saves,
        restores=restores,
        depths=depths,
        widths=np.fromiter((request.width for request in requests), np.uint8, len(requests)),
    )


_LAYOUTS = itertools.count(1)  # of all engines: an executor may serve several


class BatchBuilder:
    """`build_batch` for one engine. While the same requests decode, a step takes over the layout of the one before."""

    def __init__(
        self, elasticity: Elasticity, block_tables: np.ndarray, shared_stations: Collection[int], page_size: int
    ) -> None:
        self._arguments = elasticity, block_tables, shared_stations, page_size
        self._lanes: list[tuple[LiveRequest, LayerPath, int]] = []  # of `_last`, as scheduled: request, path, slot
        self._last: ForwardBatch | None = None
        self._seen, self._widths = b"", np.zeros(0, np.uint8)  # widths of the rows of the last step

    def __call__(self, scheduled: Scheduled) -> ForwardBatch:
        lanes = []
        for request, count in scheduled:
            if count != 1 or not _is_decode(request):
                self._last = None
                return build_batch(scheduled, *self._arguments)
            lanes.append((request, request.path, request.slot))
        last = self._last
        if last is None or lanes != self._lanes:
            last = self._last = build_batch(scheduled, *self._arguments)
            self._lanes = lanes
            last.layout = next(_LAYOUTS)
            return last
        requests = last.requests
        if not self._still_together(last):
            self._last = None
            return self(scheduled)
        positions = np.array([request.num_computed_tokens for request in requests], np.int32)
        return ForwardBatch(
            requests=requests,
            sizes=last.sizes,
            input_ids=np.array([request.output_token_ids[-1] for request in requests], np.int32),
            positions=positions,
            query_start=last.query_start,
            context_lens=positions + 1,
            slots=last.slots,
            block_tables=last.block_tables,
            program=last.program,
            embed_cut=last.embed_cut,
            norm_cut=last.norm_cut,
            head_cut=last.head_cut,
            logits_rows=last.logits_rows,
            logits_start=last.logits_start,
            sample_requests=last.sample_requests,
            sample_rows=last.sample_rows,
            layout=last.layout,
            widths=self._widths,
        )

    def _still_together(self, last: ForwardBatch) -> bool:
        """Whether rows of one size and width still lie side by side, in whatever order; brings `_widths` up to date."""
        now = bytes([request.width for request in last.requests])
        if now == self._seen:
            return True
        self._seen, self._widths = now, np.frombuffer(now, np.uint8)
        if now.count(now[0]) == len(now):
            return True
        points = (last.sizes * (EXACT + 1) + self._widths).tolist()
        return sum(map(ne, points, points[1:])) + 1 == len(set(points))


def _is_decode(request: LiveRequest) -> bool:
    """Whether the request's next token is its last one, and nothing else is to be done for it."""
    computed, num_output = request.num_computed_tokens, len(request.output_token_ids)
    return (
        num_output > 0
        and computed + 1 == len(request.prompt_token_ids) + num_output
        and not request.draft_token_ids
        and not request.keep_station
        and request.resume_stop <= computed
    )


class _Plan(NamedTuple):
    """What only the sizes of the rows decide."""

    program: tuple[Segment, ...]
    embed_cut: int
    norm_cut: int
    head_cut: int


@lru_cache(maxsize=512)
def _plan(elasticity: Elasticity, shared_stations: frozenset[int], sizes: bytes) -> _Plan:
    """`sizes`: int32 [R], descending. While everybody decodes, one step's plan is the next one's."""
    negated = -np.frombuffer(sizes, np.int32)
    end = len(negated)

    def cut(threshold: int) -> int:
        return int(np.searchsorted(negated, -threshold, side="right"))  # rows of at least so many layers

    program: list[Segment] = []
    for station, threshold in zip(elasticity.stations, elasticity.thresholds, strict=True):
        split, first = cut(threshold), station.start
        if split < end and station.index in shared_stations:
            program.append(Segment(first, 0, end, station.index, split))
            first += 1
        elif split < end:
            program.append(Segment(elasticity.student_layer(station.index), split, end, station.index))
        if split:
            program.extend(Segment(t, 0, split, station.index) for t in range(first, station.stop))
    ends = (elasticity.embed_threshold, elasticity.norm_threshold, elasticity.head_threshold)
    return _Plan(tuple(program), *map(cut, ends))


def _without(segment: Segment, starts: list[int]) -> list[Segment]:
    """The segment without rows that start at a later station (`starts` [R])."""
    pieces: list[Segment] = []
    first = segment.start
    for row in range(segment.start, segment.stop + 1):
        if row < segment.stop and starts[row] <= segment.station:
            continue
        if first < row:
            split = None if segment.split is None else min(max(segment.split, first), row)
            pieces.append(segment._replace(start=first, stop=row, split=None if split == row else split))
        first = row + 1
    return pieces
