"""Fills the tables and plots of docs/quality.md: python -m benchmarks.pages [--check] [--measure --text FILE].

What stands between `<!-- table: NAME -->` and `<!-- end -->` comes from the default pair's quality.json and from the
results of other commands kept in docs/data. `--measure` has `boomerang evaluate` measure the default pair anew first:
text, all patch orders, chat prompts; `--speed` the tokens per second of every size (run it on a calm machine).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from model_store.evaluate.report import markdown, plot_svg
from studies import training_recipes_report as recipes_report

ROOT = Path(__file__).resolve().parent.parent
PAIR = ROOT / "model_store" / "default_pair"
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "images"
PAGES = (ROOT / "docs" / "quality.md", ROOT / "docs" / "stochastic_patching.md")
CHAT = ROOT / "benchmarks" / "quality_chat_prompts.txt"
AIMS = {16: (2.5, 1.6), 22: (1.8, 1.35), 28: (1.15, 1.08)}  # multiples of the teacher's perplexity: two cores, a GPU
# Best of the first session's trials: perplexity (the teacher's was 25.6) with its run, KL with its run.
TRIALS = {
    16: (87.4, "plain", 1.25, "plain"), 17: (113.7, "plain, first-to-last", 1.55, "plain, first-to-last"),
    19: (69.9, "third", 1.06, "third"), 22: (52.8, "third", 0.81, "third"),
    24: (66.7, "plain, first-to-last", 1.01, "plain, first-to-last"), 25: (40.4, "third", 0.57, "third"),
    27: (52.3, "plain, first-to-last", 0.72, "plain, first-to-last"),
    28: (33.8, "third", 0.37, "plain, first-to-last"), 29: (31.3, "plain, first-to-last", 0.23, "plain, first-to-last"),
}  # fmt: skip
TRIAL_TEACHER = 25.6
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(?P<old>.*?)(<!-- end -->)", re.DOTALL)

Sizes = dict[int, dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """0, or with `--check` 1 if a page is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table differs")
    parser.add_argument("--measure", action="store_true", help="measure quality first; needs --text")
    parser.add_argument("--speed", action="store_true", help="measure speed first")
    parser.add_argument("--text", type=Path, help="held-out text: WikiText-2 validation")
    parser.add_argument("--training-data", type=Path, nargs="*", default=[], help="check that the text is not in these")
    args = parser.parse_args(argv)
    if args.measure and args.text is None:
        parser.error("--measure needs --text")
    if status := measure(args):
        return status
    current = tables()
    stale = [page for page in PAGES if fill(page.read_text(), current) != page.read_text()]
    if args.check:
        for page in stale:
            print(f"{page} is out of date: run python -m benchmarks.pages", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.write_text(fill(page.read_text(), current))
    for name, svg in plots().items():
        (IMAGES / name).write_text(svg)
    return 0


def measure(args: argparse.Namespace) -> int:
    from server.cli import main as boomerang

    if args.measure:
        text = ["--text", str(args.text), "--windows", "8", "--compare-orders", "--allow-overlap", "0.0001"]
        if args.training_data:
            text += ["--training-data", *map(str, args.training_data)]
        chat = ["--chat", str(CHAT), "--chat-limit", "128", "--max-new-tokens", "120"]
        if status := boomerang(["evaluate", *text, *chat]):
            return status
    return boomerang(["evaluate", "--speed"]) if args.speed else 0


def fill(text: str, current: dict[str, str]) -> str:
    """The page with every table as the data has it now; a table without data stays as it is."""
    return _BLOCK.sub(lambda match: match[1] + current.get(match[2], match["old"]) + match[4], text)


def tables() -> dict[str, str]:
    """All generated tables by name."""
    quality = json.loads((PAIR / "quality.json").read_text())
    sizes = _by_size(quality["sizes"])
    earlier = json.loads((DATA / "earlier_students.json").read_text())
    found = {
        "aims": aims(sizes), "overlap": overlap(quality["measured"]), "text": text_table(sizes),
        "chat": chat_table(sizes), "trials": trials_table(sizes),
        "history": history(earlier, sizes),
    }  # fmt: skip
    if orders := quality.get("orders"):
        found["pair_orders"] = orders_table(sizes, orders)
    return found | recipes_report.tables(DATA)


def plots() -> dict[str, str]:
    """All plots by file name, as SVG."""
    quality = json.loads((PAIR / "quality.json").read_text())
    series = {"the pair's own order": _by_size(quality["sizes"])}
    series |= {name.replace("_", "-"): _by_size(rows) for name, rows in quality.get("orders", {}).items()}
    keys = ("kl", "perplexity_ratio", "repetition", "chat_kl", "weight_bytes", "tokens_per_second")
    return {"quality.svg": plot_svg(series, keys)} | recipes_report.plots(DATA)


def _by_size(rows: dict[str, dict[str, Any]]) -> Sizes:
    return {int(size): row for size, row in sorted(rows.items(), key=lambda item: int(item[0]))}


def _lines(header: str, rows: Iterable[list[str]]) -> str:
    return markdown([header.split(" | "), *rows]) + "\n"


def _within(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f} ± {row[f'{key}_ci']:.{digits}f}"


def _falls(sizes: Sizes, key: str) -> str:
    from model_store.evaluate.measure import is_monotone

    worse = is_monotone({size: row[key] for size, row in sizes.items()})
    return f"KL does not fall at {', '.join(map(str, worse))} layers." if worse else "KL falls at every added layer."


def aims(sizes: Sizes) -> str:
    rows = []
    for size, (two_cores, gpu) in AIMS.items():
        ratio = sizes[size]["perplexity_ratio"]
        verdict = "missed" if ratio > two_cores else "met" if ratio > gpu else "met, that of a GPU too"
        rows.append([str(size), f"{ratio:.3f}x", f"{two_cores}x", f"{gpu}x", verdict])
    return _lines("layers | measured | aim for two cores | aim for a GPU | aim for two cores is", rows)


def overlap(measured: dict[str, Any]) -> str:
    if not (text := measured.get("text_overlap")):
        return "Whether the held-out text occurs in the training text was not checked.\n"
    said = f"Of the held-out text's runs of 13 words {text['share']:.4%} also occur in the training text"
    said += " (common phrases)"
    if chat := measured.get("chat_overlap"):
        said += ", of the chat prompts " + (f"{chat['share']:.1%}" if chat["share"] else "none")
    return f"{said}.\n"


def text_table(sizes: Sizes) -> str:
    def cells(size: int, row: dict[str, Any]) -> list[str]:
        megabytes, speed = row["weight_bytes"] / 1e6, row.get("tokens_per_second")
        figures = [_within(row, *column) for column in (("perplexity", 1), ("perplexity_ratio", 2), ("kl", 3))]
        agreement = _within(row, "top1_agreement", 3)
        return [str(size), *figures, agreement, f"{megabytes:.0f}", f"{speed:.0f}" if speed else "-"]

    header = "layers | perplexity | x teacher's | KL | top-1 agreement | weights, MB | tokens/s, one request"
    return _lines(header, [cells(*item) for item in sizes.items()]) + "\n" + _falls(sizes, "kl") + "\n"


def chat_table(sizes: Sizes) -> str:
    def share(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.2f} ({row[f'{key}_low']:.2f}-{row[f'{key}_high']:.2f})"

    rows = [
        [
            str(size), _within(row, "chat_kl", 3), f"{row['chat_top1_agreement']:.3f}", share(row, "repetition"),
            share(row, "repetition_penalised"), share(row, "stop_rate"), _within(row, "length_ratio", 2),
        ]
        for size, row in sizes.items()
    ]  # fmt: skip
    top = sizes[max(sizes)]["repetition"]
    over = [str(size) for size, row in sizes.items() if row["repetition"] > 2 * top]
    verdict = f"Sizes that repeat more than twice as often as the teacher ({top:.0%}): {', '.join(over) or 'none'}."
    worst = max(row["repetition_penalised"] for row in sizes.values())
    verdict += f"\nWith the penalty no size repeats in more than {worst:.0%} of its answers."
    header = "layers | KL on the teacher's answers | top-1 | answers that repeat | with repetition_penalty | that stop"
    header += " | length, x teacher's"
    return _lines(header, rows) + f"\n{_falls(sizes, 'chat_kl')} {verdict}\n"


def history(earlier: dict[str, dict[str, list[float]]], sizes: Sizes) -> str:
    names, known = list(earlier), {size for rows in earlier.values() for size in rows}
    now = {str(size): [row["perplexity_ratio"], row["kl"]] for size, row in sizes.items()}
    rows = []
    for size in sorted(known, key=int):
        pairs = [column.get(size) for column in (*earlier.values(), now)]
        rows.append([size, *(f"{pair[0]:.2f}x / {pair[1]:.3f}" if pair else "-" for pair in pairs)])
    return _lines(" | ".join(["layers", *names, "this one"]), rows)


def trials_table(sizes: Sizes) -> str:
    rows = [
        [
            str(size), f"{perplexity / TRIAL_TEACHER:.2f}x ({run})", f"{kl:.2f} ({kl_run})",
            f"{sizes[size]['perplexity_ratio']:.2f}x", f"{sizes[size]['kl']:.3f}",
        ]
        for size, (perplexity, run, kl, kl_run) in TRIALS.items()
    ]  # fmt: skip
    return _lines(
        "layers | best trial, x teacher's | best trial, KL | default pair, x teacher's | default pair, KL", rows
    )


def orders_table(sizes: Sizes, orders: dict[str, dict[str, dict[str, Any]]]) -> str:
    cell: Callable[[dict[str, Any]], str] = lambda row: f"{row['perplexity_ratio']:.2f}x / {row['kl']:.3f}"  # noqa: E731
    rows = [[str(s), cell(row), *(cell(other[str(s)]) for other in orders.values())] for s, row in sizes.items()]
    titles = [name.replace("_", "-") for name in orders]
    return _lines(" | ".join(["layers", "the pair's own (KLPatch)", *titles]), rows)


if __name__ == "__main__":
    sys.exit(main())
