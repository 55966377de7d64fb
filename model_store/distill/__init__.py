"""`boomerang distill`: make a student for a teacher and write the pair that `serve` takes.

Offers `add_arguments(parser)` and `run(args)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from model_store.distill.data import Message
    from model_store.distill.elastic import ElasticModel
    from model_store.distill.recipe import Preset
    from model_store.evaluate.chat import Generate

ORDERS = {"last": "last_to_first", "first": "first_to_last", "start": "thresholds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--teacher", help="folder, GGUF file or hub id (default: the default pair's teacher)")
    add("--keep", default="every-2nd", help="every-2nd, a list 0,2,4,..., or a number of layers (default %(default)s)")
    add("--data", type=Path, nargs="+", required=True, help=".txt, .jsonl or .jsonl.gz files or folders of them")
    add("--out", type=Path, required=True, help="folder of the new pair (and of checkpoints, in checkpoints/)")
    add("--start-from", type=Path, nargs="+", default=[], metavar="FOLDER", help="students to start from: their mean")
    add("--start-weights", type=float, nargs="+", default=[], metavar="W", help="or their sum with these weights, 1 in "
        "all; a negative one leads away from that student")  # fmt: skip
    add("--recipe", default="stochastic", choices=("stochastic", "published", "adapt", "cosine"))
    orders = ("last", "first", "klpatch", "start")
    add(
        "--order", default="klpatch", choices=orders, help="how sizes grow; start: as the first student of --start-from"
    )
    add("--tokens", type=float, default=2e6, help="to train on; 0: only prune, order, store (default %(default).0f)")
    add("--row-tokens", type=int, default=256, help="tokens of a packed row (default %(default)s)")
    add("--batch-rows", type=int, default=8, help="rows of a step and device (default %(default)s)")
    add("--accumulate", type=int, default=1, help="batches per optimizer step (default %(default)s)")
    add("--lr", type=float, default=None, help="peak learning rate (default 1e-3 with muon, else 3e-4)")
    add("--schedule", default="cosine", help="transformers' lr_scheduler_type (default %(default)s)")
    add("--decay-share", type=float, default=0.25, help="of warmup_stable_decay (default %(default)s)")
    add("--weight-decay", type=float, default=0.0)
    add("--loss-on", default="response", choices=("response", "all"), help="which tokens of conversations count")
    add("--self-generate", type=int, default=0, metavar="N", help="let the teacher answer up to N bare prompts")
    add("--answer-tokens", type=int, default=256, help="longest answer of --self-generate (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="of --self-generate; 0 is greedy (default %(default)s)")
    add("--rank", type=int, default=0, help="train low-rank differences of this rank (default: whole layers)")
    add("--store-rank", type=int, default=0, help="train whole layers, store differences of this rank")
    add("--int8", action="store_true", help="store low-rank factors as int8 with a scale per row")
    add("--calibration-rows", type=int, default=96, help="rows for warm start and patch order (default %(default)s)")
    add("--ce", type=float, help="weight of the cross-entropy, not taken on said_by documents [recipe]")
    add("--kl", type=float, help="weight of the KL to the teacher [recipe]")
    add("--align", type=float, help="weight of the mean cosine distance [recipe]")
    add("--unlikelihood", type=float, help="weight at loops in a size's own words (said_by) [recipe]")
    add("--position-share", type=float, help="share of positions that get logits [recipe]")
    add("--pure-share", type=float, help="share of rows that run the student alone; 1 turns patching off [recipe]")
    add("--small-bias", type=float, help="1: the other rows' sizes spread evenly; more: towards small ones [recipe]")
    add("--row-sizes", help="sizes of the other rows instead, each as often as named: 28,28,29")
    add("--order-noise", type=float, help="how much the order is shuffled at each step, in ranks [recipe]")
    flag = argparse.BooleanOptionalAction
    add("--warm-start", action=flag, default=None, help="closed-form fit before training [recipe]")
    add("--train-ends", action=flag, default=None, help="train embedding, norm and head too [recipe]")
    add("--train-single", action=flag, default=None, help="train one-layer blocks too [recipe]")
    add("--optimizer", choices=("muon", "adamw"), help="[recipe]")
    add("--compile", action="store_true", help="fuse the layers with torch.compile: minutes to start, faster steps")
    add("--licence", help="of the student, for its model card and those of its exports (as Apache-2.0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="of each process [auto]")
    add("--seed", type=int, default=0)
    add("--save-steps", type=int, default=200, help="steps between checkpoints that --resume continues from")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--store", help="folder of the local model store")


def run(args: argparse.Namespace, generate: Generate | None = None) -> int:
    """Distil and write the pair. `generate` is the teacher in an engine (--self-generate), else transformers'.

    Started by torchrun, every process does this on a share of each step's rows, and the first one writes.
    """
    import torch
    from transformers import AutoTokenizer, set_seed

    from model_store.assembly import Elasticity
    from model_store.distill.cpu_attention import use_matmul_attention
    from model_store.distill.data import answer_prompts, check_speakers, pack, read_documents
    from model_store.distill.elastic import ElasticModel
    from model_store.distill.from_pair import load_transformers
    from model_store.distill.processes import agreed, has_bf16, is_first, training_arguments
    from model_store.distill.recipe import PRESETS, kept_layers, row_sizes, with_overrides
    from model_store.distill.start import order_of, start_from
    from model_store.distill.write import freeze_vectors
    from model_store.evaluate import end_tokens
    from model_store.evaluate.chat import transformers_generate
    from model_store.sources import default_teacher, resolve

    preset = with_overrides(PRESETS[args.recipe], vars(args) | {"row_sizes": row_sizes(args.row_sizes)})
    if preset.train_ends and (args.rank or args.store_rank):
        raise ValueError("--rank and --store-rank share embedding and head with the teacher: add --no-train-ends")
    if args.row_sizes and args.small_bias is not None:
        raise ValueError("--row-sizes draws evenly from its list: leave --small-bias out, or --row-sizes")
    if args.order == "start" and not args.start_from:
        raise ValueError("--order start: there is no --start-from to take it from")
    arguments = training_arguments(args, preset)
    device = arguments.device
    set_seed(args.seed)
    teacher_path = resolve(args.teacher, args.store) if args.teacher else default_teacher(args.store)
    tokenizer = AutoTokenizer.from_pretrained(teacher_path, local_files_only=True)
    dtype = torch.bfloat16 if has_bf16(device.type == "cpu") else torch.float32
    teacher = load_transformers(teacher_path, dtype, args.store).to(device)
    kept = kept_layers(args.keep, teacher.config.num_hidden_layers)
    first_order = "first_to_last" if args.order == "first" else "last_to_first"
    elasticity = getattr(Elasticity, first_order)(teacher.config.num_hidden_layers, kept)
    if device.type == "cpu":
        use_matmul_attention(teacher, args.row_tokens)
    model = ElasticModel(teacher, elasticity, own_ends=preset.train_ends, train_single=preset.train_single).to(device)

    if args.rank or args.store_rank:
        freeze_vectors(model)
    with_student = model.elasticity.sizes[:-1]
    if unknown := {*preset.row_sizes} - {*with_student}:
        raise ValueError(f"--row-sizes: {min(unknown)} is no size with student layers, as {with_student} are")
    if args.start_from:
        start_from(model, args.start_from, args.start_weights)
    elif args.start_weights:
        raise ValueError("--start-weights: there is no --start-from whose weights they would be")
    if args.order == "start":
        _set_thresholds(model, order_of(args.start_from[0], kept))
    documents = [document for path in args.data for document in read_documents(path)]
    if args.self_generate:
        generate = generate or transformers_generate(model, end_tokens(model, tokenizer))
        speak = _speaker(args, generate, tokenizer, model.elasticity.sizes[-1])
        documents = agreed(lambda: answer_prompts(documents, speak, args.self_generate))
    documents = [document for document in documents if not document.needs_answer]
    check_speakers(documents, model.elasticity.sizes, are_needed=bool(args.tokens and preset.unlikelihood))
    calibration = args.calibration_rows * args.row_tokens
    rows = pack(documents, tokenizer, int(args.tokens) + calibration, args.row_tokens, args.loss_on, args.seed)
    if len(rows) < args.calibration_rows + bool(args.tokens):
        raise ValueError(f"--tokens and --data leave {len(rows)} rows, not more than --calibration-rows")
    _say(f"{len(documents)} documents, {len(rows)} rows of {args.row_tokens} tokens")

    if is_first():
        _note_text(args, documents)
    calibrating, rows = rows.split(args.calibration_rows)
    held = [ids.to(device) for ids in calibrating.ids.split(16)]
    started = time.time()
    _train(model, rows, held, preset, args, arguments)
    if is_first():
        _choose_order(model, held, args.order, rows=16)
        _write(args, model, preset, tokenizer, teacher_path, held, time.time() - started)
    arguments.distributed_state.destroy_process_group()
    return 0


def _train(
    model: ElasticModel, rows: Any, held: list, preset: Preset, args: argparse.Namespace, arguments: TrainingArguments
) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    from model_store.distill.elastic import LossWeights
    from model_store.distill.head_loss import compile_head_loss
    from model_store.distill.low_rank import make_low_rank
    from model_store.distill.processes import agreed, as_in_first, is_first
    from model_store.distill.trainer import CurveFile, DistillTrainer, SizeSampler
    from model_store.distill.warm_start import fit_by_least_squares
    from model_store.distill.write import write_config

    checkpoints = args.out / "checkpoints"
    order_file = checkpoints / "order.json"

    def found() -> tuple[str | None, list[int] | None]:
        """The checkpoint to continue from and the thresholds of its run."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_config(checkpoints, model)  # so that a run can start from the checkpoints of one that was cut short
        if not args.resume:
            return None, None
        return get_last_checkpoint(str(checkpoints)), _read_order(order_file)

    last, thresholds = agreed(found)
    if last is None and preset.warm_start:  # the fit is in no file until the first checkpoint
        fit_by_least_squares(model, held, progress=_say)
    if thresholds is not None:
        _set_thresholds(model, thresholds)
    elif last is None and (preset.warm_start or args.start_from):
        # Fitted, the blocks differ in how much they are missed: train towards the order that will be served.
        _choose_order(model, held, args.order, rows=6)
        _set_thresholds(model, agreed(lambda: list(model.elasticity.thresholds)))
        if is_first():
            order_file.write_text(json.dumps(list(model.elasticity.thresholds)))
    factors = make_low_rank(model, args.rank, _moments(model, held)) if args.rank else None
    as_in_first([*model.parameters(), *(side for f in factors or [] for side in (f.a, f.b))])
    if not args.tokens:
        return
    trainer = DistillTrainer(
        model=model, args=arguments, train_dataset=rows,
        sampler=SizeSampler(model.elasticity, preset, args.seed),
        weights=LossWeights(preset.ce, preset.kl, preset.align, preset.position_share, preset.unlikelihood),
        matrix_optimizer=preset.optimizer == "muon", factors=factors,
        callbacks=[CurveFile(args.out / "training_curve.jsonl")],
    )  # fmt: skip
    model.compile_layers(args.compile)
    compile_head_loss(args.compile)
    trainer.train(resume_from_checkpoint=last)
    model.compile_layers(False)
    compile_head_loss(False)


