"""Recipes side by side: students of one teacher from the same start, data, schedule and number of tokens.

    python -m benchmarks.recipes --data base.jsonl --text wikitext2_valid.txt --out recipes [--only plain stochastic]

Every student is made by `boomerang distill` in a process of its own and measured along three patch orders on the same
windows. What is done is kept in OUT/results.json and not done again, and a training run that was cut short goes on from
its last checkpoint, so the command may be stopped and repeated. `python -m benchmarks.recipes_report` turns the results
into tables and plots. About ten minutes a student on a free core of a server CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KEEP = "0,2,4,6,8,10,11,12,14,16,18,20,22,24,26,28"  # of the default pair
# Muon at 1e-3 moves a matrix entry by 2e-4 a step, AdamW by its learning rate: the rates below are of one size.
_OURS = ["--optimizer", "muon", "--no-train-ends", "--no-train-single", "--lr", "1e-3"]
STUDENTS: dict[str, list[str]] = {
    "pruned": ["--tokens", "0", "--store-rank", "1"],
    "stochastic": ["--recipe", "stochastic"],
    "plain": ["--recipe", "stochastic", "--pure-share", "1"],
    "published": ["--recipe", "published"],
    "cosine": ["--recipe", "cosine", *_OURS],
    "stochastic-rank-160": ["--recipe", "stochastic", "--rank", "160", "--lr", "1e-3"],
    "published-objective": ["--recipe", "published", *_OURS],
    "stochastic-warm-start": ["--recipe", "stochastic", "--warm-start", "--calibration-rows", "32"],
}
ORDERS = ("klpatch", "last_to_first", "first_to_last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="folder or hub id (default: the default pair's)")
    add("--keep", default=KEEP)
    add("--data", type=Path, nargs="+", required=True, help="training text, as `boomerang distill` takes it")
    add("--text", type=Path, required=True, help="held-out text")
    add("--out", type=Path, required=True, help="working folder")
    add("--only", nargs="+", choices=list(STUDENTS), default=list(STUDENTS), metavar="NAME",
        help=f"of {', '.join(STUDENTS)} (default all)")  # fmt: skip
    add("--tokens", type=float, default=102_400)
    add("--batch-rows", type=int, default=8)
    add("--row-tokens", type=int, default=256)
    add("--windows", type=int, default=4, help="of 512 tokens (default %(default)s)")
    add("--sizes", default="16,17,19,22,25,28,29")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results["settings"] = {
        "tokens": int(args.tokens), "rows of a step": args.batch_rows, "tokens of a row": args.row_tokens,
        "seed": args.seed, "keep": args.keep, "text": args.text.name, "windows": args.windows,
    }  # fmt: skip
    students = results.setdefault("students", {})
    for name in args.only:
        if name in students:
            continue
        students[name] = student(args, name)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: done", file=sys.stderr, flush=True)


def student(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train and measure one student: its options, quality by order and size, and training curve."""
    folder = args.out / name
    started = time.time()
    if not (folder / "pair.json").is_file():
        shared = [
            "--keep", args.keep, "--data", *map(str, args.data), "--loss-on", "all", "--out", str(folder),
            "--row-tokens", str(args.row_tokens), "--batch-rows", str(args.batch_rows), "--tokens", str(args.tokens),
            "--schedule", "linear", "--no-warm-start", "--order", "klpatch", "--calibration-rows", "8",
            "--seed", str(args.seed), "--save-steps", "20", "--compile", "--resume",
        ]  # fmt: skip
        shared += ["--teacher", args.teacher] if args.teacher else []
        command = [sys.executable, "-m", "server", "distill", *shared, *STUDENTS[name]]
        subprocess.run(command, check=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    curve = folder / "training_curve.jsonl"
    return {
        "options": STUDENTS[name],
        "seconds": round(time.time() - started),
        "orders": measure(args, folder),
        "curve": [json.loads(line) for line in curve.read_text().splitlines()] if curve.is_file() else [],
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Quality by patch order and size."""
    import torch
    from transformers import AutoTokenizer

    from model_store.assembly import Elasticity
    from model_store.distill.from_pair import load_elastic
    from model_store.evaluate import measure_text
    from model_store.pair import open_pair

    pair = open_pair(args.teacher, folder)
    model = load_elastic(pair, torch.bfloat16)
    own = model.elasticity
    elasticities = {"klpatch": own} | {
        name: getattr(Elasticity, name)(own.num_teacher_layers, own.kept) for name in ORDERS[1:]
    }
    ids = AutoTokenizer.from_pretrained(pair.tokenizer_path)(args.text.read_text(), add_special_tokens=False).input_ids
    sizes = [int(size) for size in args.sizes.split(",")]
    found = {}
    for order, elasticity in elasticities.items():
        model.elasticity = elasticity
        found[order] = measure_text(model, sizes, ids, 512, args.windows)
    return found


if __name__ == "__main__":
    main()
