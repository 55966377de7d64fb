"""Constrained decoding: a compiled grammar that says which tokens may come next. llguidance does the parsing.

Every step is bounded: llguidance gives up on a mask that costs more than its fuel. A constraint that gives up ends
its own request with `error`; it cannot hold up the batch.
"""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

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

    __slots__ = ("_eos", "_mask", "_matcher", "_num_words", "error")

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._num_words = (vocab_size + 31) // 32
        self._eos = eos_token_ids
        self._mask = np.zeros(self._num_words, dtype=np.int32)
        self.error: str | None = None

    def bitmask(self) -> np.ndarray:
        """int32 [ceil(V / 32)], bit i of word w set if token 32 w + i may come next. Valid until the next call."""
        if not self._fails():
            try:
                self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            except BaseException as error:  # a panic in Rust is no Exception
                self.error = f"the parser failed: {error}"
        if self._fails():  # end the sequence: only the end of text is left
            self._mask[:] = 0
            for token_id in self._eos or {0}:
                self._mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << (token_id % 32))
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Advance over a sampled token; False if the constraint has failed."""
        try:
            return not self._fails() and self._matcher.consume_token(token_id) and not self._fails()
        except BaseException as error:
            self.error = f"the parser failed: {error}"
            return False

    def is_terminated(self) -> bool:
        """Whether nothing but the end can follow."""
        return self.error is not None or self._matcher.is_stopped()

    def _fails(self) -> bool:
        if self.error is None and self._matcher.is_error():
            self.error = self._matcher.get_error() or "the constraint failed"
        return self.error is not None


class GrammarCompiler:
    """Turns grammar texts into constraints for one vocabulary. Thread-safe; compiling releases the GIL."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher in its first state; copy it for each sequence (`start`). GrammarError if it is no good."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(" ".join(matcher.get_error().split())[:300])
        return matcher

    def start(self, matcher: LLMatcher) -> Grammar:
        return Grammar(matcher.deep_copy(), self._vocab_size, self._eos)
