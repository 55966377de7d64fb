"""How much patching, and when: schedules of stochastic patching from one start, at equal tokens, along one order.

    python -m benchmarks.schedules --data base.jsonl --text wikitext2_valid.txt --out schedules [--only plain ...]

The start is the closed-form fit of the pruned layers with the KLPatch order found on it, and every student is trained
towards and measured along that order: students differ in their schedule, not in what an order search found. A schedule
of two phases gives each half of the tokens, rows of its own and a learning rate that falls to zero. What is done is
kept in OUT and not done again; once `start` is there, calls with different --only may share OUT. Five to ten minutes a
student on a free core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.recipes import KEEP

_NONE, _HALF = ["--pure-share", "1"], ["--pure-share", "0.5"]
_COSINE = ["--recipe", "cosine", "--optimizer", "muon", "--no-train-single"]
SCHEDULES: dict[str, list[list[str]]] = {  # name: options of `boomerang distill`, phase by phase
    "start": [],
    "plain": [_NONE],
    "pure-0.75": [["--pure-share", "0.75"]],
    "pure-0.5": [_HALF],
    "pure-0.25": [["--pure-share", "0.25"]],
    "even-sizes": [[*_HALF, "--small-bias", "1"]],
    "small-sizes": [[*_HALF, "--small-bias", "3"]],
    "no-noise": [[*_HALF, "--order-noise", "0"]],
    "plain-then-patching": [_NONE, _HALF],
    "patching-then-plain": [_HALF, _NONE],
    "cosine-then-patching": [_COSINE, _HALF],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="training text, as `boomerang distill` takes it")
    add("--text", type=Path, required=True, help="held-out text")
    add("--out", type=Path, required=True, help="working folder")
    add("--only", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES), metavar="NAME",
        help=f"of {', '.join(SCHEDULES)} (default all)")  # fmt: skip
    add("--tokens", type=int, default=122_880, help="of all phases together (default %(default)s)")
    add("--windows", type=int, default=8, help="of 512 tokens (default %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.out / "measured").mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("tokens", "windows", "seed")} | {"text": args.text.name}
    kept = args.out / "settings.json"
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"--out {args.out} holds students of other settings: {kept.read_text()}")
    kept.write_text(json.dumps(settings))
    for name in args.only:
        file = args.out / "measured" / f"{name}.json"
        if not file.is_file():
            rows = json.dumps(measure(args, train(args, name)))
            file.with_suffix(".part").write_text(rows + "\n")
            file.with_suffix(".part").rename(file)  # another call may be reading the folder
        print(f"{name}: done", file=sys.stderr, flush=True)
        found = {path.stem: json.loads(path.read_text()) for path in (args.out / "measured").glob("*.json")}
        students = {name: {"phases": SCHEDULES[name], "sizes": found[name]} for name in SCHEDULES if name in found}
        content = {"settings": settings, "students": students}
        (args.out / "schedules.json").write_text(json.dumps(content, indent=1) + "\n")


def train(args: argparse.Namespace, name: str) -> Path:
    """The folder of the pair that this schedule ends with, made unless it is there."""
    folder = args.out / "start"
    if not (folder / "pair.json").is_file():
        options = ["--tokens", "0", "--warm-start", "--order", "klpatch", "--calibration-rows", "32"]
        distill(args, folder, options)
    phases = SCHEDULES[name]
    for number, options in enumerate(phases):
        before, folder = folder, args.out / (name if number + 1 == len(phases) else f"{name}-{number}")
        if not (folder / "pair.json").is_file():
            tokens = ["--tokens", str(args.tokens // len(phases)), "--seed", str(args.seed + number)]
            shared = ["--start-from", str(before), "--order", "start", "--no-warm-start", "--calibration-rows", "8"]
            distill(args, folder, [*shared, *tokens, "--lr", "1e-3", "--schedule", "linear", "--compile", *options])
    return folder


def distill(args: argparse.Namespace, folder: Path, options: list[str]) -> None:
    shared = ["--keep", KEEP, "--data", *map(str, args.data), "--loss-on", "all", "--out", str(folder), "--resume"]
    subprocess.run([sys.executable, "-m", "server", "distill", *shared, *options], check=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def measure(args: argparse.Namespace, folder: Path) -> dict[int, dict[str, Any]]:
    """Quality of every size along the pair's order, with the KL of each window apart."""
    import torch
    from transformers import AutoTokenizer

    from model_store.distill.from_pair import load_elastic
    from model_store.evaluate.measure import score, summary, windows
    from model_store.pair import open_pair

    pair = open_pair(None, folder)
    model, sizes = load_elastic(pair, torch.bfloat16), pair.elasticity.sizes
    ids = AutoTokenizer.from_pretrained(pair.tokenizer_path)(args.text.read_text(), add_special_tokens=False).input_ids
    scores = score(model, sizes, windows(ids, 512, args.windows))
    rows = {}
    for size in sizes[:-1]:
        row = scores[size]
        kl = [round(total / tokens, 5) for total, tokens in zip(row.kl, row.tokens, strict=True)]
        rows[size] = {**summary(row, scores[sizes[-1]]), "kl_windows": kl}
    return rows


if __name__ == "__main__":
    main()