def _note_text(args: argparse.Namespace, documents: list) -> None:
    """Leave a fingerprint of the training text, and of what --start-from was trained on, beside the checkpoints."""
    from model_store.distill.start import source_name
    from model_store.evaluate.overlap import FINGERPRINT_FILE, Fingerprint, fingerprint_of

    text, checkpoints = Fingerprint.of(documents), args.out / "checkpoints"
    for folder in dict.fromkeys(args.start_from):
        text.merge(fingerprint_of(folder) or Fingerprint.of_unknown(source_name(folder)))
    if args.resume and (earlier := fingerprint_of(checkpoints)):
        text.merge(earlier)  # --data may be another now
    checkpoints.mkdir(parents=True, exist_ok=True)
    text.save(checkpoints / FINGERPRINT_FILE)


def _moments(model: ElasticModel, held: list) -> dict:
    """Second moments of the inputs of every student linear, along paths of several sizes."""
    import torch

    from model_store.distill.processes import has_bf16
    from model_store.distill.write import input_moments

    paths = [model.elasticity.path(size).teacher_stations for size in model.elasticity.sizes[:-1:8]]
    device = held[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=has_bf16(device == "cpu")):
        return input_moments(model, held[:2], paths)


def _choose_order(model: ElasticModel, held: list, order: str, rows: int) -> None:
    """Set the model's thresholds: KLPatch measures its order on held-out `rows`, the others are fixed."""
    if order != "klpatch":
        return
    from model_store.assembly import Elasticity
    from model_store.distill.order import greedy_order, in_dtype, kl_of_paths
    from model_store.evaluate.measure import is_monotone

    own = model.elasticity
    with in_dtype(model, next(model.teacher.parameters()).dtype):
        found = greedy_order(own, kl_of_paths(model, [held[0][:rows]]), "up", _say)
        model.elasticity = Elasticity.from_order(own.num_teacher_layers, [s.start for s in own.stations], found)
        kl = kl_of_paths(model, [held[-1][:rows]])
        by_size = {size: kl(model.elasticity.path(size).teacher_stations) for size in model.elasticity.sizes}
    worse = is_monotone(by_size)
    _say(f"order {found}; KL on other text {', '.join(f'{size}: {value:.3f}' for size, value in by_size.items())}")
    _say(f"it does not fall at {worse}" if worse else "it falls at every added layer")


