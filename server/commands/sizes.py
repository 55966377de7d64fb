"""`boomerang sizes`: what each size of a pair is, costs and is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from server.config import Settings
from server.loading import open_settings_pair, weight_form

if TYPE_CHECKING:
    from model_store.pair import Pair
    from model_store.weight_form import WeightForm


def speed_file(store: str | None, pair: Pair, form: WeightForm) -> Path:
    """Where `bench latency` keeps what it measured for this pair, loaded in this form, on this machine."""
    from model_store.store import store_root
    from server.cost.calibrate import processor_name

    machine = "".join(c if c.isalnum() else "-" for c in processor_name())
    kind = "" if form.storage == "as loaded" else f"-{form.storage}"
    kind += "-difference" if form.low_rank else ""
    kind += "-int8-kv" if form.kv_cache_dtype == "int8" else ""
    return store_root(store) / "speed" / f"{pair.name}{kind}-{machine}.json"


def print_sizes(settings: Settings, *, as_json: bool = False) -> int:
    """Print the table (or JSON) without loading a tensor. Speeds are those of the last `bench latency` here."""
    pair = open_settings_pair(settings)
    form = weight_form(settings, pair)
    rows = pair.size_table(form)
    file = speed_file(settings.store, pair, form)
    speeds: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for row in rows:
        row["speed"] = speeds.get("sizes", {}).get(str(row["size"]))
    if as_json:
        print(json.dumps({"pair": pair.name, "patch_order": pair.patch_order, "sizes": rows}, indent=1))
        return 0
    student = ", low-rank student as a difference" if form.low_rank else ""
    table = Table(title=f"{pair.name}, {form}{student}, patch order {pair.patch_order}", box=box.SIMPLE_HEAD)
    names = ("size", "parameters", "of teacher", "weights", "KV per token", "KL to teacher", "decode tok/s")
    for name in names:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for row in rows:
        kl, speed = (row["quality"] or {}).get("kl"), row["speed"]
        table.add_row(
            f"{row['size']}L",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['fraction']:.1%}",
            f"{row['weight_bytes'] / 1e6:.0f} MB",
            f"{row['kv_bytes_per_token'] / 1024:.1f} KiB",
            "-" if kl is None else f"{kl:.3f}",
            "-" if not speed else f"{speed['decode']['1']:.0f}" if "1" in speed["decode"] else "-",
        )
    console = Console()
    console.print(table)
    together = pair.union_bytes(pair.elasticity.sizes, form)
    apart = sum(row["weight_bytes"] for row in rows)
    console.print(f"all {len(rows)} sizes together: {together / 1e6:.0f} MB of weights; apart {apart / 1e6:.0f} MB")
    if form.storage == "codes":
        console.print(f"the file's own codes: {pair.code_kinds()}")
    if not speeds:
        console.print("speeds: not measured here yet (boomerang bench latency)")
    return 0
