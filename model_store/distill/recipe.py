"""What a distillation run does: which layers are kept, the losses, and presets of the published recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Loss weights and sampling of a recipe; `align` multiplies the MEAN cosine distance over the aligned states."""

    ce: float
    kl: float
    align: float
    position_share: float
    pure_share: float  # share of rows that run the student alone; 1.0 is distillation without patching
    small_bias: float  # 1.0 spreads the sizes of the other rows evenly, more moves them towards small sizes
    order_noise: float
    warm_start: bool
    train_ends: bool
    train_single: bool
    optimizer: str
    unlikelihood: float = 0.0  # weight at tokens in a loop of a size's own words
    row_sizes: tuple[int, ...] = ()  # what the other rows draw from evenly; none: every size between the ends


PRESETS = {
    # Ours, for small budgets: a closed-form start, then random cuts of the served order.
    "stochastic": Preset(0.0, 1.0, 4.0, 0.4, 0.45, 1.7, 6.0, True, False, False, "muon"),
    # arXiv 2510.05064: CE + 0.1 KL + 2/(M + 1) times the sum of cosine distances, every parameter trained.
    "published": Preset(1.0, 0.1, 2.0, 1.0, 1.0, 1.0, 0.0, False, True, True, "adamw"),
    # arXiv 2608.22854 (ADAPT): five times the cosine weight.
    "adapt": Preset(1.0, 0.1, 10.0, 1.0, 1.0, 1.0, 0.0, False, True, True, "adamw"),
    # ADAPT, figure 10: alignment alone.
    "cosine": Preset(0.0, 0.0, 10.0, 1.0, 1.0, 1.0, 0.0, False, False, True, "adamw"),
}


def kept_layers(rule: str, num_layers: int) -> list[int]:
    """Teacher layers the student keeps. ValueError names what is wrong with the rule.

    "every-2nd" (or every-3rd, ...): layers 0, 2, 4, ... and the last, as published; a list "0,2,4,5"; a number N: the
    published rule with the step that leaves N layers, or evenly spread ones if no step does.
    """
    if match := re.fullmatch(r"every-(\d+)(?:st|nd|rd|th)", rule):
        step = int(match[1])
        if not 2 <= step < num_layers:
            raise ValueError(f"--keep {rule}: the step must be between 2 and {num_layers - 1}")
        return sorted({*range(0, num_layers, step), num_layers - 1})
    if re.fullmatch(r"\d+", rule):
        count = int(rule)
        if not 2 <= count < num_layers:
            raise ValueError(f"--keep {rule}: keep between 2 and {num_layers - 1} layers of {num_layers}")
        for step in range(2, num_layers):
            if len(kept := sorted({*range(0, num_layers, step), num_layers - 1})) == count:
                return kept
        return sorted({round(i * (num_layers - 1) / (count - 1)) for i in range(count)})
    try:
        kept = [int(part) for part in rule.split(",")]
    except ValueError as error:
        raise ValueError(f"--keep {rule!r} is neither every-2nd, a list of layers nor a number") from error
    if kept != sorted(set(kept)) or kept[0] != 0 or kept[-1] >= num_layers or len(kept) >= num_layers:
        raise ValueError(f"--keep {rule}: give ascending layers of 0..{num_layers - 1}, starting with 0, not all")
    return kept


def row_sizes(text: str | None) -> tuple[int, ...] | None:
    """The sizes that --row-sizes names, as "28L,28L,29L"; None if it is not given."""
    try:
        return None if text is None else tuple(int(part.strip().removesuffix("L")) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--row-sizes {text!r} is not a list of sizes, as 28L,28L,29L") from error


def with_overrides(preset: Preset, values: dict[str, Any]) -> Preset:
    """The preset with every option that was given on the command line (not None)."""
    import dataclasses

    known = {field.name for field in dataclasses.fields(preset)}
    return dataclasses.replace(preset, **{k: v for k, v in values.items() if k in known and v is not None})
