"""JSON as text: where a value ends while it is still being written, and what its members are, digit for digit.

No number passes through a float here, and no text is written anew: what the model wrote is what is handed on.
"""

from __future__ import annotations

import json
import re
from typing import Any

BLANKS = " \t\r\n"
_BLANKS = re.compile(f"[{BLANKS}]*")
_IN_STRING = re.compile(r'["\\]')
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can name it, but no text can hold it
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: _refuse(name))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse(text: str) -> Any:
    """The value, with numbers left as text. ValueError if `text` is not one JSON value."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class ObjectScanner:
    """Follows one JSON object through a text that grows. Positions count from the beginning of that text.

    `end` is set once the object is closed, `is_broken` once it cannot become one. `members` are (begin, end) of the
    top-level values that are complete, by name; `open_name` and `open_at` are the one that is being written. Values
    are only delimited, not checked: that is `parse`'s work once there is an end.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.end: int | None = None
        self.is_broken = False
        self.members: dict[str, tuple[int, int]] = {}
        self.open_name: str | None = None
        self.open_at: int | None = None
        self._at = start
        self._expects = "{"  # at the top level: { name : value ,
        self._depth = 0  # inside the current value
        self._string_at: int | None = None
        self._is_first = True

    @property
    def num_scanned(self) -> int:
        return self._at - self.start

    def scan(self, text: str) -> None:
        """Go on with `text`, which begins with all that was seen before."""
        while self._at < len(text) and self.end is None and not self.is_broken:
            if self._string_at is not None:
                if not self._rest_of_string(text):
                    return
            elif self._expects == "value":
                self._value(text)
            else:
                self._top_level(text)

    def _rest_of_string(self, text: str) -> bool:
        """False if the string goes on beyond `text`."""
        found = _IN_STRING.search(text, self._at)
        if found is None:
            self._at = len(text)
            return False
        if found[0] == "\\":
            if found.end() >= len(text):
                self._at = found.start()
                return False
            self._at = found.end() + 1
            return True
        self._at = found.end()
        begin, self._string_at = self._string_at, None
        if self._expects == "name":
            try:
                self.open_name, self._expects = parse(text[begin : self._at]), ":"
            except ValueError:
                self.is_broken = True
        elif self._depth == 0:
            self._close_value(self._at)
        return True

    def _top_level(self, text: str) -> None:
        character = text[self._at]
        if character in " \t\r\n":
            self._at += 1
        elif self._expects == "name" and character == '"':
            self._string_at = self._at
            self._at += 1
        elif character == "}" and (self._expects == "," or (self._expects == "name" and self._is_first)):
            self._at += 1
            self.end = self._at
        elif character == self._expects:
            self._at += 1
            if character == ":":
                self._expects, self.open_at = "value", None
            else:
                self._is_first = character == "{"
                self._expects = "name"
        else:
            self.is_broken = True

    def _value(self, text: str) -> None:
        character = text[self._at]
        if self.open_at is None:
            if character in " \t\r\n":
                self._at += 1
                return
            if character in ",}]:":
                self.is_broken = True
                return
            self.open_at = self._at
        if character == '"':
            if self._depth == 0 and self._at != self.open_at:
                self.is_broken = True
                return
            self._string_at = self._at
        elif character in "{[":
            if self._depth == 0 and self._at != self.open_at:
                self.is_broken = True
                return
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._at += 1
                self._close_value(self._at)
                return
        elif self._depth == 0 and character in ",} \t\r\n]":  # a number or a word ends where something else begins
            self._close_value(self._at)
            return
        self._at += 1

    def _close_value(self, end: int) -> None:
        assert self.open_name is not None and self.open_at is not None
        self.members[self.open_name] = (self.open_at, end)
        self.open_name = self.open_at = None
        self._expects = ","


def call_arguments(text: str) -> str | None:
    """The JSON object that a call's arguments are, as it was written; None if they are something else."""
    if text == "null":
        return "{}"
    if text.startswith('"'):  # an object within a string, as OpenAI's API itself has it
        text = _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", parse(text).strip())
        if not text:
            return "{}"
    return text if text.startswith("{") and is_json(text) else None


def is_json(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def skip_blanks(text: str, start: int) -> int:
    """The first position from `start` on that is no blank."""
    found = _BLANKS.match(text, start)
    assert found is not None, "matches nothing, too"
    return found.end()
