"""The contract between the engine and whatever computes a step: everything an executor may be asked, in one place.

A new executor subclasses `Executor`, overrides the methods under "required", and of the rest what it can do; its
factory goes on the preference list in `server/model/executor.py`. Nothing else looks into an executor.

T = tokens of the step, R = requests, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from model_store.arrays import Array
from server.core.width import EXACT

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from model_store.blocks import Part
    from model_store.loaded import LoadedPair
    from model_store.weight_form import WeightForm
    from model_store.weights import EndWeights, LayerWeights
    from server.core.batch import ForwardBatch
    from server.core.config import EngineConfig
    from server.core.request import LiveRequest, TokenLogprobs
    from server.core.seen_tokens import SeenTokens


class Draw(NamedTuple):
    """How one token is drawn from one row of logits: min_p, top_k, top_p in that order, as `engine/sampler.py` says."""

    temperature: float  # 0: the likeliest token, and nothing else counts
    top_p: float
    min_p: float
    top_k: int  # 0: all
    uniform: float  # number of [0, 1); its 64 bits are the key of the race's noise


GREEDY = Draw(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, uniform=0.0)


class LogitOps(Protocol):
    """What the engine does with logits float32 [S, V], for an executor that leaves them on a device."""

    def take(self, logits: Array, rows: list[int]) -> Array:
        """A copy of some rows."""

    def mask(self, row: Array, allowed: np.ndarray) -> None:
        """-inf in place of what is not allowed, bool [V], in one row [V]."""

    def add(self, row: Array, tokens: np.ndarray, values: np.ndarray) -> None:
        """Add `values` float32 [n] to `tokens` int64 [n], each there once, of one row [V], in place."""

    def penalise(self, logits: Array, rows: Sequence[tuple[int, LiveRequest, SeenTokens]]) -> None:
        """CTRL's repetition penalty over prompt and answer, OpenAI's presence and frequency penalties over the answer.

        In place, in some rows: number of the row, request, what it has seen.
        """

    def token_logprobs(self, logits: Array, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
        """Logprob and rank of tokens[i] and the num_top[i] likeliest (-1: all) by row i. A token may be -1, where no
        logit is finite. Rows with equal `num_top` should stand together."""

    def probabilities(self, logits: Array, draws: Sequence[Draw]) -> Array:
        """[S, V] by temperature and min_p alone, each row's sum 1."""

    def log(self, weights: Array) -> Array:
        """The natural logarithm, -inf of 0."""


class PendingTokens(Protocol):
    """Tokens of a launched step, on their way to the host."""

    def wait(self) -> list[int]:
        """A token id per request of the batch, -1 where no logit is a finite number. Raises what the step raised."""


# Tokens of an earlier launch, and which of its rows each request of the next batch goes on from: int32 [R].
Follows = tuple[PendingTokens, np.ndarray]


