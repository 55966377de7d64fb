"""Recipes and schedules side by side: students of one teacher from one start, at equal tokens, at every size.

    python -m studies.training_recipes --data base.jsonl --text wikitext2_valid.txt --out FOLDER [--only plain ...]

The start is the closed-form fit of the pruned layers with the KLPatch order found on it. Every student is made by
`boomerang distill` in a process of its own, from that start and towards that order, and measured along it: students
differ in how they were trained, not in what an order search found. Some are measured last-to-first and first-to-last,
too. Layers that were merely pruned have an order of their own. Chat is the KL on the teacher's own greedy answers to
held-out prompts.

A recipe of two phases gives each half of the tokens, rows of its own and a learning rate that falls to zero. What is
done is kept in OUT and not done again, and a training run cut short goes on from its last checkpoint; once `start` and
OUT/answers.json are there, calls with different --only may share OUT. `benchmarks.pages` makes tables and plots
of OUT/recipes.json. A student takes five to ten minutes of a core to train and one to five to measure.

Answered 28 November 2026: an eighth of the rows patched, mostly at small sizes, is as good as free; rank 160 beats
whole layers (docs/log/2026-11-28-training-recipes.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEEP = "0,2,4,6,8,10,11,12,14,16,18,20,22,24,26,28"  # of the default pair
CHAT = Path(__file__).resolve().parent.parent / "benchmarks" / "quality_chat_prompts.txt"
_OWN_ORDER = ["--order", "klpatch", "--calibration-rows", "32"]
# AdamW moves a matrix entry by its learning rate, Muon at 1e-3 by 2e-4 a step: rates of one size.
_ADAMW = ["--lr", "3e-4"]
_OURS = ["--optimizer", "muon", "--no-train-ends", "--no-train-single"]
_ALONE, _HALF = ["--pure-share", "1"], ["--pure-share", "0.5"]
_SMALL_FIXED = ["--small-bias", "3", "--order-noise", "0"]
_CUT = ["--tokens", "0", "--store-rank", "160"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """`phases`: options of `boomerang distill`, run after run; `start`: another student, or none.

    All are measured on text along their order; `chat` and `fixed_orders` say what else.
    """

    phases: list[list[str]]
    start: str | None = "start"
    chat: bool = False
    fixed_orders: bool = False


STUDENTS = {
    "pruned": Recipe(
        [["--tokens", "0", "--no-warm-start", "--store-rank", "1", *_OWN_ORDER]], None, chat=True, fixed_orders=True
    ),
    "start": Recipe([["--tokens", "0", "--warm-start", *_OWN_ORDER]], None, chat=True, fixed_orders=True),
    # How the student is trained
    "published": Recipe([["--recipe", "published", *_ADAMW]], chat=True, fixed_orders=True),
    "published-losses": Recipe([["--recipe", "published", *_OURS]], chat=True),
    "cosine": Recipe([["--recipe", "cosine", *_OURS]], chat=True, fixed_orders=True),
    "plain": Recipe([_ALONE], chat=True, fixed_orders=True),
    "pure-0.5": Recipe([_HALF], chat=True, fixed_orders=True),
    # Whole layers or differences of a rank, patched alike
    "stored-at-160": Recipe([_CUT], "pure-0.5", chat=True),
    "rank-160": Recipe([[*_HALF, "--rank", "160"]], chat=True),
    "whole-adamw": Recipe([[*_HALF, "--optimizer", "adamw", *_ADAMW]], chat=True),
    "start-at-160": Recipe([_CUT], chat=True),
    # How much patching, and when
    "pure-0.75": Recipe([["--pure-share", "0.75"]]),
    "pure-0.25": Recipe([["--pure-share", "0.25"]]),
    "even-sizes": Recipe([[*_HALF, "--small-bias", "1"]]),
    "small-sizes": Recipe([[*_HALF, "--small-bias", "3"]]),
    "no-noise": Recipe([[*_HALF, "--order-noise", "0"]]),
    "quarter-small-fixed": Recipe([["--pure-share", "0.75", *_SMALL_FIXED]]),
    "eighth-small-fixed": Recipe([["--pure-share", "0.875", *_SMALL_FIXED]], chat=True),
    "plain-then-patching": Recipe([_ALONE, _HALF]),
    "patching-then-plain": Recipe([_HALF, _ALONE]),
    "cosine-then-patching": Recipe([["--recipe", "cosine", *_OURS], _HALF]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="training text, as `boomerang distill` takes it")
    add("--text", type=Path, required=True, help="held-out text")
    add("--out", type=Path, required=True, help="working folder")
    add("--only", nargs="+", choices=list(STUDENTS), default=list(STUDENTS), metavar="NAME",
        help=f"of {', '.join(STUDENTS)} (default all)")  # fmt: skip
    add("--train-only", action="store_true", help="train the students, measure them in a later call")
    add("--tokens", type=int, default=122_880, help="of all phases together (default %(default)s)")
    add("--windows", type=int, default=8, help="of 512 tokens (default %(default)s)")
    add("--answer-tokens", type=int, default=120, help="longest chat answer (default %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    measured = args.out / "measured"
    measured.mkdir(parents=True, exist_ok=True)
    keys = ("tokens", "windows", "answer_tokens", "seed")
    settings = {key: getattr(args, key) for key in keys} | {"text": args.text.name, "keep": KEEP}
    kept = args.out / "settings.json"
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"--out {args.out} holds students of other settings: {kept.read_text()}")
    kept.write_text(json.dumps(settings))
    for name in args.only:
        folder = train(args, name)
        if args.train_only:
            continue
        if not (file := measured / f"{name}.json").is_file():
            write(file, measure(args, name, folder))
        print(f"{name}: done", file=sys.stderr, flush=True)
        found = {path.stem: json.loads(path.read_text()) for path in measured.glob("*.json")}
        students = {name: found[name] for name in STUDENTS if name in found}
        write(args.out / "recipes.json", {"settings": settings, "students": students})


def write(file: Path, content: Any) -> None:
    """As a whole, because another call may be reading the folder."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n")
    part.rename(file)


