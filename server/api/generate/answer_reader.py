"""Reads an answer's text as it comes: reasoning, content, tool calls. Whole answers go through the same reader.

Every decision depends on the text alone, never on how it was cut into pieces, and nothing that was handed out is taken
back: text that may yet turn out to be a call waits. Without tools and reasoning no reader is needed.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from typing import Any

from server.api.generate.answer_parts import CallPart, Part, Text, joined
from server.api.generate.json_text import BLANKS, ObjectScanner, call_arguments, is_json, parse, skip_blanks
from server.api.generate.thought import ThoughtReader, num_begun
from server.api.generate.tool_forms import MISTRAL, ToolForm

# Members of a bare call; another one shows that an answer in JSON is just that.
_CALL_MEMBERS = frozenset({"name", "arguments", "parameters", "type", "id"})
_MISTRAL_NAME = re.compile(r"[ \t\r\n]*([A-Za-z0-9_.:-]{1,256})(?:\[CALL_ID\]\w{1,256})?(\[ARGS\])?[ \t\r\n]*(?=\{)")
_MISTRAL_BEGUN = re.compile(
    r"[ \t\r\n]*(?:[A-Za-z0-9_.:-]{1,256}(?:\[[A-Z_]{0,8}\]?\w{0,256})?(?:\[[A-Z]{0,8}\]?)?[ \t\r\n]*)?"
)
# Characters behind opening marks that turned out to open no call, after which no more are looked for in this answer:
# each is read again from the next mark on, and a text may consist of nothing but marks.
_MOST_READ_AGAIN = 1 << 16


class AnswerReader:
    """One choice. `push` text as it comes, then `finish`; both return what became certain, in order."""

    def __init__(
        self,
        names: Collection[str] = (),
        form: ToolForm | None = None,
        *,
        is_forced: bool = False,
        allows_several: bool = True,
        thinks: bool = False,
        has_thought_begun: bool = False,
    ) -> None:
        """`names`: the functions; without any nothing is a call. `is_forced`: a grammar holds the text to one call.

        `thinks`: the template knows <think>; `has_thought_begun`: the prompt ends with it.
        """
        self._names = frozenset(names)
        self._form = form if self._names else None
        self._allows_several = allows_several
        self._buffer = ""  # not handed out yet
        self._blanks = ""  # trailing blanks of content, dropped if the answer ends in calls
        self._state = "forced" if is_forced else "lead"
        has_thought = not is_forced and (thinks or has_thought_begun)
        self._thought = ThoughtReader(has_thought_begun) if has_thought else None  # None: it is over, too
        self._strips_lead = False
        self.num_calls = 0
        self.is_partial = False  # the last call was cut short
        self._scanner: ObjectScanner | None = None
        self._num_read_again = 0
        self._list_at = 0
        self._found: list[tuple[str, str]] = []  # bare calls that count if nothing else follows
        self._sent = 0  # forced: arguments handed out
        self._parts: list[Part] = []
        self._is_final = self._is_cut = False

    @property
    def is_thinking(self) -> bool:
        return self._thought is not None

    def push(self, text: str) -> list[Part]:
        return self._run(text)

    def finish(self, is_cut: bool = False) -> list[Part]:
        """`is_cut`: the answer ended for want of tokens or at a stop string; a call that had begun is handed out."""
        self._is_final, self._is_cut = True, is_cut
        parts = self._run("")
        if not self.num_calls and self._blanks:
            parts.append(Text(self._blanks))
        return parts

    def _run(self, text: str) -> list[Part]:
        self._parts = []
        if self._thought is not None:
            self._parts += self._thought.read(text, self._is_final)
            if self._thought.rest is None:
                return self._parts
            text, self._strips_lead, self._thought = self._thought.rest, self._thought.has_begun, None
        self._buffer += text
        while getattr(self, f"_{self._state}")():
            pass
        return joined(self._parts)

    # --- states: True if there may be more to do

    def _lead(self) -> bool:
        """The answer proper begins."""
        rest = self._buffer.lstrip()
        if self._strips_lead:  # blanks between reasoning and answer belong to neither
            self._buffer = rest
        form = self._form
        if form is None or not form.bare:
            if self._strips_lead and not rest and not self._is_final:
                return False
            self._state = "text"
            return True
        if not self._is_final and form.prefix.startswith(rest):
            return False
        self._list_at = len(self._buffer) - len(rest)
        if form.prefix and rest.startswith(form.prefix):
            self._list_at += len(form.prefix)
            self._state = "bare"
        else:
            self._state = "bare" if rest[:1] == "{" else "text"
        return True

    def _text(self) -> bool:
        form = self._form
        if form is None or not form.opening or self._num_read_again > _MOST_READ_AGAIN:
            self._say(self._buffer)
            self._buffer = ""
            return False
        at = self._buffer.find(form.opening)
        if at >= 0:
            self._say(self._buffer[:at])
            self._buffer, self._state, self._scanner = self._buffer[at:], "call", None
            self._list_at = 0
            if form is MISTRAL:
                self._state = "mistral"
            return True
        end = len(self._buffer) if self._is_final else len(self._buffer) - num_begun(self._buffer, form.opening)
        self._say(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _call(self) -> bool:
        """The buffer begins with the opening mark: one JSON value, then the closing one."""
        form = self._form
        assert form is not None
        scanner = self._object(len(form.opening))
        if scanner is None:
            return False
        if scanner.is_broken:
            return self._reject()
        if scanner.end is None:
            if self._is_final:
                return self._partial(scanner) or self._reject()
            return False
        end = skip_blanks(self._buffer, scanner.end)
        rest = self._buffer[end:]
        if not rest.startswith(form.closing):
            if not form.closing.startswith(rest):
                return self._reject()
            if not self._is_final:
                return False
        call = self._read(scanner)
        end = min(end + len(form.closing), len(self._buffer))
        if call is None:
            self._say(self._buffer[:end])
        else:
            self._emit(*call)
        self._buffer, self._state = self._buffer[end:], "text"
        return True

    def _mistral(self) -> bool:
        """The buffer begins with [TOOL_CALLS]: an array of calls, or a name and its arguments."""
        start = len(MISTRAL.opening)
        at = skip_blanks(self._buffer, start)
        if self._buffer[at : at + 1] == "[":
            self._list_at, self._state = at + 1, "array"
            return True
        named = _MISTRAL_NAME.match(self._buffer, start)
        if named is None:
            begun = _MISTRAL_BEGUN.match(self._buffer, start)
            if not self._is_final and begun is not None and begun.end() == len(self._buffer):
                return False
            return self._reject()
        if named[1] not in self._names:
            return self._reject()
        scanner = self._object(named.end())
        assert scanner is not None
        if scanner.is_broken or (scanner.end is None and self._is_final):
            if self._is_cut and not scanner.is_broken:
                self._emit(named[1], self._buffer[named.end() :])
                self._buffer, self._state, self.is_partial = "", "text", True
                return True
            return self._reject()
        if scanner.end is None:
            return False
        arguments = self._buffer[named.end() : scanner.end]
        if not is_json(arguments):
            return self._reject()
        self._emit(named[1], arguments)
        self._buffer, self._state = self._buffer[scanner.end :], "text"
        return True

    def _array(self) -> bool:
        """Inside of [TOOL_CALLS][...: the next call, a comma, or the end. What is no call ends the list."""
        scanner = self._object(self._list_at)
        if scanner is None:
            return False
        if scanner.is_broken or (scanner.end is None and self._is_final):
            return (scanner.end is None and self._partial(scanner)) or self._reject()
        if scanner.end is None:
            return False
        end = skip_blanks(self._buffer, scanner.end)
        following = self._buffer[end : end + 1]
        if following not in ("", ",", "]"):
            return self._reject()
        if not following and not self._is_final:
            return False
        call = self._read(scanner)
        if call is None:
            return self._reject()
        self._emit(*call)
        # What remains is a list whose mark has been dealt with.
        self._buffer, self._scanner = MISTRAL.opening + "[" + self._buffer[end + 1 :], None
        self._list_at = len(MISTRAL.opening) + 1
        if following != ",":
            self._buffer, self._state = self._buffer[self._list_at :], "text"
        return True

    def _bare(self) -> bool:
        """Nothing but JSON objects so far: calls, if nothing else follows."""
        scanner = self._object(self._list_at)
        if scanner is None:
            return False
        known = scanner.members
        if scanner.is_broken or not self._could_be_call(scanner):
            return self._no_call()
        if scanner.end is None:
            if not self._is_final:
                return False
            if self._is_cut and "name" in known:
                self._emit_found()
                if self._partial(scanner):
                    return True
            return self._no_call()
        call = self._read(scanner)
        if call is None:
            return self._no_call()
        end = skip_blanks(self._buffer, scanner.end)
        following = self._buffer[end : end + 1]
        if not following and not self._is_final:
            return False
        self._found.append(call)
        self._scanner = None
        if following == ";":
            self._list_at = end + 1
            if not self._is_final or self._buffer[end + 1 :].strip():
                return True
            following = ""
        elif following == "{":
            self._list_at = end
            return True
        if following:
            return self._no_call()
        self._emit_found()
        self._buffer, self._state = "", "text"
        return False

    def _forced(self) -> bool:
        """By construction one call: its name is known early, its arguments are handed out as they come."""
        scanner = self._object(0)
        if scanner is None:
            return False
        self.is_partial = scanner.end is None
        name = self._member(scanner, "name")
        if name is None and self._is_final and len(self._names) == 1:
            name = next(iter(self._names))
        if name is None:
            return False
        if not self.num_calls:
            self.num_calls = 1
            self._parts.append(CallPart(0, "", _call_id(), name))
        end = len(self._buffer)
        if "arguments" in scanner.members:
            start, end = scanner.members["arguments"]
        elif scanner.open_name == "arguments" and scanner.open_at is not None:
            start = scanner.open_at
        else:
            return False
        if not self._sent:
            inside = self._buffer[start + 1 : end].lstrip(BLANKS)
            if not inside and not self._is_final:
                return False
            if inside[:1] == "}":  # blanks in an empty object are the grammar's, not the model's
                self._parts.append(CallPart(0, "{}"))
                self._sent = end
        if end > (begin := max(start, self._sent)):
            self._parts.append(CallPart(0, self._buffer[begin:end]))
            self._sent = end
        return False

    # --- parts

    def _object(self, start: int) -> ObjectScanner | None:
        """The object that begins behind `start`, scanned as far as it goes; None if there is nothing to see yet."""
        if self._scanner is None:
            if not self._is_final and not self._buffer[start:].lstrip(BLANKS):
                return None
            self._scanner = ObjectScanner(skip_blanks(self._buffer, start))
        self._scanner.scan(self._buffer)
        return self._scanner

    def _member(self, scanner: ObjectScanner, name: str) -> Any:
        """A complete member of the object being read, None if there is none or it is no text."""
        if name not in scanner.members:
            return None
        try:
            value = parse(self._buffer[slice(*scanner.members[name])])
        except ValueError:
            return None
        # Numbers are left as text: only what is quoted is a string.
        return value if self._buffer[scanner.members[name][0]] == '"' else None

    def _could_be_call(self, scanner: ObjectScanner) -> bool:
        """Whether what is known of a bare object is what a call looks like."""
        names = {*scanner.members, *([scanner.open_name] if scanner.open_name is not None else [])}
        if not names <= _CALL_MEMBERS:
            return False
        if "name" in scanner.members:
            return self._member(scanner, "name") in self._names
        if scanner.open_name != "name" or scanner.open_at is None:
            return True
        return self._buffer[scanner.open_at] == '"'

    def _read(self, scanner: ObjectScanner) -> tuple[str, str] | None:
        """(name, arguments as JSON text) of a complete object, None if it calls no given function."""
        try:
            value = parse(self._buffer[scanner.start : scanner.end])
        except ValueError:
            return None
        name = self._member(scanner, "name")
        if not isinstance(name, str) or name not in self._names or not isinstance(value, dict):
            return None
        key = "arguments" if "arguments" in scanner.members else "parameters"
        if key not in scanner.members:
            return name, "{}"
        arguments = call_arguments(self._buffer[slice(*scanner.members[key])])
        return None if arguments is None else (name, arguments)

    def _partial(self, scanner: ObjectScanner) -> bool:
        """Hand out a call that was cut short inside its arguments."""
        name = self._member(scanner, "name")
        if not self._is_cut or name not in self._names or scanner.open_at is None:
            return False
        if scanner.open_name not in ("arguments", "parameters") or self._buffer[scanner.open_at] != "{":
            return False
        self._emit(name, self._buffer[scanner.open_at :])
        self._buffer, self._state, self.is_partial = "", "text", True
        return True

    def _emit(self, name: str, arguments: str) -> None:
        if self.num_calls and not self._allows_several:
            return
        self._parts.append(CallPart(self.num_calls, arguments, _call_id(), name))
        self.num_calls += 1

    def _emit_found(self) -> None:
        for call in self._found:
            self._emit(*call)
        self._found = []

    def _reject(self) -> bool:
        """The mark at the buffer's beginning opens no call: it is text, and what follows is looked at anew."""
        assert self._form is not None
        if self._scanner is not None:
            self._num_read_again += self._scanner.num_scanned
        size = len(self._form.opening)
        self._say(self._buffer[:size])
        self._buffer, self._state, self._scanner = self._buffer[size:], "text", None
        return True

    def _no_call(self) -> bool:
        """An answer in JSON that calls nothing."""
        self._state, self._scanner, self._found = "text", None, []
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._form is None:
            self._parts.append(Text(text))
            return
        text = self._blanks + text
        end = len(text.rstrip())
        self._blanks = text[end:]
        if end:
            self._parts.append(Text(text[:end]))


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
