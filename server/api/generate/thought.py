"""The reasoning with which an answer may begin: `<think> ... </think>`, or without the first mark where the prompt ends
with it."""

from __future__ import annotations

from server.api.generate.answer_parts import Reasoning

THINK, THOUGHT = "<think>", "</think>"


class ThoughtReader:
    """Takes an answer's text as it comes until the reasoning is over, or turns out not to be there."""

    def __init__(self, has_begun: bool) -> None:
        self.has_begun = has_begun
        self.rest: str | None = None  # once it is over: the text behind it
        self._buffer = ""  # not handed out yet
        self._has_text = False

    def read(self, text: str, is_final: bool) -> list[Reasoning]:
        """What became certain; `is_final`: nothing follows `text`. Blanks around the reasoning are dropped."""
        self._buffer += text
        if not self.has_begun:
            opened = self._buffer.lstrip()
            if not opened.startswith(THINK):
                if is_final or not THINK.startswith(opened):
                    self.rest = self._buffer
                return []
            self.has_begun, self._buffer = True, opened[len(THINK) :]
        at = self._buffer.find(THOUGHT)
        if at >= 0:
            self.rest = self._buffer[at + len(THOUGHT) :]
            return self._hand_out(at)
        end = len(self._buffer)
        return self._hand_out(end if is_final else end - num_begun(self._buffer, THOUGHT))

    def _hand_out(self, end: int) -> list[Reasoning]:
        thought = self._buffer[:end].rstrip()
        self._buffer = self._buffer[len(thought) :]
        if not self._has_text:
            thought = thought.lstrip()
        self._has_text = self._has_text or bool(thought)
        return [Reasoning(thought)] if thought else []


def num_begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