def _read_order(file: Path) -> list[int] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _set_thresholds(model: ElasticModel, thresholds: list[int]) -> None:
    from model_store.assembly import Elasticity

    own = model.elasticity
    model.elasticity = Elasticity(own.num_teacher_layers, [s.start for s in own.stations], thresholds)


def _speaker(
    args: argparse.Namespace, generate: Generate, tokenizer: Any, size: int
) -> Callable[[list[list[Message]]], list[str]]:
    """A function from conversations that wait for an answer to the teacher's answers."""

    def answer(conversations: list[list[Message]]) -> list[str]:
        room = args.row_tokens * 4
        prompts = [
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)[-room:]
            for turns in conversations
        ]
        answers = generate(size, prompts, args.answer_tokens, args.temperature)
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    return answer


def _write(
    args: argparse.Namespace, model: ElasticModel, preset: Preset, tokenizer: Any, teacher_path: Path,
    held: list, seconds: float,
) -> None:  # fmt: skip
    import dataclasses

    from model_store.distill.start import source_name
    from model_store.distill.write import write_full, write_low_rank, write_manifest
    from model_store.evaluate.overlap import FINGERPRINT_FILE

    model.eval()
    args.out.mkdir(parents=True, exist_ok=True)
    elsewhere = ("store", "out", "teacher", "data", "start_from", "resume", "licence")  # in the manifest, or in none
    options = {k: v for k, v in vars(args).items() if not callable(v) and k not in elsewhere}
    manifest = {
        "name": args.out.name, "teacher": args.teacher or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "patch_order": ORDERS.get(args.order, args.order), "command": "boomerang distill", "options": options,
        "recipe": dataclasses.asdict(preset), "data": [path.name for path in args.data],
        "start_from": [source_name(path) for path in args.start_from],
        "tokens": int(args.tokens), "seconds": round(seconds),
    }  # fmt: skip
    if args.licence:
        manifest["licence"] = args.licence
    if rank := args.rank or args.store_rank:
        # A student trained in this rank loses nothing by the cut, whatever the moments.
        moments = None if args.rank else _moments(model, held)
        write_low_rank(args.out, model, lambda name: rank, moments, args.int8)
    else:
        write_full(args.out, model)
        tokenizer.save_pretrained(args.out)
    shutil.copyfile(args.out / "checkpoints" / FINGERPRINT_FILE, args.out / FINGERPRINT_FILE)
    write_manifest(args.out, model, manifest)
    teacher = args.teacher or teacher_path
    print(f"wrote {args.out}\nserve it: boomerang serve --teacher {teacher} --student {args.out}")


def _say(line: str) -> None:
    from model_store.distill.processes import is_first

    if is_first():
        print(line, file=sys.stderr, flush=True)
