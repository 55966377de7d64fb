"""Fills the tables and plots of README.md and docs/ from what commands have measured.

    python -m benchmarks.pages                                # fill every table, draw every plot
    python -m benchmarks.pages --check                        # write nothing; exit 1 if a table is out of date
    python -m benchmarks.pages --record NAME -- COMMAND ...   # run a command and keep what it prints as table NAME
    python -m benchmarks.pages --measure --text FILE          # measure the default pair first (--speed: its speed)

What stands between `<!-- table: NAME -->` and `<!-- end -->` is generated. The sources are the default pair's
quality.json and docs/data: sizes.json (from the pair itself), vs_peers.json (`benchmarks.vs_peers --json`), the results
of studies, and recorded.json: the output of commands with their machine and date. docs/api.md has a filler of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model_store.evaluate.report import kinds_table, markdown, plot_svg
from studies import training_recipes_report

ROOT = Path(__file__).resolve().parent.parent
PAIR = ROOT / "model_store" / "default_pair"
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "images"
RECORDED = DATA / "recorded.json"
API_PAGE = ROOT / "docs" / "api.md"  # filled by server.api.reference
CHAT = ROOT / "benchmarks" / "quality_chat_prompts.txt"
README_SIZES = (16, 20, 24, 28, 30)
README_SPEEDS = (  # how the rows of vs_peers.json begin
    "decode, 1 request", "decode, 16 requests", "decode, 64 requests", "prefill, 8 x 512", "16 requests of 4 sizes",
    "the same, memory",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Sizes = dict[int, dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """0, or 1 with `--check` if a page is out of date, or the exit status of a command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table differs")
    parser.add_argument("--record", metavar="NAME", help="run the command after -- and keep its output as this table")
    parser.add_argument("--machine", help="with --record: the machine in words, e.g. '2 cores of an AMD EPYC (Zen 5)'")
    parser.add_argument("--measure", action="store_true", help="measure quality first; needs --text")
    parser.add_argument("--speed", action="store_true", help="measure speed first")
    parser.add_argument("--text", type=Path, help="held-out text: WikiText-2 validation")
    parser.add_argument("--training-data", type=Path, nargs="*", default=[], help="check that the text is not in these")
    parser.add_argument("command", nargs="*", help="with --record: what to run")
    args = parser.parse_args(argv)
    if args.measure and args.text is None:
        parser.error("--measure needs --text")
    if args.record and not (args.command and args.machine):
        parser.error("--record needs --machine and a command after --")
    if status := record(args) if args.record else measure(args):
        return status
    if not args.check:
        (DATA / "sizes.json").write_text(json.dumps(sizes_of_the_pair(), indent=1) + "\n")
    current = tables()
    stale = [page for page in pages() if fill(page.read_text(), current) != page.read_text()]
    if args.check:
        for page in stale:
            print(f"{page} is out of date: run python -m benchmarks.pages", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.write_text(fill(page.read_text(), current))
    for name, svg in plots().items():
        (IMAGES / name).write_text(svg)
    return 0


def pages() -> list[Path]:
    """README.md and every page under docs/ but docs/api.md."""
    return [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != API_PAGE)]


