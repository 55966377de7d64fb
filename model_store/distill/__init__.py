"""`boomerang distill`: make a student for a teacher and write the pair that `serve` takes.

Offers `DistillJob` and `run(job)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.distill.job import ORDERS, DistillJob

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from model_store.distill.data import Message
    from model_store.distill.elastic import ElasticModel
    from model_store.distill.recipe import Preset
    from model_store.evaluate.chat import Generate
    from model_store.pair import Pair

__all__ = ["DistillJob", "run"]


def run(
    job: DistillJob, generator: Callable[[DistillJob], Generate] | None = None,
    nested: Callable[[Pair], Path] | None = None,
) -> int:  # fmt: skip
    """Distil and write the pair. `generator` makes the teacher in an engine (--self-generate), else transformers'.
    `nested`: as `run_quick` has it.

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
    from model_store.distill.recipe import kept_layers
    from model_store.distill.start import order_of, start_from
    from model_store.distill.write import freeze_vectors
    from model_store.evaluate import end_tokens
    from model_store.evaluate.chat import transformers_generate
    from model_store.opening import opening
    from model_store.sources import default_teacher, resolve
    from model_store.weights import Checkpoint

    if job.quick:
        from model_store.distill.quick import run_quick

        return run_quick(job, generator, nested)
    preset = job.preset
    arguments = training_arguments(job, preset)
    device = arguments.device
    set_seed(job.seed)
    teacher_path = resolve(job.teacher, job.store) if job.teacher else default_teacher(job.store)
    kept = kept_layers(job.keep, Checkpoint(teacher_path, job.store).spec.num_layers)
    tokenizer = AutoTokenizer.from_pretrained(teacher_path, local_files_only=True)
    dtype = torch.bfloat16 if has_bf16(device.type == "cpu") else torch.float32
    teacher = load_transformers(teacher_path, dtype, job.store).to(device)
    first_order = "first_to_last" if job.order == "first" else "last_to_first"
    elasticity = getattr(Elasticity, first_order)(teacher.config.num_hidden_layers, kept)
    if device.type == "cpu":
        use_matmul_attention(teacher, job.row_tokens)
    model = ElasticModel(teacher, elasticity, own_ends=preset.train_ends, train_single=preset.train_single).to(device)

    if job.rank or job.store_rank:
        freeze_vectors(model)
    with_student = model.elasticity.sizes[:-1]
    if unknown := {*preset.row_sizes} - {*with_student}:
        known = f"{with_student[0]}L to {with_student[-1]}L"
        raise ValueError(f"--row-sizes: {min(unknown)}L is no size with student layers ({known})")
    if job.start_from:
        start_from(model, job.start_from, job.start_weights)
    if job.order == "start":
        _set_thresholds(model, order_of(job.start_from[0], kept))
    documents = [document for path in job.data for document in read_documents(path)]
    if job.self_generate:
        generate = generator(job) if generator else transformers_generate(model, end_tokens(model, tokenizer))
        speak = _speaker(job, generate, tokenizer, model.elasticity.sizes[-1])
        documents = agreed(lambda: answer_prompts(documents, speak, job.self_generate))
    documents = [document for document in documents if not document.needs_answer]
    check_speakers(documents, model.elasticity.sizes, are_needed=bool(job.tokens and preset.unlikelihood))
    calibration = job.calibration_rows * job.row_tokens
    num_tokens, first = int(job.tokens) + calibration, opening(tokenizer)
    rows = pack(documents, tokenizer, num_tokens, job.row_tokens, job.loss_on, job.seed, first)
    if len(rows) < job.calibration_rows + bool(job.tokens):
        raise ValueError(f"--tokens and --data leave {len(rows)} rows, not more than --calibration-rows")
    _say(f"{len(documents)} documents, {len(rows)} rows of {job.row_tokens} tokens")

    if is_first():
        _note_text(job, documents)
    calibrating, rows = rows.split(job.calibration_rows)
    held = [ids.to(device) for ids in calibrating.ids.split(16)]
    started = time.time()
    _train(model, rows, held, preset, job, arguments)
    if is_first():
        _choose_order(model, held, job.order, rows=16)
        _write(job, model, preset, tokenizer, teacher_path, held, time.time() - started)
    arguments.distributed_state.destroy_process_group()
    return 0


