"""What a step's kernels read, as arrays: for steps of any kind, and the fixed places of recorded decode steps.

T = tokens, R = requests, B = most rows of a recorded step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from server.core.batch import ForwardBatch
from server.kernels.cuda.attention import Items
from server.kernels.cuda.layer import Lane
from server.kernels.cuda.staging import Upload
from server.kernels.cuda.widths import runs_of


def _chunk_items(batch: ForwardBatch, rows: np.ndarray, max_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of the requests `rows`, int32 [4, n] (token, queries, slot, position), and how many each request has."""
    counts = np.diff(batch.query_start)[rows]
    numbers = -(-counts // max_queries)
    first = np.repeat(np.cumsum(numbers) - numbers, numbers)
    begin = (np.arange(len(first)) - first) * max_queries  # of the item within its request
    owner = np.repeat(rows, numbers)
    lengths = np.minimum(np.repeat(counts, numbers) - begin, max_queries)
    start = batch.query_start[owner]
    items = np.stack((start + begin, lengths, batch.slots[owner], batch.positions[start] + begin))
    return items.astype(np.int32), numbers


@dataclass(slots=True)
class StepInputs:
    """A step's arrays on the device, in batch order; `lane` cuts out what some of the requests need."""

    batch: ForwardBatch
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    logits_rows: torch.Tensor
    updates: torch.Tensor  # of the block tables
    decode: torch.Tensor  # [4, n]
    chunks: torch.Tensor  # [4, n]
    decode_start: np.ndarray  # [R + 1], decode items of request r are [decode_start[r], decode_start[r + 1])
    chunk_start: np.ndarray
    chunk_keys: np.ndarray  # [n], of each chunk item
    no_limit: torch.Tensor  # a count that no row reaches
    widths: np.ndarray | None  # uint8 [T], on the host; None: all at the widest

    @classmethod
    def send(
        cls, batch: ForwardBatch, updates: np.ndarray, upload: Upload, max_queries: int, no_limit: torch.Tensor
    ) -> StepInputs:
        """Build the arrays and put them on their way."""
        counts = np.diff(batch.query_start)
        is_decode = counts == 1
        decode, decode_numbers = _chunk_items(batch, np.flatnonzero(is_decode), 1)
        chunks, chunk_numbers = _chunk_items(batch, np.flatnonzero(~is_decode), max_queries)
        starts = np.zeros((2, len(counts) + 1), np.int64)
        starts[0, 1:][is_decode] = decode_numbers
        starts[1, 1:][~is_decode] = chunk_numbers
        np.cumsum(starts, axis=1, out=starts)
        names = ("ids", "positions", "slots", "logits_rows", "updates", "decode", "chunks")
        slots = np.repeat(batch.slots, counts)
        arrays = [batch.input_ids, batch.positions, slots, batch.logits_rows, updates, decode, chunks]
        return cls(
            batch=batch,
            decode_start=starts[0],
            chunk_start=starts[1],
            chunk_keys=chunks[1] + chunks[3],
            no_limit=no_limit,
            widths=batch.widths_of(batch.query_start),
            **dict(zip(names, upload.send(arrays), strict=True)),
        )

    def lane(self, start: int, stop: int) -> Lane:
        """Requests [start, stop) of the batch."""
        tokens = self.batch.tokens(start, stop)
        begin, end = self.chunk_start[start], self.chunk_start[stop]
        items = (
            self._items(self.decode, self.decode_start[start], self.decode_start[stop], True),
            self._items(self.chunks, begin, end, False, int(self.chunk_keys[begin:end].max(initial=0))),
        )
        runs = runs_of(None if self.widths is None else self.widths[tokens])
        return Lane(self.positions[tokens], self.slots[tokens], self.no_limit, items, tokens.start, runs=runs)

    def joint_lane(self, start: int, stop: int, split: int, student_slots: int) -> Lane:
        """Requests [start, stop), of which those from `split` on are the student's.

        `student_slots` is added to their slots: block tables of all layers are one array, and theirs are further on.
        """
        lane, first = self.lane(start, stop), int(self.batch.query_start[split]) - int(self.batch.query_start[start])
        lane.slots = _moved(lane.slots, first, student_slots)
        for items, starts in zip(lane.items, (self.decode_start, self.chunk_start), strict=True):
            items.slots = _moved(items.slots, int(starts[split] - starts[start]), student_slots)
        lane.split = torch.full((1,), first, dtype=torch.int32, device=lane.slots.device)
        return lane

    def _items(self, items: torch.Tensor, start: int, stop: int, is_decode: bool, max_keys: int | None = None) -> Items:
        token, queries, slots, positions = items[:, start:stop]
        return Items(token, queries, slots, positions, count=self.no_limit, is_decode=is_decode, max_keys=max_keys)


def _moved(slots: torch.Tensor, first: int, offset: int) -> torch.Tensor:
    slots = slots.clone()
    slots[first:] += offset
    return slots


class DecodeInputs:
    """Fixed places for steps in which every request advances by one token.

    Side 0 holds the requests in batch order (largest size first), side 1 in reverse, so that both the rows on the
    teacher's side and those on the student's are a prefix at every station. How long the prefix is, `count` says.
    All rows read at `width`.
    """

    def __init__(
        self, max_rows: int, num_stations: int, device: torch.device, width: int,
        student_slots: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`student_slots` [stations], where both sides run together: what to add to the slots of the student's rows."""
        self.width = width
        self._shape, self._student_slots = (2, max_rows), student_slots
        num_values, num_joint = 6 * max_rows, 0 if student_slots is None else num_stations * max_rows
        self._upload = Upload(num_values + num_joint + 2 * num_stations + 1, np.int32, device)
        rows, joint, self._counts = self._upload.buffer.split((num_values, num_joint, 2 * num_stations + 1))
        self.ids, self._positions, self._slots = rows.view(3, 2, max_rows)
        self._joint_slots = joint.view(-1, max_rows)  # [stations, B]
        self._tokens = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._lengths = torch.ones(max_rows, dtype=torch.int32, device=device)

    def send(self, batch: ForwardBatch, splits: np.ndarray, width: int) -> None:
        """splits [stations]: how many requests run the teacher's block there; `width` is that of all rows."""
        self.width = width
        num = batch.num_requests
        rows = np.zeros((3, *self._shape), np.int32)
        for values, array in zip(rows, (batch.input_ids, batch.positions, batch.slots), strict=True):
            values[0, :num], values[1, :num] = array, array[::-1]
        counts = np.empty(2 * len(splits) + 1, np.int32)
        counts[:-1:2], counts[1::2], counts[-1] = splits, num - splits, num
        joint = np.zeros((0, self._shape[1]), np.int32)
        if self._student_slots is not None:
            is_student = np.arange(self._shape[1]) >= splits[:, None]
            joint = rows[2, 0] + (is_student * self._student_slots[:, None]).astype(np.int32)
        self._upload.send([rows, joint, counts])

    def widths(self, rows: int) -> np.ndarray:
        """Of the first rows, uint8."""
        return np.full(rows, self.width, np.uint8)

    def take_ids(self, ids: torch.Tensor) -> None:
        """Input ids that the host does not know yet, in batch order."""
        self.ids[0, : len(ids)] = ids
        self.ids[1, : len(ids)] = ids.flip(0)

    def lane(self, side: int, rows: int, station: int | None) -> Lane:
        """The first `rows` of a side; `station` says whose count holds (None: all requests)."""
        index = -1 if station is None else 2 * station + side
        count = self._counts[index:][:1]
        positions, slots = self._positions[side, :rows], self._slots[side, :rows]
        items = Items(self._tokens[:rows], self._lengths[:rows], slots, positions, count, is_decode=True)
        return Lane(positions, slots, count, (items,), 0, runs=((slice(0, rows), self.width),))

    def joint_lane(self, rows: int, station: int) -> Lane:
        """The first `rows` requests: the teacher's, and from the split on the student's."""
        lane = self.lane(0, rows, None)
        lane.slots = lane.items[0].slots = self._joint_slots[station, :rows]
        lane.split = self._counts[2 * station :][:1]
        return lane
