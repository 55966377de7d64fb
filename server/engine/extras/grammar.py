"""Constrained decoding: a compiled grammar that says which tokens may come next. llguidance does the parsing.

Every mask is bounded: llguidance gives up on one that costs more than its fuel. A constraint that gives up ends its own
request with `error`; it cannot hold up the batch. When masks are computed, and whose, is decided in `masks`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

# About 10 ms for one mask and 50 ms for the initial automaton at llguidance's quoted speeds.
LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """The grammar is not valid, or too complex."""


class Grammar:
    """The constraint of one sequence; used by the sampler in the engine thread."""

    __slots__ = ("_eos", "_mask", "_matcher", "error", "filled_at", "is_ready")

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int], mask: np.ndarray, is_ready: bool) -> None:
        """`mask`: int32 [ceil(V / 32)], of the first token where that `is_ready`; shared, and left as it is."""
        self._matcher = matcher
        self._eos = eos_token_ids
        self._mask = mask
        self.is_ready = is_ready
        self.filled_at = 0.0  # on the clock of time.monotonic
        self.error: str | None = None

    def bitmask(self) -> np.ndarray:
        """int32 [ceil(V / 32)], bit i of word w set if token 32 w + i may come next."""
        if not self.is_ready:
            mask = np.zeros_like(self._mask)
            if not self._fails():
                try:
                    self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                except BaseException as error:  # a panic in Rust is no Exception
                    self.error = f"the parser failed: {error}"
            self._take(mask)
        return self._mask

    def _take(self, mask: np.ndarray) -> None:
        if self._fails():  # end the sequence: only the end of text is left
            mask[:] = 0
            for token_id in self._eos or {0}:
                mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << (token_id % 32))
        self._mask, self.is_ready, self.filled_at = mask, True, time.monotonic()

    def accept(self, token_id: int) -> bool:
        """Advance over a sampled token; False if the constraint has failed."""
        self.is_ready = False
        try:
            is_accepted = not self._fails() and self._matcher.consume_token(token_id)
            return not self._fails() and is_accepted  # a token that is refused is an error, which is to be noted
        except BaseException as error:
            self.error = f"the parser failed: {error}"
            return False

    def is_terminated(self) -> bool:
        """Whether nothing but the end can follow."""
        return self.error is not None or self._matcher.is_stopped()

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self._eos, self._mask, self.is_ready)

    def _fails(self) -> bool:
        if self.error is None and self._matcher.is_error():
            self.error = self._matcher.get_error() or "the constraint failed"
        return self.error is not None


def fill_masks(grammars: Sequence[Any], num_threads: int) -> None:
    """Compute the masks of these grammars, as many at once as there are threads."""
    if len(grammars) > 1 and num_threads > 1:
        masks = np.zeros((len(grammars), len(grammars[0]._mask)), np.int32)
        matchers = [(grammar._matcher, row) for row, grammar in enumerate(grammars)]
        try:
            _threads(num_threads).unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks[0].nbytes, len(masks))
        except BaseException:  # a panic of one of them; each for itself shows whose
            pass
        else:
            for grammar, mask in zip(grammars, masks, strict=True):
                grammar._take(mask)
    for grammar in grammars:
        grammar.bitmask()


@functools.cache
def _threads(number: int) -> LLExecutor:
    return LLExecutor(number)


class GrammarCompiler:
    """Turns grammar texts into constraints for one vocabulary. Thread-safe; compiling releases the GIL."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)

    def compile(self, grammar: str) -> Grammar:
        """A constraint in its first state, with its first mask, to be copied for each sequence. GrammarError if it is
        no good. Its copies share the lexer: the limit on states (`LIMITS`) is one for all of them."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        first = Grammar(matcher, self._eos, np.zeros((self._vocab_size + 31) // 32, np.int32), is_ready=False)
        first.bitmask()
        if first.error is not None:
            raise GrammarError(" ".join(first.error.split())[:300])
        return first