def record(args: argparse.Namespace) -> int:
    """Run `args.command`; its standard output becomes table `args.record` of docs/data/recorded.json."""
    done = subprocess.run(args.command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        content = json.loads(RECORDED.read_text())
        content[args.record] = {
            "command": shlex.join(args.command), "machine": args.machine,
            "date": datetime.date.today().isoformat(), "output": done.stdout.strip().splitlines(),
        }  # fmt: skip
        RECORDED.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return done.returncode


def measure(args: argparse.Namespace) -> int:
    """`boomerang evaluate` on the default pair, as asked for. Returns its exit status."""
    from server.cli import main as boomerang

    if args.measure:
        text = ["--text", str(args.text), "--windows", "8", "--allow-overlap", "0.0001"]
        if args.training_data:
            text += ["--training-data", *map(str, args.training_data)]
        chat = ["--chat", str(CHAT), "--chat-limit", "128", "--max-new-tokens", "120"]
        if status := boomerang(["evaluate", *text, *chat]):
            return status
    return boomerang(["evaluate", "--speed"]) if args.speed else 0


def fill(text: str, current: dict[str, str]) -> str:
    """The page with every table as the data has it now. KeyError for a table that nothing prints."""
    return _BLOCK.sub(lambda match: match[1] + current[match[2]] + match[4], text)


def sizes_of_the_pair() -> dict[str, Any]:
    """What `boomerang sizes` says about the default pair in bfloat16. StoreError without its teacher."""
    import torch

    from model_store.pair import open_pair
    from model_store.weight_form import WeightForm

    pair, form = open_pair(), WeightForm(torch.bfloat16)
    keys = ("size", "parameters", "weight_bytes", "kv_bytes_per_token")
    rows = [{key: row[key] for key in keys} for row in pair.size_table(form)]
    return {"sizes": rows, "union_bytes": pair.union_bytes(pair.elasticity.sizes, form)}


def tables() -> dict[str, str]:
    """All generated tables by name."""
    quality = json.loads((PAIR / "quality.json").read_text())
    sizes = {int(size): row for size, row in sorted(quality["sizes"].items(), key=lambda item: int(item[0]))}
    peers = json.loads((DATA / "vs_peers.json").read_text())
    found = {
        "readme_sizes": readme_sizes(json.loads((DATA / "sizes.json").read_text()), sizes),
        "readme_speed": readme_speed(peers), "peers": peers_table(peers),
        "overlap": overlap(quality["measured"]), "text": text_table(sizes), "chat": chat_table(sizes),
        "kinds": by_kind(quality["kinds"]),
    }  # fmt: skip
    kept = json.loads(RECORDED.read_text())
    found["readme_trace"] = readme_trace(kept["trace"]["output"])
    recorded = {name: recorded_table(entry) for name, entry in kept.items()}
    return found | recorded | training_recipes_report.tables(DATA)


def plots() -> dict[str, str]:
    """All plots by file name, as SVG."""
    quality = json.loads((PAIR / "quality.json").read_text())
    series = {"the default pair": {int(size): row for size, row in quality["sizes"].items()}}
    keys = ("kl", "perplexity_ratio", "repetition", "chat_kl", "weight_bytes", "tokens_per_second")
    return {"quality.svg": plot_svg(series, keys)} | training_recipes_report.plots(DATA)


def recorded_table(entry: dict[str, Any]) -> str:
    """Command, machine and date, then what the command printed: its markdown tables, or its text as it is."""
    lines = entry["output"]
    if not any(line.startswith("|") for line in lines):
        lines = ["```", *lines, "```"]
    caption = f"`{entry['command']}`, {entry['machine']}, {entry['date']}:"
    return "\n".join([caption, "", *lines]) + "\n"


def _lines(header: str, rows: Iterable[list[str]]) -> str:
    return markdown([header.split(" | "), *rows]) + "\n"


def readme_sizes(pair: dict[str, Any], quality: Sizes) -> str:
    """Five sizes: parameters, bytes, KL to the teacher; and what all sizes take together and apart."""
    rows, top = [], pair["sizes"][-1]["size"]
    for row in (row for row in pair["sizes"] if row["size"] in README_SIZES):
        size = row["size"]
        role = {pair["sizes"][0]["size"]: " (student)", top: " (teacher)"}.get(size, "")
        rows.append([
            f"{size}L{role}", f"{row['parameters'] / 1e6:.1f} M", f"{row['weight_bytes'] / 1e6:.0f} MB",
            f"{row['kv_bytes_per_token'] / 1024:.1f} KiB", f"{quality[size]['kl']:.2f}",
            f"{quality[size]['perplexity_ratio']:.2f}x",
        ])  # fmt: skip
    apart = sum(row["weight_bytes"] for row in pair["sizes"])
    header = "size | parameters | weights, bfloat16 | KV per token | KL to the teacher | perplexity, x teacher's"
    said = f"All {len(pair['sizes'])} sizes together take {pair['union_bytes'] / 1e6:.0f} MB of weights; "
    return _lines(header, rows) + f"\n{said}separate models would take {apart / 1e9:.1f} GB.\n"


def by_kind(kinds: dict[str, dict[str, Any]]) -> str:
    """Five sizes on each kind of text, and what the texts were."""
    header, *rows = kinds_table(kinds)
    table = markdown([header, *(row for row in rows if row[0] in {f"{size}L" for size in README_SIZES})])
    texts = "; ".join(f"{kind}: {found['text']}" for kind, found in kinds.items())
    return f"{table}\n\n{texts}.\n"


def _figures(row: dict[str, Any]) -> list[float | None]:
    """Of boomerang, vLLM (one server or four), llama.cpp and the machine's limit."""
    groups = (("boomerang",), ("vllm", "4 x vllm"), ("llamacpp",), ("limit",))
    return [next((v for k, v in row["figures"].items() if k.startswith(group)), None) for group in groups]


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def readme_speed(peers: dict[str, Any]) -> str:
    """Six rows of `benchmarks.vs_peers`."""
    rows = []
    for name in README_SPEEDS:
        row = next(row for row in peers["rows"] if row["what"].startswith(name))
        ours, vllm, llamacpp, _ = _figures(row)
        rows.append([f"{name}, {row['unit']}", *map(_number, (ours, vllm, llamacpp))])
        rows[-1] += [_ratio(ours, vllm), _ratio(ours, llamacpp)]
    return _lines("what | boomerang | vLLM | llama.cpp | over vLLM | over llama.cpp", rows)


def readme_trace(lines: list[str]) -> str:
    """What `benchmarks.trace` found at load 2: its rows begin with load, policy and share of limits met."""
    cells = [[cell.strip(" *") for cell in line.split("|")[1:4]] for line in lines]
    met = {policy: share for load, policy, share in cells if load == "2"}
    return (
        f"At twice the load that the full size can carry, `auto` keeps {met['auto']} of the latency limits of a real "
        f"trace.\nThe full size keeps {met['teacher']} ([`docs/scheduling.md`](docs/scheduling.md)).\n"
    )


def peers_table(peers: dict[str, Any]) -> str:
    """Every row of `benchmarks.vs_peers`, with its share of the machine's limit."""
    rows = []
    for row in peers["rows"]:
        ours, vllm, llamacpp, limit = _figures(row)
        if ours is None or not (vllm or llamacpp):
            continue
        share = f"{ours / limit:.0%}" if limit else ""
        cells = map(_number, (ours, vllm, llamacpp, limit))
        rows.append([f"{row['what']}, {row['unit']}", *cells, _ratio(ours, vllm), _ratio(ours, llamacpp), share])
    header = "what | boomerang | vLLM | llama.cpp | limit | over vLLM | over llama.cpp | of limit"
    return _lines(header, rows)


def _within(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f} ± {row[f'{key}_ci']:.{digits}f}"


def _falls(sizes: Sizes, key: str) -> str:
    from model_store.evaluate.measure import is_monotone

    worse = is_monotone({size: row[key] for size, row in sizes.items()})
    return (
        f"KL does not fall at {', '.join(f'{size}L' for size in worse)}." if worse else "KL falls at every added layer."
    )


def overlap(measured: dict[str, Any]) -> str:
    """Whether the held-out text and prompts occur in the training text."""
    if not (text := measured.get("text_overlap")):
        return "Whether the held-out text occurs in the training text was not checked.\n"
    said = f"Of the held-out text's runs of 13 words, {text['share']:.4%} also occur in the training text"
    if chat := measured.get("chat_overlap"):
        said += "; of the chat prompts, " + (f"{chat['share']:.1%} do" if chat["share"] else "none does")
    return f"{said}.\n"


def text_table(sizes: Sizes) -> str:
    """Quality on text, bytes and speed by size."""

    def cells(size: int, row: dict[str, Any]) -> list[str]:
        figures = [_within(row, "perplexity_ratio", 2), _within(row, "kl", 3), f"{row['top1_agreement']:.3f}"]
        speed = row.get("tokens_per_second")
        megabytes = row["weight_bytes"] / 1e6
        return [f"{size}L", *figures, f"{megabytes:.0f}", f"{speed:.0f}" if speed else "-"]

    header = "size | perplexity, x teacher's | KL | top-1 agreement | weights, MB | tokens/s"
    return _lines(header, [cells(*item) for item in sizes.items()]) + "\n" + _falls(sizes, "kl") + "\n"


def chat_table(sizes: Sizes) -> str:
    """Quality on chat prompts by size."""
    rows = []
    for size, row in sizes.items():
        shares = [f"{100 * row[key]:.0f} %" for key in ("repetition", "repetition_penalised", "stop_rate")]
        rows.append([f"{size}L", _within(row, "chat_kl", 3), *shares, f"{row['length_ratio']:.2f}"])
    top = sizes[max(sizes)]["repetition"]
    over = [f"{size}L" for size, row in sizes.items() if row["repetition"] > 2 * top]
    verdict = f"Sizes that repeat more than twice as often as the teacher: {', '.join(over) or 'none'}."
    header = "size | KL | repeat | repeat, with penalty | stop | length, x teacher's"
    return _lines(header, rows) + f"\n{_falls(sizes, 'chat_kl')} {verdict}\n"


if __name__ == "__main__":
    sys.exit(main())
