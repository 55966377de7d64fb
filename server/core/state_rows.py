"""Which tokens of a step start from a hidden state kept before some station, and which leave theirs there.

R = rows of the step, T = its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from server.core.request import LiveRequest


class Part(NamedTuple):
    """`num_tokens` tokens of a request from position `begin` on, all of which start at `station` (0: the embedding)."""

    request: LiveRequest
    begin: int
    num_tokens: int
    station: int = 0


class StateCopy(NamedTuple):
    """Hidden states of some tokens before `station` runs, and where the executor keeps them. int32, [n] each."""

    station: int
    tokens: np.ndarray  # of the step's T
    rows: np.ndarray  # of the state memory, [state pages * page_size, hidden]


def parts_of(request: LiveRequest, count: int, page_size: int) -> list[Part]:
    """The next `count` tokens of a request that has changed size, cut where the station changes at which they start."""
    parts: list[Part] = []
    position, end = request.num_computed_tokens, request.num_computed_tokens + count
    while position < end:
        station, stop = 0, end
        if position < request.resume_stop:
            block = request.blocks[position // page_size]
            station = block.state_station if block.resumes else 0
            stop = min(end, request.resume_stop, (position // page_size + 1) * page_size)
        if parts and parts[-1].station == station:
            parts[-1] = parts[-1]._replace(num_tokens=parts[-1].num_tokens + stop - position)
        else:
            parts.append(Part(request, position, stop - position, station))
        position = stop
    return parts


def state_copies(parts: Iterable[Part], page_size: int) -> tuple[list[StateCopy], list[StateCopy]]:
    """(saves, restores) of a step whose rows are `parts`, by station."""
    saves: dict[int, tuple[list[int], list[int]]] = {}
    restores: dict[int, tuple[list[int], list[int]]] = {}
    token = 0
    for request, begin, count, station in parts:
        position, end, first = begin, begin + count, token - begin
        token += count
        if not station and not request.keep_station and not request.resume_stop:
            continue
        while position < end:
            index, offset = divmod(position, page_size)
            stop = min(end, (index + 1) * page_size)
            block = request.blocks[index]
            if block.state >= 0:
                tokens, rows = (restores if station else saves).setdefault(block.state_station, ([], []))
                tokens += range(first + position, first + stop)
                row = block.state * page_size + offset
                rows += range(row, row + stop - position)
            position = stop
    return _sorted(saves), _sorted(restores)


def _sorted(copies: dict[int, tuple[list[int], list[int]]]) -> list[StateCopy]:
    return [
        StateCopy(station, np.array(tokens, np.int32), np.array(rows, np.int32))
        for station, (tokens, rows) in sorted(copies.items())
    ]
