"""What the prefix cache shares and a request holds: a run of tokens with its pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.core.width import EXACT


@dataclass(slots=True, eq=False)
class Block:
    """One run of `page_size` tokens on all layers of one path. `hash` is set once full and cached."""

    pages: np.ndarray  # int32 [path.num_layers], in the path's running order
    ref_count: int = 1
    hash: bytes | None = None
    width: int = EXACT  # once full: the narrowest that it, or a block before it, was computed at
    state: int = -1  # page of hidden states before station `state_station`, of every token computed; -1: none
    state_station: int = 0
    resumes: bool = False  # its tokens are to be computed from `state` on: pages of the layers below are filled