def train(args: argparse.Namespace, name: str) -> Path:
    """The folder of the pair that this recipe ends with, made unless it is there."""
    recipe = STUDENTS[name]
    start = train(args, recipe.start) if recipe.start else None
    for number, options in enumerate(recipe.phases):
        folder = args.out / (name if number + 1 == len(recipe.phases) else f"{name}-{number}")
        if not (folder / "pair.json").is_file():
            shared = ["--keep", KEEP, "--data", *map(str, args.data), "--loss-on", "all", "--out", str(folder)]
            shared += ["--tokens", str(args.tokens // len(recipe.phases)), "--seed", str(args.seed + number)]
            shared += ["--lr", "1e-3", "--schedule", "linear", "--compile", "--save-steps", "20", "--resume"]
            if start:
                shared += ["--start-from", str(start), "--order", "start", "--no-warm-start", "--calibration-rows", "8"]
            subprocess.run([sys.executable, "-m", "server", "distill", *shared, *options], check=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        start = folder
    return folder


def measure(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One student: text by patch order and size, chat by size, and its training curve. Windows and answers are kept
    apart (`kl_windows`), so that students can be compared in pairs."""
    import torch
    from transformers import AutoTokenizer

    from model_store.assembly import Elasticity
    from model_store.distill.from_pair import load_elastic
    from model_store.evaluate.measure import Scores, score, summary, windows
    from model_store.pair import open_pair

    def rows(found: dict[int, Scores]) -> dict[int, dict[str, Any]]:
        *sizes, top = sorted(found)
        table = {}
        for size in sizes:
            row = found[size]
            kl = [round(total / tokens, 5) for total, tokens in zip(row.kl, row.tokens, strict=True)]
            figures = {key: round(value, 5) for key, value in summary(row, found[top]).items()}
            table[size] = figures | {"kl_windows": kl}
        return table

    pair = open_pair(None, folder)
    model, served = load_elastic(pair, torch.bfloat16), pair.elasticity
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    ids = tokenizer(args.text.read_text(), add_special_tokens=False).input_ids
    sequences = windows(ids, 512, args.windows)
    orders = {"served": served}
    if STUDENTS[name].fixed_orders:
        orders["last_to_first"] = Elasticity.last_to_first(served.num_teacher_layers, served.kept)
        orders["first_to_last"] = Elasticity.first_to_last(served.num_teacher_layers, served.kept)
    text = {}
    for order, elasticity in orders.items():
        model.elasticity = elasticity
        text[order] = rows(score(model, served.sizes, sequences))
    model.elasticity, chat = served, {}
    if STUDENTS[name].chat:
        told = teacher_answers(args, model, tokenizer)
        sequences = [torch.tensor(one["prompt"] + one["answer"]) for one in told]
        chat = rows(score(model, served.sizes, sequences, [len(one["prompt"]) for one in told]))
    curve = folder / "training_curve.jsonl"
    steps = [json.loads(line) for line in curve.read_text().splitlines()] if curve.is_file() else []
    kept = ("tokens", "loss", "kl", "align", "pure")
    return {
        "start": STUDENTS[name].start, "phases": STUDENTS[name].phases, "orders": text, "chat": chat,
        "curve": [{key: round(float(row[key]), 4) for key in kept if row.get(key) is not None} for row in steps],
    }  # fmt: skip


def teacher_answers(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompts and greedy answers as token ids, made once."""
    from model_store.evaluate import end_tokens
    from model_store.evaluate.chat import chat_prompts, prompt_ids, transformers_generate

    file = args.out / "answers.json"
    if not file.is_file():
        prompts = prompt_ids(tokenizer, chat_prompts(CHAT, 32))
        speak = transformers_generate(model, end_tokens(model, tokenizer))
        answers = speak(model.elasticity.num_teacher_layers, prompts, args.answer_tokens)
        write(file, [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
