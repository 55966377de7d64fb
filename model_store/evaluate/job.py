"""What `boomerang evaluate` is asked to do: its options, as a value that does not change."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """One run; the fields are the options of `add_arguments`, and `thresholds` an order that the run has found."""

    teacher: str | None
    student: str | None
    patch_order: str | None
    compare_orders: bool
    calibration: tuple[Path, ...] | None
    calibration_windows: int
    search: str
    search_places: int | None
    adopt_order: bool
    text: Path | None
    kind: tuple[tuple[str, Path], ...]
    precisions: tuple[int, ...]
    windows: int
    window_tokens: int
    chat: Path | None
    chat_limit: int
    max_new_tokens: int
    repetition_penalty: float
    sizes: str | None
    training_data: tuple[Path, ...]
    allow_overlap: float
    speed: bool
    dtype: str
    device: str
    report: Path | None
    no_store: bool
    store: str | None
    thresholds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> EvaluateJob:
        """From parsed options. ValueError for those that do not fit together."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if field.name in args}
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        job = cls(**frozen)
        job.check()
        return job

    def check(self) -> None:
        """ValueError names the option."""
        if self.text is None and self.chat is None and not self.speed and not self.kind:
            raise ValueError("nothing to measure: give --text, --kind, --chat, --speed or several of them")
        if len({name for name, _ in self.kind}) < len(self.kind):
            raise ValueError("--kind: two texts have the same name")
        if self.precisions and not self.kind:
            raise ValueError("--precisions: widths are measured by kind of text: name some with --kind")
        for name in ("windows", "calibration_windows", "chat_limit", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.window_tokens < 2:
            raise ValueError(
                "--window-tokens must be at least 2: a window's first token has nothing to be predicted from"
            )
        if self.patch_order == "klpatch" and self.calibration is None:
            raise ValueError("--patch-order klpatch: name the text to search the order on with --calibration")
        if self.calibration is not None and self.patch_order != "klpatch" and not (self.compare_orders and self.text):
            raise ValueError(
                "--calibration: no order is searched without --patch-order klpatch, or --compare-orders and --text"
            )
        if (self.search != "up" or self.search_places is not None) and self.calibration is None:
            raise ValueError("--search, --search-places: no order is searched without --calibration")
        if self.search_places is not None and self.search_places < 1:
            raise ValueError(f"--search-places: {self.search_places} is not a number of blocks from 1 up")
        if self.adopt_order and (self.patch_order is None or self.no_store):
            raise ValueError("--adopt-order: name the order with --patch-order, and leave out --no-store")

    def chosen_sizes(self, known: Sequence[int]) -> list[int]:
        """Those of --sizes, or all; ValueError names one that the pair does not have."""
        if not self.sizes:
            return list(known)
        try:
            sizes = sorted({int(part.strip().removesuffix("L")) for part in self.sizes.split(",")})
        except ValueError as error:
            raise ValueError(f"--sizes: {self.sizes!r} is not a list of layer counts") from error
        if unknown := [size for size in sizes if size not in known]:
            raise ValueError(f"--sizes: the pair has no size {unknown[0]} (it has {known[0]} to {known[-1]})")
        return sizes


def _kind(text: str) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if not separator or not name.replace("-", "_").isidentifier() or name == "worst":
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE (a name is a word, other than worst)")
    return name, Path(file)


def _width(text: str) -> int:
    from model_store.nested import WIDTHS

    bits = text.strip().lower().removeprefix("q")
    if not bits.isdecimal() or int(bits) not in WIDTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'q{width}' for width in WIDTHS)}")
    return int(bits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--teacher", help="folder, GGUF file or hub id (default: the default pair's)")
    add("--student", help="folder or hub id of the student")
    orders = ("last_to_first", "first_to_last", "klpatch")
    add("--patch-order", choices=orders, help="measure this order, not the pair's own; klpatch: the one found on "
        "--calibration")  # fmt: skip
    add("--compare-orders", action="store_true", help="also last-to-first and first-to-last, beside the pair's own; "
        "with --calibration, KLPatch too")  # fmt: skip
    add("--calibration", type=Path, nargs="+", help="files of text or conversations, not the held-out ones, on which a "
        "KLPatch order is searched")  # fmt: skip
    add("--calibration-windows", type=int, default=8, help="windows of each of them to use (default %(default)s)")
    add("--search", choices=("up", "down"), default="up", help="from the student up, or from the teacher down, which "
        "favours the large sizes (default %(default)s)")  # fmt: skip
    add("--search-places", type=int, metavar="N", help="search the first N blocks that are added (--search down: the "
        "last N); the others stay in the pair's own order")  # fmt: skip
    add("--adopt-order", action="store_true", help="make the order of --patch-order the pair's own (in its pair.json)")
    add("--text", type=Path, help="held-out text file; figures are taken on its first windows")
    add("--kind", type=_kind, nargs="+", default=[], metavar="NAME=FILE", help="held-out texts of several kinds, as "
        "code=source.txt: the pair keeps figures for each, and the kind on which a size is worst counts")  # fmt: skip
    add("--precisions", type=_width, nargs="*", default=[], metavar="q6", help="of these, read from nested codes, "
        "measure what they cost on each kind of text, too")  # fmt: skip
    add("--windows", type=int, default=16, help="windows of the text to use (default %(default)s)")
    add("--window-tokens", type=int, default=512, help="tokens of a window (default %(default)s)")
    add("--chat", type=Path, help="file of held-out user messages, one per line: adds chat figures")
    add("--chat-limit", type=int, default=32, help="messages to use (default %(default)s)")
    add("--max-new-tokens", type=int, default=96, help="longest answer of the chat checks (default %(default)s)")
    add("--repetition-penalty", type=float, default=1.1, help="the chat checks count repeating answers under this "
        "penalty too (default %(default)s; 1: they do not)")  # fmt: skip
    add("--sizes", help="sizes to measure, as 16,20,30 (default: all)")
    add("--training-data", type=Path, nargs="*", default=[], help="files trained on: --text and --chat must not be in "
        "them, nor in the text of which `distill` left a fingerprint with the pair")  # fmt: skip
    add("--allow-overlap", type=float, default=0.0, help="share of 13-word runs, and of shorter texts, that may be in "
        "the training text (default %(default).0f)")  # fmt: skip
    add("--speed", action="store_true", help="also time each size: tokens per second of one request")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default %(default)s)")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    add("--report", type=Path, help="folder for quality.md, quality.svg and quality.html")
    add("--no-store", action="store_true", help="do not write quality.json into the pair")
    add("--store", help="folder of the local model store")
