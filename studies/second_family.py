"""Does the recipe work on another family? A tiny Pythia (GPT-NeoX) is trained here, distilled, and interpolated.

    python -m studies.second_family [--seed 1] [--text speeches.jsonl.gz] [--keep 0,3,6,9,12,15] [--students ...]

Trains a teacher of sixteen layers from scratch on the sources of Python's standard library (or another text), then
makes students that keep some of its layers, of the same number of tokens each through `boomerang distill`, and one that
is merely pruned (the teacher's layers, untrained). Prints perplexity and KL to the teacher of every size of all of them
on held-out files, last-to-first. A quarter of an hour and three minutes a student on one core of a server CPU.

Answered 28 November 2026: every size is usable, and with cosine distance and patching quality rises at every layer
(docs/log/2026-11-28-second-family.md).
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.distill.from_pair import load_elastic
from model_store.distill.recipe import kept_layers
from model_store.distill.write import write_full, write_manifest
from model_store.evaluate import measure_text
from model_store.pair import open_pair
from server.cli import main as boomerang

VOCAB, ROW, BATCH = 1024, 128, 16
KEEP = "every-2nd"
# What is not there everywhere, and tables of characters.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
_PATCHING = ["--pure-share", "0.4", "--small-bias", "1.5"]
_PUBLISHED = ["--recipe", "published", "--order", "last", "--lr", "1e-3"]
_COSINE = ["--recipe", "cosine", "--train-ends", "--order", "last", "--lr", "1e-3"]
STUDENTS = {  # name: options of `boomerang distill`
    "published": _PUBLISHED,
    "cosine": _COSINE,
    "published+patching": [*_PUBLISHED, *_PATCHING],
    "cosine+patching": [*_COSINE, *_PATCHING],
    "ours": ["--recipe", "stochastic", "--order", "klpatch", "--lr", "1e-3"],
}


def read(path: Path | None) -> list[str]:
    """Documents of a file; without one, the modules of the standard library."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = (file for file in sorted(library.rglob("*.py")) if not _LEFT_OUT & {*file.relative_to(library).parts})
        return [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    if path.name.endswith(".gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    return [path.read_text()]


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def train_teacher(folder: Path, texts: list[str], args: argparse.Namespace) -> None:
    """Train from scratch with a plain loop.

    A model as small and as briefly trained as this one hardly depends on its depth: from the family's own initial
    weights each later layer adds a small part to the residual stream, and half of the layers can be left out for less
    than twice the perplexity. In large models the stream grows exponentially with depth, over the 48 layers of GPT-2 XL
    8-fold (Heimersheim and Turner, "Residual stream norms grow exponentially over the forward pass", 2023), so that
    what a layer writes counts. Here it is made to, and more steeply, in place of a long training: what layer i writes
    is scaled by growth^i at the start. Muon's full-rank steps do the rest; AdamW leaves layers close to the identity.
    """
    layers, hidden, steps = args.layers, args.hidden, args.teacher_steps
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, rotary_pct=0.25, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
        initializer_range=hidden**-0.5, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.gpt_neox.layers):
            layer.attention.dense.weight *= args.growth**i
            layer.mlp.dense_4h_to_h.weight *= args.growth**i
    ids = AutoTokenizer.from_pretrained(folder)("<|endoftext|>".join(texts)).input_ids
    rows = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)
    inner = {p for layer in model.gpt_neox.layers for p in layer.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if p not in inner]
    optimizers = [
        torch.optim.Muon(list(inner), lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], steps, pct_start=0.1, cycle_momentum=False)
        for o in optimizers
    ]
    recent: list[float] = []
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent.append(loss.item())
        if step % 50 == 49:
            print(f"teacher: step {step + 1}, loss {sum(recent[-50:]) / 50:.3f}", file=sys.stderr, flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_pruned(teacher: Path, folder: Path, keep: str) -> None:
    """The student before any training, as a pair that the commands take."""
    model = GPTNeoXForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.config.num_hidden_layers
    elastic = ElasticModel(model, Elasticity.last_to_first(layers, kept_layers(keep, layers)))
    folder.mkdir(parents=True)
    write_full(folder, elastic)
    write_manifest(folder, elastic, {"name": "pruned", "teacher": str(teacher)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="training text, .jsonl.gz with `text` or .txt (default: see above)")
    parser.add_argument("--out", type=Path, default=Path("second_family"), help="working folder, emptied first")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--keep", default=KEEP, help="layers of the students, as `distill` takes them (every-2nd)")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--growth", type=float, default=1.4, help="of what a layer writes, per layer, at the start")
    parser.add_argument("--teacher-steps", type=int, default=2000, help=f"of {BATCH} rows of {ROW} tokens")
    parser.add_argument("--tokens", type=float, default=1.2e6, help="of each distillation")
    parser.add_argument("--seed", type=int, default=0)
    known = ["pruned", *STUDENTS]
    parser.add_argument("--students", nargs="+", choices=known, default=known[:-1], metavar="NAME",
                        help=f"of {', '.join(known)} (default: all but the last)")  # fmt: skip
    parser.add_argument("--order", choices=("last_to_first", "first_to_last"), help="not each student's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shutil.rmtree(args.out, ignore_errors=True)
    teacher = args.out / "teacher"
    teacher.mkdir(parents=True)
    texts = [text for text in read(args.text) if text.strip()]
    held_out, texts = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    started = time.time()
    save_tokenizer(teacher, texts)
    train_teacher(teacher, texts, args)
    print(f"teacher trained in {time.time() - started:.0f} s", file=sys.stderr)
    data = args.out / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    results = {}
    for name in args.students:
        started = time.time()
        student = args.out / name
        if name == "pruned":
            write_pruned(teacher, student, args.keep)
        else:
            options = ["--keep", args.keep, "--device", "cpu", "--row-tokens", str(ROW), "--batch-rows", str(BATCH)]
            options += ["--seed", str(args.seed)]
            names = ["--teacher", str(teacher), "--data", str(data), "--out", str(student)]
            if status := boomerang(["distill", *names, *options, "--tokens", str(args.tokens), *STUDENTS[name]]):
                sys.exit(status)
        print(f"{name} made in {time.time() - started:.0f} s", file=sys.stderr)
        results[name] = measure(teacher, student, args.order, held_out)
    print(f"| size | {' | '.join(f'{name}: perplexity / KL' for name in results)} |")
    print("|---" * (len(results) + 1) + "|")
    for size in next(iter(results.values())):
        cells = [f"{rows[size]['perplexity']:.1f} / {rows[size]['kl']:.2f}" for rows in results.values()]
        print(f"| {size}L | {' | '.join(cells)} |")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))


def measure(teacher: Path, student: Path, order: str | None, held_out: list[str]) -> dict[int, dict[str, float]]:
    pair = open_pair(teacher, student, patch_order=order)
    model = load_elastic(pair, torch.float32)
    ids = AutoTokenizer.from_pretrained(teacher)("<|endoftext|>".join(held_out)).input_ids
    return measure_text(model, pair.elasticity.sizes, ids, 256, 24)


if __name__ == "__main__":
    main()
