"""What an answer consists of, as it becomes certain."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(slots=True)  # not frozen, which would take twice as long to make for every token
class Text:
    """More of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A call begins (`id` and `name`), or its arguments go on (JSON text as the model wrote it)."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Part = Text | Reasoning | CallPart


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallPart) and isinstance(last, CallPart) and part.id is None:
            result[-1] = replace(last, arguments=last.arguments + part.arguments)
        else:
            result.append(part)
    return result
