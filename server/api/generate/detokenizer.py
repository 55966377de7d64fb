"""Token ids to text as they arrive: whole characters only, stop strings found and held back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from tokenizers.decoders import DecodeStream

from server.api.generate.tokenizer import ServingTokenizer

# Tokens that precede the new ones in the decoder, so that a sentencepiece model keeps the first word's blank.
_CONTEXT_TOKENS = 6
# Tokens without certain text, beyond which all but the newest are settled: bytes that never become a character would
# pile up, and each look at them takes as long as they are many. No character takes more tokens than the newest are.
_MOST_PENDING, _NEWEST = 32, 4
_UNFINISHED = "\ufffd"


class Detokenizer:
    """One sequence's text: decode(prompt + output) less decode(prompt), as far as it is certain.

    `text` is what is decided so far, cut at a stop string. `take()` returns what may be sent: text that could still
    turn out to be the beginning of a stop string, and bytes of an unfinished character, wait for the next token.
    """

    def __init__(
        self,
        tokenizer: ServingTokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """`marks`: special tokens that are kept as this text, whatever `skip_special_tokens` says."""
        self._tokenizer = tokenizer.backend
        self._skip_special = skip_special_tokens
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._marks = (marks or {}) if skip_special_tokens else {}
        self._stream: DecodeStream | None = None
        self._stop = tuple(stop)
        self._sorted_stop = sorted(stop)  # those that begin with some text lie together, right of it
        self._shortest_stop = min(map(len, stop), default=0)
        # Where the first stop string begins that the text may be in the middle of. A place that begins none never will
        # again, so this only moves on: all of the text costs one comparison per character, however many strings.
        self._open = 0
        self.includes_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._context: list[int] = []  # tokens before those, whose text is known
        self._pending: list[int] = []  # tokens whose text is not known yet
        self._sent = 0
        self.text = ""
        self.stop_string: str | None = None
        self._settle(list(prompt_token_ids[-_CONTEXT_TOKENS:]))

    def push(self, token_id: int) -> bool:
        """Add a token. True if the text now contains a stop string (`stop_string`); push no more after that."""
        self._num_tokens += 1
        if token_id in self._marks:
            piece = self._rest() + self._marks[token_id]
            self._settle([])
        elif token_id in self._skipped:
            return False
        else:
            self._pending.append(token_id)
            piece = self._step(token_id)
        return bool(piece) and self._append(piece)

    def finish(self) -> bool:
        """No more tokens: bytes of an unfinished character become U+FFFD. True if that completed a stop string."""
        if not self._pending or self.stop_string is not None:
            return False
        piece = self._rest()
        self._settle([])
        return bool(piece) and self._append(piece)

    def offset(self, token_id: int) -> int:
        """Where the text of a token would begin that is pushed next."""
        if not self._pending:
            return len(self.text)
        known, settled = self._decode(self._context), self._context + self._pending
        before, after = self._decode(settled), self._decode([*settled, token_id])
        shared = _num_shared(before, after)
        if len(after) == len(before):  # more bytes of the character that is unfinished
            shared = min(shared, max(len(after) - 1, 0))
        return len(self.text) + max(shared - _num_shared(known, after), 0)

    def take(self, is_final: bool = False) -> str:
        """Text not returned before and safe to send."""
        is_held = self._stop and not is_final and self.stop_string is None
        end = self._open if is_held else len(self.text)
        if end <= self._sent:
            return ""
        piece = self.text[self._sent : end]
        self._sent = end
        return piece

    # --- tokens to text

    def _step(self, token_id: int) -> str:
        """The text that `token_id`, already pending, has made certain."""
        if len(self._pending) > _MOST_PENDING:
            self._stream = None
        if self._stream is not None:
            try:
                piece = self._stream.step(self._tokenizer, token_id)
            except Exception:  # it gives up on sequences that decode differently once more tokens follow
                self._stream = None
            else:
                if piece:
                    self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
                    self._pending = []
                return piece or ""
        # The library's stream repeats a prefix that ends inside a character (tokenizers 0.23.3): until there is a whole
        # one, texts are compared.
        piece = self._rest()
        if not piece or piece.endswith(_UNFINISHED):
            return self._decided() if len(self._pending) > _MOST_PENDING else ""
        self._settle(self._context + self._pending)
        return piece

    def _rest(self) -> str:
        """Text of the pending tokens as far as it differs from what came before them."""
        before, after = self._decode(self._context), self._decode(self._context + self._pending)
        return after[_num_shared(before, after) :]

    def _decided(self) -> str:
        """Text of all but the newest pending tokens, which are the only ones from here on; "" if it may yet change."""
        old, new = self._pending[:-_NEWEST], self._pending[-_NEWEST:]
        known, decided, all_of_it = map(self._decode, (self._context, self._context + old, self._context + old + new))
        is_open = len(decided) == len(all_of_it) and all_of_it.endswith(_UNFINISHED)
        if is_open or not all_of_it.startswith(decided):
            return ""
        self._context, self._pending = (self._context + old)[-_CONTEXT_TOKENS:], new
        return decided[_num_shared(known, decided) :]

    def _settle(self, token_ids: list[int]) -> None:
        """All text of these tokens is known: they only serve as context from here on."""
        self._context, self._pending = token_ids[-_CONTEXT_TOKENS:], []
        text = self._decode(self._context)
        self._stream = None
        if not text.endswith(_UNFINISHED):
            self._stream = DecodeStream(ids=list(self._context), skip_special_tokens=self._skip_special)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)

    # --- stop strings

    def _append(self, piece: str) -> bool:
        start = len(self.text)
        self.text += piece
        if not self._stop:
            return False
        found: tuple[int, str] | None = None
        if self._num_tokens >= self._min_tokens and len(self.text) - self._open >= self._shortest_stop:
            for stop in self._stop:
                at = self.text.find(stop, max(self._open, start - len(stop) + 1))
                if at >= 0 and (found is None or at < found[0]):
                    found = (at, stop)
        if found is None:
            while self._open < len(self.text) and not self._begins_a_stop(self.text[self._open :]):
                self._open += 1
            return False
        at, self.stop_string = found
        self.text = self.text[: at + len(self.stop_string) if self.includes_stop else at]
        return True

    def _begins_a_stop(self, text: str) -> bool:
        """Whether some stop string begins with `text` and goes on."""
        at = bisect_right(self._sorted_stop, text)
        return at < len(self._sorted_stop) and self._sorted_stop[at].startswith(text)


def _num_shared(one: str, other: str) -> int:
    """Length of what both begin with."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
