"""What `boomerang evaluate` is asked to do: its options, as a value that does not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _kind(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    name, separator, file = text.partition("=")
    if not separator or not name.replace("-", "_").isidentifier() or name == "worst":
        raise ValueError(f"{text!r} is not NAME=FILE (a name is a word, other than worst)")
    return name, Path(file)


def _width(text: Any) -> Any:
    from model_store.nested import WIDTHS

    bits = str(text).strip().lower().removeprefix("q")
    if not bits.isdecimal() or int(bits) not in WIDTHS:
        raise ValueError(f"{text!r} is none of {', '.join(f'q{width}' for width in WIDTHS)}")
    return int(bits)


def _of(default: Any, help: str, metavar: str | None = None, **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"metavar": metavar}, **limits)


class EvaluateJob(BaseModel):
    """One run. The fields are the command's options, and `thresholds` an order that the run has found. ValueError for
    options that do not fit together."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    teacher: str | None = _of(None, "folder, GGUF file or hub id [the default pair's]")
    student: str | None = _of(None, "folder or hub id of the student")
    patch_order: Literal["last_to_first", "first_to_last", "klpatch"] | None = _of(
        None, "measure this order, not the pair's own; klpatch: the one found on --calibration"
    )
    compare_orders: bool = _of(
        False, "also last-to-first and first-to-last, beside the pair's own; with --calibration, KLPatch too"
    )
    calibration: tuple[Path, ...] | None = _of(
        None, "files of text or conversations, not the held-out ones, on which a KLPatch order is searched"
    )
    calibration_windows: int = _of(8, "windows of each of them to use", ge=1)
    search: Literal["up", "down"] = _of(
        "up", "from the student up, or from the teacher down, which favours the large sizes"
    )
    search_places: int | None = _of(
        None,
        "search the first so many blocks that are added (--search down: the last); the others stay in the pair's order",
        ge=1,
    )
    adopt_order: bool = _of(False, "make the order of --patch-order the pair's own (in its pair.json)")
    text: Path | None = _of(None, "held-out text file; figures are taken on its first windows")
    kind: tuple[Annotated[tuple[str, Path], BeforeValidator(_kind)], ...] = _of(
        (),
        "held-out texts of several kinds, as code=source.txt: the pair keeps figures for each, and the kind on which a "
        "size is worst counts",
        metavar="NAME=FILE",
    )
    precisions: tuple[Annotated[int, BeforeValidator(_width)], ...] = _of(
        (), "of these, read from nested codes, measure what they cost on each kind of text, too", metavar="q6"
    )
    windows: int = _of(16, "windows of the text to use", ge=1)
    window_tokens: int = _of(512, "tokens of a window; its first has nothing to be predicted from", ge=2)
    chat: Path | None = _of(None, "file of held-out user messages, one per line: adds chat figures")
    chat_limit: int = _of(32, "messages to use", ge=1)
    max_new_tokens: int = _of(96, "longest answer of the chat checks", ge=1)
    repetition_penalty: float = _of(
        1.1, "the chat checks count repeating answers under this penalty too; 1: they do not", gt=0
    )
    sizes: str | None = _of(None, "sizes to measure, as 16L,20L,30L [all]")
    training_data: tuple[Path, ...] = _of(
        (),
        "files trained on: --text and --chat must not be in them, nor in the text of which `distill` left a "
        "fingerprint with the pair",
    )
    allow_overlap: float = _of(
        0.0, "share of 13-word runs, and of shorter texts, that may be in the training text", ge=0, le=1
    )
    speed: bool = _of(False, "also time each size: tokens per second of one request")
    dtype: Literal["bfloat16", "float32"] = _of("bfloat16", "of the weights")
    device: str = _of("cpu", "auto, cpu, cuda or cuda:N")
    report: Path | None = _of(None, "folder for quality.md, quality.svg and quality.html")
    no_store: bool = _of(False, "do not write quality.json into the pair")
    store: str | None = _of(None, "folder of the local model store")
    thresholds: tuple[int, ...] | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check(self) -> EvaluateJob:
        if self.text is None and self.chat is None and not self.speed and not self.kind:
            raise ValueError("nothing to measure: give --text, --kind, --chat, --speed or several of them")
        for option, paths in (
            ("text", [self.text]), ("chat", [self.chat]), ("kind", [path for _, path in self.kind]),
            ("calibration", self.calibration or ()), ("training-data", self.training_data),
        ):  # fmt: skip
            for path in paths:
                if path is not None and not path.exists():
                    raise ValueError(f"--{option}: there is no {path}")
        if len({name for name, _ in self.kind}) < len(self.kind):
            raise ValueError("--kind: two texts have the same name")
        if self.precisions and not self.kind:
            raise ValueError("--precisions: widths are measured by kind of text: name some with --kind")
        if self.patch_order == "klpatch" and self.calibration is None:
            raise ValueError("--patch-order klpatch: name the text to search the order on with --calibration")
        if self.calibration is not None and self.patch_order != "klpatch" and not (self.compare_orders and self.text):
            raise ValueError(
                "--calibration: no order is searched without --patch-order klpatch, or --compare-orders and --text"
            )
        if (self.search != "up" or self.search_places is not None) and self.calibration is None:
            raise ValueError("--search, --search-places: no order is searched without --calibration")
        if self.adopt_order and (self.patch_order is None or self.no_store):
            raise ValueError("--adopt-order: name the order with --patch-order, and leave out --no-store")
        return self

    def chosen_sizes(self, known: Sequence[int]) -> list[int]:
        """Those of --sizes, or all; ValueError names one that the pair does not have."""
        if not self.sizes:
            return list(known)
        try:
            sizes = sorted({int(part.strip().upper().removesuffix("L")) for part in self.sizes.split(",")})
        except ValueError as error:
            raise ValueError(f"--sizes: {self.sizes!r} is not a list of sizes, as 16L,30L") from error
        if unknown := [size for size in sizes if size not in known]:
            raise ValueError(f"--sizes: the pair has no size {unknown[0]}L (it has {known[0]}L to {known[-1]}L)")
        return sizes