def _train(
    model: ElasticModel, rows: Any, held: list, preset: Preset, job: DistillJob, arguments: TrainingArguments
) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    from model_store.distill.elastic import LossWeights
    from model_store.distill.head_loss import compile_head_loss
    from model_store.distill.low_rank import make_low_rank
    from model_store.distill.processes import agreed, as_in_first, is_first
    from model_store.distill.trainer import CurveFile, DistillTrainer, SizeSampler
    from model_store.distill.warm_start import fit_by_least_squares
    from model_store.distill.write import write_config

    checkpoints = job.folder / "checkpoints"
    order_file = checkpoints / "order.json"

    def found() -> tuple[str | None, list[int] | None]:
        """The checkpoint to continue from and the thresholds of its run."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_config(checkpoints, model)  # so that a run can start from the checkpoints of one that was cut short
        if not job.resume:
            return None, None
        return get_last_checkpoint(str(checkpoints)), _read_order(order_file)

    last, thresholds = agreed(found)
    if last is None and preset.warm_start:  # the fit is in no file until the first checkpoint
        fit_by_least_squares(model, held, progress=_say)
    if thresholds is not None:
        _set_thresholds(model, thresholds)
    elif last is None and (preset.warm_start or job.start_from):
        # Fitted, the blocks differ in how much they are missed: train towards the order that will be served.
        _choose_order(model, held, job.order, rows=6)
        _set_thresholds(model, agreed(lambda: list(model.elasticity.thresholds)))
        if is_first():
            order_file.write_text(json.dumps(list(model.elasticity.thresholds)))
    factors = make_low_rank(model, job.rank, _moments(model, held)) if job.rank else None
    as_in_first([*model.parameters(), *(side for f in factors or [] for side in (f.a, f.b))])
    if not job.tokens:
        return
    trainer = DistillTrainer(
        model=model, args=arguments, train_dataset=rows,
        sampler=SizeSampler(model.elasticity, preset, job.seed),
        weights=LossWeights(preset.ce, preset.kl, preset.align, preset.position_share, preset.unlikelihood),
        matrix_optimizer=preset.optimizer == "muon", factors=factors,
        callbacks=[CurveFile(job.folder / "training_curve.jsonl")],
    )  # fmt: skip
    model.compile_layers(job.compile)
    compile_head_loss(job.compile)
    trainer.train(resume_from_checkpoint=last)
    model.compile_layers(False)
    compile_head_loss(False)


def _note_text(job: DistillJob, documents: list) -> None:
    """Leave a fingerprint of the training text, and of what --start-from was trained on, beside the checkpoints."""
    from model_store.distill.start import source_name
    from model_store.evaluate.overlap import FINGERPRINT_FILE, Fingerprint, fingerprint_of

    text, checkpoints = Fingerprint.of(documents), job.folder / "checkpoints"
    for folder in dict.fromkeys(job.start_from):
        text.merge(fingerprint_of(folder) or Fingerprint.of_unknown(source_name(folder)))
    if job.resume and (earlier := fingerprint_of(checkpoints)):
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
    _say(f"order {found}; KL on other text {', '.join(f'{size}L {value:.3f}' for size, value in by_size.items())}")
    _say(f"it does not fall at {', '.join(f'{size}L' for size in worse)}" if worse else "it falls at every added layer")


def _read_order(file: Path) -> list[int] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _set_thresholds(model: ElasticModel, thresholds: list[int]) -> None:
    from model_store.assembly import Elasticity

    own = model.elasticity
    model.elasticity = Elasticity(own.num_teacher_layers, [s.start for s in own.stations], thresholds)


def _speaker(
    job: DistillJob, generate: Generate, tokenizer: Any, size: int
) -> Callable[[list[list[Message]]], list[str]]:
    """A function from conversations that wait for an answer to the teacher's answers."""

    def answer(conversations: list[list[Message]]) -> list[str]:
        room = job.row_tokens * 4
        prompts = [
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)[-room:]
            for turns in conversations
        ]
        answers = generate(size, prompts, job.answer_tokens, job.temperature)
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    return answer


def _write(
    job: DistillJob, model: ElasticModel, preset: Preset, tokenizer: Any, teacher_path: Path,
    held: list, seconds: float,
) -> None:  # fmt: skip
    import dataclasses

    from model_store.distill.start import source_name
    from model_store.distill.write import write_full, write_low_rank, write_manifest
    from model_store.evaluate.overlap import FINGERPRINT_FILE

    model.eval()
    job.folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "name": job.folder.name, "teacher": job.teacher or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "patch_order": ORDERS.get(job.order, job.order), "command": "boomerang distill", "options": job.options,
        "recipe": dataclasses.asdict(preset), "data": [path.name for path in job.data],
        "start_from": [source_name(path) for path in job.start_from],
        "tokens": int(job.tokens), "seconds": round(seconds),
    }  # fmt: skip
    if job.licence:
        manifest["licence"] = job.licence
    if rank := job.rank or job.store_rank:
        # A student trained in this rank loses nothing by the cut, whatever the moments.
        moments = None if job.rank else _moments(model, held)
        write_low_rank(job.folder, model, lambda name: rank, moments, job.int8)
    else:
        write_full(job.folder, model)
        tokenizer.save_pretrained(job.folder)
    shutil.copyfile(job.folder / "checkpoints" / FINGERPRINT_FILE, job.folder / FINGERPRINT_FILE)
    write_manifest(job.folder, model, manifest)
    teacher = job.teacher or teacher_path
    print(f"wrote {job.folder}\nserve it: boomerang serve --teacher {teacher} --student {job.folder}")


def _say(line: str) -> None:
    from model_store.distill.processes import is_first

    if is_first():
        print(line, file=sys.stderr, flush=True)
