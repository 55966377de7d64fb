"""Jinja's sandbox keeps a template from the server's objects; this one keeps it from the server's time and memory.

A template is a program that comes with the model, and rendering it holds the event loop. Whatever it makes (text,
lists, numbers) is charged to one account, and what multiplies (padding, replacing, joining) is refused before it is
made. Lists count with everything in them wherever it occurs, so that none unfolds when it is printed or compared.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1 << 20  # rounds of all loops and macros together
MAX_CHARACTERS = 1 << 26  # all that is made, besides what grows with the conversation
MAX_SECONDS = 1.0  # of processor
MAX_POWER = 64
MAX_BITS = 1 << 15  # of a number
_MAX_COSTLY = 1 << 16  # characters given to a filter that looks at them slowly
_PASSES = 32  # over the conversation's own text
_ENTRY = 16  # characters' worth of memory that an entry of a list takes
_TICKS = 64  # between two looks at the clock

_TEXTS = (str, bytes)
_OWNERS = (str, bytes, int)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d+|\*)?(?:\.(\d+|\*))?")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
_DIGITS = re.compile(r"\d+")


class _Namespace(Namespace):
    def __repr__(self) -> str:  # not what is in it, which may be itself, many times over
        return "<Namespace>"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates whose rendering is bounded. One at a time: `begin` opens a new account."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self.begin()

    def begin(self, num_given: int = 0) -> None:
        """`num_given`: characters of the conversation, which a template may go over several times."""
        self._num_steps = self._num_ticks = self._spent = 0
        self._most = MAX_CHARACTERS + _PASSES * num_given
        self._deadline = time.thread_time() + MAX_SECONDS
        self._weights: dict[int, tuple[object, int]] = {}  # by identity, which lasts as long as the object is held

    def counted(self, source: str) -> jinja2.Template:
        """`from_string`, with everything charged that is not a call already."""
        self.begin()
        self.filters = {name: self._charging(name, call) for name, call in self.filters.items()}
        self.filters |= {"join": self._join, "charged": self.made}
        self.finalize = self._text
        tree = _Charging().visit(self.parse(source))
        step = nodes.EnvironmentAttribute("step")
        kinds = nodes.For, nodes.Macro, nodes.CallBlock
        loops: Iterator[nodes.For | nodes.Macro | nodes.CallBlock] = tree.find_all(kinds)
        for node in loops:
            node.body.insert(0, nodes.ExprStmt(step))
            if isinstance(node, nodes.For) and node.test is not None:  # rounds that it leaves out are rounds as well
                node.test = nodes.And(step, node.test)
        tree.set_environment(self)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None), None)

    # --- the account

    @property
    def step(self) -> bool:
        """Counts when it is read, which compiled code does fastest."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise jinja2.TemplateError(f"it takes more than {MAX_STEPS} steps")
        self._tick()
        return True

    def _tick(self) -> None:
        self._num_ticks += 1
        if self._num_ticks % _TICKS == 0 and time.thread_time() > self._deadline:
            raise jinja2.TemplateError(f"it takes more than {MAX_SECONDS:g} s")

    def _afford(self, size: int) -> None:
        if self._spent + size > self._most:
            raise jinja2.TemplateError(f"it makes more than {self._most} characters")

    def made(self, value: Any) -> Any:
        """`value`, paid for."""
        self._tick()
        if isinstance(value, _TEXTS):
            self._spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self._spend(_ENTRY * len(value))
            self._weigh(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise jinja2.TemplateError(f"a number of more than {MAX_BITS} bits")
        return value

    def _spend(self, size: int) -> None:
        self._afford(size)
        self._spent += size

    def _weigh(self, value: Any) -> int:
        """Characters and entries in a value, each as often as it occurs. TemplateError if it would unfold too far."""
        if isinstance(value, _TEXTS):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        inner: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        weight = _ENTRY * len(value) + sum(map(self._weigh, inner))
        if weight > self._most:
            raise jinja2.TemplateError(f"a list that unfolds to more than {self._most} characters")
        self._weights[id(value)] = value, weight
        return weight

    # --- where things are made

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        for value in (*args, *options.values()):
            if isinstance(value, _CONTAINERS):
                __self._weigh(value)
        if isinstance(owner, _OWNERS):
            if __obj.__name__ == "join":
                args = tuple(map(list, args))
            bound = _BOUNDS.get(f".{__obj.__name__}") or _BOUNDS.get(__obj.__name__)
            if bound is not None:
                __self._afford(bound(__self, owner, *args, **options))
        return __self.made(super().call(__context, __obj, *args, **options))

    def _charging(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        bound, skipped = _BOUNDS.get(name), int(hasattr(call, "jinja_pass_arg"))

        @functools.wraps(call)
        def charged(*args: Any, **options: Any) -> Any:
            if bound is not None:
                self._afford(bound(self, *args[skipped:], **options))
            return self.made(call(*args, **options))

        return charged

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > MAX_POWER:
            raise jinja2.TemplateError(f"a power above {MAX_POWER}")
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(times, int):
                    self._afford(self._weigh(one) * times)
        if operator == "%" and isinstance(left, str | bytes):
            self._afford(_percent(self, left, right))
        return self.made(self.binop_table[operator](left, right))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]  # a function there, called as this is
        texts = []
        for part in parts:
            self._spend(len(part))
            texts.append(part)
        return "".join(texts)

    def _text(self, value: Any) -> Any:
        """What is printed; text is charged with its block."""
        if isinstance(value, str):
            return value
        self._weigh(value)
        return self.made(str(value))

    def _join(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        d, texts = str(d), []
        for item in value:
            texts.append(self._text(item))
            self._spend(len(d))
        return self.made(d.join(texts))


class _Charging(NodeTransformer):
    """Charges lists as they are written and parts of them; `~` is `join`."""

    def visit_List(self, node: nodes.List, *args: Any) -> nodes.Node:
        return _filter(self.generic_visit(node, *args), "charged")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple, *args: Any) -> nodes.Node:
        inner = self.generic_visit(node, *args)
        return _filter(inner, "charged") if node.ctx == "load" else inner

    def visit_Getitem(self, node: nodes.Getitem, *args: Any) -> nodes.Node:
        inner = self.generic_visit(node, *args)
        return _filter(inner, "charged") if isinstance(node.arg, nodes.Slice) else inner

    def visit_Concat(self, node: nodes.Concat, *args: Any) -> nodes.Node:
        self.generic_visit(node, *args)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# --- how large the outcome of what multiplies may be, from its arguments

Env = TemplateEnvironment


def _padded(env: Env, text: Any, *args: Any, **options: Any) -> int:
    return max((value for value in (*args, *options.values()) if isinstance(value, int)), default=0)


def _in_parts(env: Env, text: Any, *args: Any, **options: Any) -> int:
    return _ENTRY * _padded(env, text, *args, **options)


def _indented(env: Env, text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    return (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _replaced(env: Env, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    if isinstance(text, bytes):
        return text.count(old) * len(new)
    return str(text).count(str(old)) * len(str(new))


def _joined(env: Env, separator: str, items: list[Any]) -> int:
    return env._weigh(items) + len(items) * len(separator)


def _as_json(env: Env, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> int:
    width = len(indent) if isinstance(indent, str) else indent or 0
    return env._weigh(value) * (1 + width + sum(map(env._weigh, options.values())))


def _rounded(env: Env, value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    if abs(precision) > MAX_POWER:
        raise jinja2.TemplateError(f"rounding to more than {MAX_POWER} digits")
    return 0


def _summed(env: Env, value: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):  # adding lists takes time that grows with the square
        raise jinja2.TemplateError("sum: of numbers only")
    return 0


def _translated(env: Env, text: Any, table: Any, *_: Any) -> int:
    values = table.values() if isinstance(table, dict) else ()
    return len(text) * max((len(value) for value in values if isinstance(value, str)), default=1)


def _costly(env: Env, value: Any, *args: Any, **options: Any) -> int:
    given = env._weigh(value)
    if given > _MAX_COSTLY:
        raise jinja2.TemplateError(f"more than {_MAX_COSTLY} characters for a filter that is slow")
    return given * (1 + sum(map(env._weigh, (*args, *options.values()))))


def _encoded(env: Env, text: Any, *codec: Any, **options: Any) -> int:
    is_plain = not options and all(str(one).lower() in ("utf-8", "utf8", "ascii", "latin-1") for one in codec[:1])
    return 4 * len(text) if is_plain else _costly(env, text)


def _percent(env: Env, text: Any, values: Any) -> int:
    given = values if isinstance(values, tuple) else (values,)
    number = max((abs(value) for value in given if isinstance(value, int)), default=0)
    total = len(text)
    for widths in _PERCENT.findall(text.decode("latin-1") if isinstance(text, bytes) else text):
        total += env._weigh(values) + sum(number if width == "*" else int(width[:10]) for width in widths if width)
    return total


def _formatted(env: Env, text: Any, *args: Any, **options: Any) -> int:
    return _percent(env, str(text), options or args)


def _braces(env: Env, text: str, *args: Any, **options: Any) -> int:
    values = [*args, *options.values()]
    most = env._weigh(values)
    if _NESTED_FIELD.search(text):
        most += max((abs(value) for value in values if isinstance(value, int)), default=0)
    return len(text) + text.count("{") * most + sum(int(digits[:10]) for digits in _DIGITS.findall(text))


# Filters by name; methods too, where those of the same name are not what the filter is.
_BOUNDS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    **dict.fromkeys(("batch", "slice"), _in_parts),
    **dict.fromkeys(("pprint", "urlize", "striptags", "xmlattr", "wordwrap"), _costly),
    **dict.fromkeys(("encode", "decode"), _encoded),
    **dict.fromkeys((".format", ".format_map"), _braces),
    "expandtabs": lambda env, text, tabsize=8: len(text) * tabsize,
    "indent": _indented,
    "replace": _replaced,
    ".join": _joined,
    "tojson": _as_json,
    "round": _rounded,
    "sum": _summed,
    "translate": _translated,
    "format": _formatted,
}
