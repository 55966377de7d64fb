"""The line that `boomerang chat` reads from a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

MORE_SIZES = ("auto", "student", "teacher")


class CommandCompleter(Completer):
    """/commands at the start of a line, sizes after /size."""

    def __init__(self, sizes: Sequence[str], commands: Mapping[str, str]) -> None:
        self._sizes, self._commands = (*MORE_SIZES, *sizes), commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, separator, rest = document.text_before_cursor.partition(" ")
        if separator:
            for size in self._sizes if command == "/size" else ():
                if size.lower().startswith(rest.lower()):
                    yield Completion(size, -len(rest))
        elif command.startswith("/"):
            for name, text in self._commands.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=text)


def make_session(
    sizes: Sequence[str], commands: Mapping[str, str], history: Path, **streams: Any
) -> PromptSession[str]:
    """Enter sends; Alt-Enter, or a backslash before Enter, begins a new line. What was typed is kept in `history`,
    which only its owner can read. `streams`: prompt_toolkit's input and output, the terminal's if not given."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=_history(history),
        completer=CommandCompleter(sizes, commands),
        complete_while_typing=True,
        multiline=True,
        prompt_continuation=lambda width, *_: " " * width,
        key_bindings=keys,
        **streams,
    )


def _history(file: Path) -> FileHistory | InMemoryHistory:
    """Without a place to write, the history lasts as long as the conversation."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("a"):
            return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