class Executor:
    """Runs steps for one loaded pair. Owns its weights (it may repack them in place) and the KV memory.

    Not thread-safe: one thread at a time, the engine's, calls it once requests are served. Before that the thread that
    loads the model calls `describe`, `passed_over`, `page_bytes`, `allocate_kv` and what is about states and weights.

    `block_tables` of a batch index pages of one layer each. A page holds K and V of `page_size` tokens of one layer,
    [num_kv_heads, page_size, head_dim] each; how the pool is laid out in memory is the executor's business. A step may
    be run again with the same batch, or with parts of it, after it raised: it writes KV at the batch's own positions
    only, and nothing else that a later step would notice.
    """

    name: str  # what `--executor` calls it
    weight_form: WeightForm  # as matrices lie here, packing included; what size tables and budgets count

    # --- required

    def describe(self) -> str:
        """One line for the start-up log: where it runs, in which types."""
        raise NotImplementedError

    def page_bytes(self) -> int:
        """Bytes of one page, K and V together. Called before `allocate_kv`, to see how many fit."""
        raise NotImplementedError

    def allocate_kv(self, num_pages: int) -> None:
        """Allocate (or replace) the KV pool. ValueError, with what to lower, if there is no memory for it."""
        raise NotImplementedError

    def forward(self, batch: ForwardBatch) -> Array:
        """Run the batch's program, writing KV. Returns the final-normed hidden rows at `logits_rows`, [S, E], in an
        array of the executor's own kind, numpy's or torch's, for others to take rows of and to sum.

        The result is valid until the next `forward`. Afterwards pages hold the KV of every token of the batch. An
        executor with memory for states (below) has also restored and saved what the batch says.
        """
        raise NotImplementedError

    def logits(self, hidden: Array, num_teacher: int, widths: np.ndarray | None = None) -> Array:
        """Apply the head, the teacher's to rows [0, num_teacher), else the student's. [n, E] -> float32 [n, V].

        `widths` uint8 [n]: those of the rows; None: all at the widest. Called after `forward`, with (some of) its
        rows; the caller may write to the result: a numpy array, or what the executor's `logit_ops` take.
        """
        raise NotImplementedError

    logit_ops: LogitOps | None = None  # None: `logits` are numpy arrays

    # --- weights as they lie in memory: asked once after loading

    def matrix_bytes(self, num_rows: int, width: int) -> int:
        """Bytes that a weight matrix [num_rows, width] takes here. Override it where matrices are packed."""
        return self.weight_form.matrix_bytes(num_rows, width)

    # Bytes of one weight of a matrix as steps read it, at the widest. None: as it was loaded.
    bytes_per_weight: float | None = None

    # --- precision (`server.core.width`)

    # What rows may read, ascending. A batch's widths are among these; an executor with one width need not look at them.
    widths: tuple[int, ...] = (EXACT,)

    def bytes_per_weight_at(self, width: int) -> float | None:
        """`bytes_per_weight` of a step whose rows all read at this width."""
        return self.bytes_per_weight

    # --- how batches for it are made

    # Stations at which batches have one segment for teacher and student rows, with a `split`. Not supported: none, and
    # each side has segments of its own.
    shared_stations: frozenset[int] = frozenset()

    # --- tokens

    def greedy(self, hidden: Array, num_teacher: int, widths: np.ndarray | None = None) -> list[int]:
        """The likeliest token per row of `logits(hidden, num_teacher, widths)`; -1 where the largest is not finite.

        Called instead of `logits` where no request of the step wants more. Override it where the logits need not be
        written to memory for that.
        """
        logits = self.logits(hidden, num_teacher, widths)
        return np.where(np.isfinite(logits.max(axis=-1)), logits.argmax(axis=-1), -1).tolist()

    can_draw = False  # whether there is a `draw`; if not, the sampler draws, in numpy

    def draw(self, logits: Array, draws: list[Draw]) -> list[int]:
        """One token per row of logits [n, V], masks and penalties applied; -1 where no logit is a finite number."""
        raise NotImplementedError

    # --- a step ahead of the host (`engine/extras/lookahead.py`)

    can_launch = False  # whether there is a `launch`; if not, every step waits for its tokens

    def launch(self, batch: ForwardBatch, draws: list[Draw], *, follows: Follows | None = None) -> PendingTokens:
        """Run a step in which every request takes one token, and draw the next one of each, without waiting for it.

        `follows`: the input ids are what an earlier launch drew; the host need not know them yet. At most two are
        in flight: the one that is waited for and the one after it.
        """
        raise NotImplementedError

    can_ring = False  # whether `forward` rings the `doorbell`; if not, the engine wakes the event loop itself
    # An eventfd that the next `forward` writes to as soon as it computes outside the interpreter, -1: none. The engine
    # sets it before a step; `forward` sets it back to -1 as it takes it over.
    doorbell: int = -1

    # --- hidden states kept for changes of size

    def state_page_bytes(self) -> int:
        """Bytes of the hidden states of `page_size` tokens. 0: not supported, and batches neither save nor restore."""
        return 0

    def allocate_states(self, num_pages: int) -> None:
        """Memory for so many pages of states, which batches number. Called once at most, if a page takes any bytes."""
        raise NotImplementedError

    # --- weights given back while nobody needs them (`server/engine/sleep.py`)

    can_release = False  # whether there are `release` and `restore`

    def release(self, parts: Collection[Part]) -> int:
        """Give the memory of these parts' matrices back to the system; bytes of it. No step runs them before they are
        restored, each by itself."""
        raise NotImplementedError

    def restore(self, part: Part, weights: LayerWeights | EndWeights) -> None:
        """Take up a part again: the very tensors that the executor was made with, read anew, which it may keep. Any
        thread, while steps run other parts."""
        raise NotImplementedError

    # --- another student, while it serves

    can_change_student = False  # whether there is a `beside`; if not, another student takes another process

    def beside(self, pair: LoadedPair, config: EngineConfig) -> Executor:
        """One for the same teacher beside another student (`model_store.beside`), at the same widths.

        The teacher's weights, KV and states stay where they are; this one may run steps until the new one does. Called
        by the thread that loads the student.
        """
        raise NotImplementedError

    # --- for the operator and after a fault

    def passed_over(self) -> list[str]:
        """Better variants of this executor and why they do not run here, for the start-up log."""
        return []

    def kv_tensors(self) -> tuple[Array, ...]:
        """What holds KV, the page being the first dimension. Pages that may hold NaN are zeroed in it after a fault.

        Not supported: none, and padded positions must then not spread NaN.
        """
        return ()
