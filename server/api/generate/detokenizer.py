"""Token ids to text as they arrive: whole characters only, stop strings found and held back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from server.api.generate.tokenizer import ServingTokenizer

# Prompt tokens that precede the output in the decoder, so that a sentencepiece model keeps the first word's blank.
_CONTEXT_TOKENS = 6


class Detokenizer:
    """One sequence's text.

    `text` is what is decided so far, cut at a stop string. `take()` returns what may be sent: text that could still
    turn out to be the beginning of a stop string, and bytes of an unfinished character, wait for the next token.
    """

    __slots__ = (
        "_min_tokens",
        "_num_tokens",
        "_pending",
        "_sent",
        "_skip_special",
        "_stop",
        "_stream",
        "_tokenizer",
        "includes_stop",
        "stop_string",
        "text",
    )

    def __init__(
        self,
        tokenizer: ServingTokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer.backend
        self._skip_special = skip_special_tokens
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self.includes_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pending: list[int] = []  # tokens since the last complete text
        self._sent = 0
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> bool:
        """Add a token. True if the text now contains a stop string (`stop_string`); push no more after that."""
        self._num_tokens += 1
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # The library gives up on sequences that decode differently once more tokens follow; start afresh.
            piece = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special)
            self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        if not piece:
            return False
        self._pending.clear()
        return self._append(piece)

    def finish(self) -> bool:
        """No more tokens: bytes of an unfinished character become U+FFFD. True if that completed a stop string."""
        if not self._pending or self.stop_string is not None:
            return False
        piece = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special)
        self._pending.clear()
        return bool(piece) and self._append(piece)

    def take(self, is_final: bool = False) -> str:
        """Text not returned before and safe to send."""
        end = len(self.text)
        if self._stop and not is_final and self.stop_string is None:
            end -= self._held_back()
        if end <= self._sent:
            return ""
        piece = self.text[self._sent : end]
        self._sent = end
        return piece

    def _append(self, piece: str) -> bool:
        start = len(self.text)
        self.text += piece
        if not self._stop or self._num_tokens < self._min_tokens:
            return False
        found: tuple[int, str] | None = None
        for stop in self._stop:
            at = self.text.find(stop, max(start - len(stop) + 1, 0))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return False
        at, self.stop_string = found
        self.text = self.text[: at + len(self.stop_string) if self.includes_stop else at]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
