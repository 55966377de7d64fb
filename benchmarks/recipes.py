"""Recipes side by side: students of one teacher from the same start, data, schedule and number of tokens.

    python -m benchmarks.recipes --data base.jsonl --text wikitext2_valid.txt --out recipes [--only plain stochastic]

Every student is made by `boomerang distill` in a process of its own and measured along three patch orders on the same
windows. The common start is the closed-form fit of the pruned layers, so that a small budget reaches a quality at which
recipes matter. What is done is kept in OUT/results.json and not done again, and a training run that was cut short goes
on from its last checkpoint, so the command may be stopped and repeated. `benchmarks.quality_page` turns the results
into tables and plots. About five minutes a student on a free core of a server CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

KEEP = "0,2,4,6,8,10,11,12,14,16,18,20,22,24,26,28"  # of the default pair
# Muon at 1e-3 moves a matrix entry by 2e-4 a step, AdamW by its learning rate: the rates below are of one size.
_OURS = ["--optimizer", "muon", "--no-train-ends", "--no-train-single", "--lr", "1e-3"]
CALIBRATION_ROWS = 8
PRUNED, START = "pruned", "warm-start"
STUDENTS: dict[str, tuple[str, list[str]]] = {  # name: what it starts from, options of `boomerang distill`
    PRUNED: (PRUNED, ["--tokens", "0", "--store-rank", "1"]),
    START: (PRUNED, ["--tokens", "0", "--warm-start", "--calibration-rows", "32"]),
    "plain": (START, ["--pure-share", "1"]),
    "stochastic": (START, []),
    "stochastic-klpatch": (START, ["--order", "klpatch"]),
    "published": (START, ["--recipe", "published"]),
    "cosine": (START, ["--recipe", "cosine", *_OURS]),
    "stochastic-rank-160": (START, ["--rank", "160", "--lr", "1e-3"]),
    "published-objective": (START, ["--recipe", "published", *_OURS]),
    "plain-from-pruned": (PRUNED, ["--pure-share", "1"]),
}


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
    add("--train-only", action="store_true", help="train the students, measure them in a later call")
    add("--tokens", type=float, default=61_440)
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
        train(args, name)
        if args.train_only:
            continue
        students[name] = student(args, name)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: done", file=sys.stderr, flush=True)


def train(args: argparse.Namespace, name: str) -> None:
    """Have `boomerang distill` make one student, unless it is there already."""
    folder = args.out / name
    if (folder / "pair.json").is_file():
        return
    start, options = STUDENTS[name]
    if start != PRUNED:
        train(args, start)
        options = ["--start-from", str(args.out / start), *options]
    shared = [
        "--keep", args.keep, "--data", *map(str, args.data), "--loss-on", "all", "--out", str(folder),
        "--row-tokens", str(args.row_tokens), "--batch-rows", str(args.batch_rows), "--tokens", str(args.tokens),
        "--schedule", "linear", "--no-warm-start", "--order", "last", "--calibration-rows", str(CALIBRATION_ROWS),
        "--seed", str(args.seed), "--save-steps", "10", "--compile", "--resume",
    ]  # fmt: skip
    shared += ["--teacher", args.teacher] if args.teacher else []
    subprocess.run([sys.executable, "-m", "server", "distill", *shared, *options], check=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def student(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One trained student: its options, quality by order and size, and training curve."""
    folder, kept = args.out / name, ("tokens", "loss", "kl", "align", "pure")
    file = folder / "training_curve.jsonl"
    curve = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {
        "start": STUDENTS[name][0], "options": STUDENTS[name][1], "orders": measure(args, folder),
        "curve": [{key: float(row[key]) for key in kept} for row in curve],
    }  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Quality by patch order and size, with the KL of each window apart so that students can be compared in pairs.

    KLPatch is measured here, on the training text's calibration rows.
    """
    import torch
    from transformers import AutoTokenizer

    from model_store.assembly import Elasticity
    from model_store.distill.data import pack, read_documents
    from model_store.distill.from_pair import load_elastic
    from model_store.distill.order import greedy_order, kl_of_paths
    from model_store.evaluate.measure import score, summary, windows
    from model_store.pair import open_pair

    pair = open_pair(args.teacher, folder)
    model = load_elastic(pair, torch.bfloat16)
    layers, kept = model.elasticity.num_teacher_layers, model.elasticity.kept
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    documents = [document for path in args.data for document in read_documents(path)]
    rows = pack(documents, tokenizer, CALIBRATION_ROWS * args.row_tokens, args.row_tokens, "all", args.seed)
    found = greedy_order(model.elasticity, kl_of_paths(model, [rows.ids]))
    elasticities = {
        "klpatch": Elasticity.from_order(layers, kept, found),
        "last_to_first": Elasticity.last_to_first(layers, kept),
        "first_to_last": Elasticity.first_to_last(layers, kept),
    }
    ids = tokenizer(args.text.read_text(), add_special_tokens=False).input_ids
    sequences = windows(ids, 512, args.windows)
    sizes = [int(size) for size in args.sizes.split(",")]
    quality: dict[str, dict[int, dict[str, Any]]] = {}
    for order, elasticity in elasticities.items():
        model.elasticity = elasticity
        scores = score(model, [*sizes, layers], sequences)
        quality[order] = {}
        for size in sizes:
            row = scores[size]
            kl = [round(total / tokens, 5) for total, tokens in zip(row.kl, row.tokens, strict=True)]
            quality[order][size] = {**summary(row, scores[layers]), "kl_windows": kl}
    return quality


if __name__ == "__main__":
    main()
