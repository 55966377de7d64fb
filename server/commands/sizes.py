"""`boomerang sizes`: what each size of a pair is, costs and is worth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from rich import box
from rich.console import Console
from rich.table import Table

from model_store import made
from model_store.pair import made_folder
from server.config import Settings
from server.forms import open_settings_pair, weight_form
from server.loading import points_file

if TYPE_CHECKING:
    from model_store.pair import Pair
    from model_store.weight_form import WeightForm


class SizesOptions(BaseModel):
    """Flags of `sizes`."""

    json_: bool = Field(False, description="print JSON")


def speed_file(store: str | None, pair: Pair, form: WeightForm) -> Path:
    """Where `bench latency` keeps what it measured for this pair, loaded in this form, on this machine."""
    from model_store.store import store_root
    from server.cost.calibrate import processor_name

    machine = "".join(c if c.isalnum() else "-" for c in processor_name())
    kind = "" if form.storage == "as loaded" else f"-{form.storage}"
    kind += "-difference" if form.low_rank else ""
    kind += "-int8-kv" if form.kv_cache_dtype == "int8" else ""
    return store_root(store) / "speed" / f"{pair.name}{kind}-{machine}.json"


_UNBEATEN = {"decode_1": "one request", "decode_16": "16 requests", "prefill": "prompts"}  # kinds of steps, in words


def _points_table(points: list[dict[str, Any]]) -> Table:
    """Points of depth and precision that are worth their time, as the last server on this machine measured them."""
    best = [point for point in points if point["best_in"]]
    kinds = list(points[0]["expected_kl"])
    table = Table(title="layers and bits, as a server measured them here", box=box.SIMPLE_HEAD)
    for name in ("size", *(f"KL, {kind}" for kind in kinds), "nothing beats it for"):
        table.add_column(name, justify="right")
    for point in best:
        about = "" if point["kl_is_measured"] else "~"
        where = ", ".join(_UNBEATEN.get(step, step) for step in point["best_in"])
        table.add_row(point["name"], *(f"{about}{point['expected_kl'][kind]:.3f}" for kind in kinds), where)
    table.caption = (
        f"~: estimated; left out: {len(points) - len(best)} for which another is as fast and nearer to the teacher"
    )
    return table


def print_sizes(options: SizesOptions, settings: Settings) -> int:
    """Print the table (or JSON) without loading a tensor. Speeds are those of the last `bench latency` here."""
    pair = open_settings_pair(settings)
    form = weight_form(settings, pair)
    rows = pair.size_table(form)
    file = speed_file(settings.store, pair, form)
    speeds: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for row in rows:
        row["speed"] = speeds.get("sizes", {}).get(str(row["size"]))
    file = points_file(settings.store, pair)
    points: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    progress = made.read_progress(made_folder(pair.teacher_path, settings.store))
    if options.json_:
        kinds = {"kinds": pair.kinds, "points": points, "making": progress and dataclasses.asdict(progress)}
        print(json.dumps({"pair": pair.name, "patch_order": pair.patch_order, "sizes": rows, **kinds}, indent=1))
        return 0
    student = ", low-rank student as a difference" if form.low_rank else ""
    table = Table(title=f"{pair.name}, {form}{student}, patch order {pair.patch_order}", box=box.SIMPLE_HEAD)
    by_kind = {name: kind["sizes"] for name, kind in pair.kinds.items()}
    figures = tuple(f"KL, {name}" for name in by_kind) or ("KL to teacher",)
    names = ("size", "parameters", "of teacher", "weights", "KV per token", *figures, "decode tok/s")
    for name in names:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for row in rows:
        kl, speed = [(row["quality"] or {}).get("kl")], row["speed"]
        if by_kind:
            kl = [sizes.get(str(row["size"]), {}).get("kl") for sizes in by_kind.values()]
        table.add_row(
            f"{row['size']}L",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['fraction']:.1%}",
            f"{row['weight_bytes'] / 1e6:.0f} MB",
            f"{row['kv_bytes_per_token'] / 1024:.1f} KiB",
            *("-" if value is None else f"{value:.3f}" for value in kl),
            "-" if not speed else f"{speed['decode']['1']:.0f}" if "1" in speed["decode"] else "-",
        )
    console = Console()
    console.print(table)
    together = pair.union_bytes(pair.elasticity.sizes, form)
    apart = sum(row["weight_bytes"] for row in rows)
    console.print(f"all {len(rows)} sizes together: {together / 1e6:.0f} MB of weights; apart {apart / 1e6:.0f} MB")
    if form.storage == "codes":
        console.print(f"the file's own codes: {pair.code_kinds()}")
    if points:
        console.print(_points_table(points))
    if progress is not None and not progress.is_done:
        console.print(f"a student is being made: {progress}")
    if not speeds:
        console.print("speeds: not measured here yet (boomerang bench latency)")
    return 0
