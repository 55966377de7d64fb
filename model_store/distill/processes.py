"""The processes of one training run: a device each, the same start, and one of them that decides and writes.

`torchrun --nproc-per-node N -m server distill ...` starts N (of a CUDA machine one per GPU); otherwise there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from model_store.distill.recipe import Preset

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from model_store.distill.job import DistillJob

_LONGEST_WAIT = 86_400  # seconds that the others wait for what the first one does alone, as answering prompts


def num_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def pick_device(name: str) -> str:
    """What "auto", "cpu", "cuda" or "cuda:N" comes to here. ValueError for another name, or one that is not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    available = torch.cuda.device_count()
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= available:
        raise ValueError(f"--device {name}: this machine, or this build of torch, has {available} CUDA devices")
    return ("cuda" if available else "cpu") if name == "auto" else name


def has_bf16(on_cpu: bool) -> bool:
    """Whether products of bfloat16 matrices are worth their rounding."""
    return not on_cpu or torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX")


def num_steps(job: DistillJob) -> int:
    """Optimizer steps in which all processes together see --tokens."""
    rows = job.batch_rows * job.accumulate * num_processes()
    return max(1, int(job.tokens) // (rows * job.row_tokens))


def training_arguments(job: DistillJob, preset: Preset) -> TrainingArguments:
    """The library's arguments of the run. Making them joins the processes and settles each one's `device`, so make
    them before anything is put on one."""
    from transformers import TrainingArguments

    on_cpu, steps = pick_device(job.device) == "cpu", num_steps(job)
    matrices = preset.optimizer == "muon"
    schedule = {}
    if job.schedule == "warmup_stable_decay":
        schedule = {"num_decay_steps": max(1, round(steps * job.decay_share)), "decay_type": "linear"}
    arguments = TrainingArguments(
        output_dir=str(job.folder / "checkpoints"), max_steps=steps, per_device_train_batch_size=job.batch_rows,
        gradient_accumulation_steps=job.accumulate, max_grad_norm=1.0 if preset.optimizer == "adamw" else 0.0,
        learning_rate=job.lr or (1e-3 if matrices and not job.rank else 3e-4), weight_decay=job.weight_decay,
        adam_beta2=0.95, lr_scheduler_type=job.schedule, lr_scheduler_kwargs=schedule,
        warmup_steps=max(1, steps // 50), bf16=has_bf16(on_cpu), use_cpu=on_cpu,
        logging_steps=max(1, min(10, steps // 20)), save_steps=job.save_steps, save_total_limit=2, seed=job.seed,
        remove_unused_columns=False, report_to="none", ddp_find_unused_parameters=True, ddp_timeout=_LONGEST_WAIT,
        dataloader_pin_memory=not on_cpu,
    )  # fmt: skip
    assert arguments.world_size == num_processes()
    if arguments.n_gpu > 1:
        # One process that sees several GPUs: the library would copy the model onto all of them at each step, and
        # leave the teacher, which is no submodule, on the first. Several take several processes.
        arguments._n_gpu = 1
    return arguments


def agreed(decide: Callable[[], Any]) -> Any:
    """What `decide` returns in the first process (a picklable value), in every process; the others do not call it."""
    if num_processes() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    value = [decide() if is_first() else None]
    return broadcast_object_list(value, from_process=0)[0]


@torch.no_grad()
def as_in_first(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors with the first process's: what each computed for itself may differ in rounding."""
    if num_processes() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
