"""What `boomerang distill` is asked to do: its options, as a value that does not change."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.distill.recipe import PRESETS, Preset, row_sizes, with_overrides

ORDERS = {"last": "last_to_first", "first": "first_to_last", "start": "thresholds"}
_IN_THE_MANIFEST = ("store", "out", "teacher", "data", "start_from", "resume", "licence")  # by other names, or not


@dataclass(frozen=True, slots=True)
class DistillJob:
    """One run; the fields are the options of `add_arguments`."""

    teacher: str | None
    keep: str
    data: tuple[Path, ...]
    quick: bool
    max_kl: float
    minutes: float
    background: bool
    out: Path | None
    start_from: tuple[Path, ...]
    start_weights: tuple[float, ...]
    recipe: str
    order: str
    tokens: float
    row_tokens: int
    batch_rows: int
    accumulate: int
    lr: float | None
    schedule: str
    decay_share: float
    weight_decay: float
    loss_on: str
    self_generate: int
    answer_tokens: int
    temperature: float
    rank: int
    store_rank: int
    int8: bool
    calibration_rows: int
    ce: float | None
    kl: float | None
    align: float | None
    unlikelihood: float | None
    position_share: float | None
    pure_share: float | None
    small_bias: float | None
    row_sizes: str | None
    order_noise: float | None
    warm_start: bool | None
    train_ends: bool | None
    train_single: bool | None
    optimizer: str | None
    compile: bool
    licence: str | None
    device: str
    seed: int
    save_steps: int
    resume: bool
    store: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> DistillJob:
        """From parsed options. ValueError for those that do not fit together."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        job = cls(**frozen)
        if not job.data and not job.quick:
            raise ValueError("--data: name files to train on, or ask for --quick")
        if job.out is None and not job.quick:
            raise ValueError("--out: name the folder of the new pair")
        if not job.minutes >= 0:
            raise ValueError(f"--minutes {job.minutes:g}: 0 or more")
        if not job.max_kl > 0:
            raise ValueError(f"--max-kl {job.max_kl:g}: above 0")
        if job.preset.train_ends and (job.rank or job.store_rank):
            raise ValueError("--rank and --store-rank share embedding and head with the teacher: add --no-train-ends")
        if job.row_sizes and job.small_bias is not None:
            raise ValueError("--row-sizes draws evenly from its list: leave --small-bias out, or --row-sizes")
        if job.order == "start" and not job.start_from:
            raise ValueError("--order start: there is no --start-from to take it from")
        if job.start_weights and not job.start_from:
            raise ValueError("--start-weights: there is no --start-from whose weights they would be")
        return job

    @property
    def folder(self) -> Path:
        """--out, where it must be given."""
        assert self.out is not None, "`of` refuses to do without"
        return self.out

    @property
    def preset(self) -> Preset:
        """The recipe with every option that was given."""
        return with_overrides(PRESETS[self.recipe], dataclasses.asdict(self) | {"row_sizes": row_sizes(self.row_sizes)})

    @property
    def options(self) -> dict[str, Any]:
        """What the manifest of the pair says of the run."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _IN_THE_MANIFEST}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--teacher", help="folder, GGUF file or hub id (default: the default pair's teacher)")
    add("--keep", default="every-2nd", help="every-2nd, a list 0,2,4,..., or a number of layers (default %(default)s)")
    add("--data", type=Path, nargs="+", default=[], help=".txt, .jsonl or .jsonl.gz files or folders of them (--quick: "
        "left out, the teacher's own text)")  # fmt: skip
    add("--quick", action="store_true", help="blocks of two layers that are missed least, fitted by least squares, "
        "then trained; only sizes that held-out text shows to be worth it")  # fmt: skip
    add("--minutes", type=float, default=20.0, help="of --quick: how long it may keep the machine busy; 0: no training "
        "[%(default)g]")  # fmt: skip
    add("--background", action="store_true", help="of --quick: at the lowest priority, until the process that started "
        "it ends")  # fmt: skip
    add("--max-kl", type=float, default=1.0, help="of --quick: the most KL of a size that is offered [%(default)s]")
    add("--out", type=Path, help="folder of the new pair, and of what a run goes on from (--quick: left out, its place "
        "in the store, where servers of the teacher find it)")  # fmt: skip
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
