"""Log-probabilities in OpenAI's two shapes, and vLLM's `prompt_logprobs`.

The floats are passed on as they come: a client that compares a token's value with the best one's must see equality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.api.generate.tokenizer import ServingTokenizer
from server.api.http.sse import Written, entries_of, listed
from server.core.request import TokenLogprobs

# JSON has no infinity; this is what vLLM and OpenAI report for a token that cannot occur.
_LOWEST = -9999.0
_AT_ONCE = 5000  # log-probabilities


class LogprobFormatter:
    """Renders tokens for one request."""

    __slots__ = ("_as_ids", "_num_top", "_tokenizer")

    def __init__(self, tokenizer: ServingTokenizer, num_top: int, as_token_ids: bool = False) -> None:
        """`num_top` likeliest tokens at each position (-1: all); `as_token_ids` prints `token_id:7` for token 7."""
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_token_ids

    def count(self, num_positions: int, num_top: int | None = None) -> int:
        """Log-probabilities at so many positions, with `num_top` (None: its own) of the likeliest at each."""
        top = self._num_top if num_top is None else num_top
        return num_positions * (1 + (top if top >= 0 else self._tokenizer.vocab_size))

    def token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def legacy(
        self, entries: Sequence[TokenLogprobs | None], token_ids: list[int], offsets: list[int]
    ) -> dict[str, list[Any] | Written]:
        """The completions object. `entries[i]` is None where nothing precedes the token (first of the prompt)."""
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "tokens": [self.token(token_id) for token_id in token_ids],
            "top_logprobs": listed([self._written(entries, self._top_dict)]),
        }

    def _top_dict(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        if entry is None:
            return None
        top: dict[str, float] = {}
        # Likeliest first, so of two ids with the same text the larger value survives. The token itself always counts.
        for token_id, logprob in self._top(entry):
            top.setdefault(self.token(token_id), _finite(logprob))
        text = self.token(entry.token_id)
        top[text] = max(top.get(text, _LOWEST), _finite(entry.logprob))
        return top

    def _top(self, entry: TokenLogprobs) -> tuple[tuple[int, float], ...]:
        # The engine may have been asked for more, for the sake of `prompt_logprobs`.
        return entry.top if self._num_top < 0 else entry.top[: self._num_top]

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Written]:
        """The chat object: {"content": [{token, logprob, bytes, top_logprobs}]}."""
        return {"content": listed([self.chat_entries(entries)])}

    def chat_entries(self, entries: Sequence[TokenLogprobs]) -> bytes:
        """What is in that list: a part for `listed`."""
        return self._written(entries, self._chat_entry)

    def _written(self, entries: Sequence[Any], write: Callable[[Any], Any]) -> bytes:
        return entries_of(entries, write, max(_AT_ONCE // self.count(1), 1))

    def _chat_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        item = self._chat_token(entry.token_id, entry.logprob)
        item["top_logprobs"] = [self._chat_token(token_id, logprob) for token_id, logprob in self._top(entry)]
        return item

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.token(token_id),
            "logprob": _finite(logprob),
            "bytes": self._tokenizer.token_bytes(token_id),
        }

    def prompt(self, entries: list[TokenLogprobs | None], num_top: int) -> Written:
        """vLLM's `prompt_logprobs`: per position {token id: {logprob, rank, decoded_token}}.

        `num_top` of the likeliest (-1: all): the engine may have been asked for more, for the sake of `logprobs`.
        """

        def position(entry: TokenLogprobs | None) -> dict[str, dict[str, Any]] | None:
            if entry is None:
                return None
            found = {
                str(token_id): self._ranked(token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(entry.top if num_top < 0 else entry.top[:num_top], start=1)
            }
            found.setdefault(str(entry.token_id), self._ranked(entry.token_id, entry.logprob, entry.rank))
            return found

        return listed([self._written(entries, position)])

    def _ranked(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.token(token_id)}


def _finite(value: float) -> float:
    return max(value, _LOWEST)
