"""What `boomerang distill` is asked to do: its options, as a value that does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model_store.distill.recipe import PRESETS, Preset, row_sizes, with_overrides

ORDERS = {"last": "last_to_first", "first": "first_to_last", "start": "thresholds"}
_IN_THE_MANIFEST = ("store", "out", "teacher", "data", "start_from", "resume", "licence")  # by other names, or not


def _of(default: Any, help: str, **limits: Any) -> Any:
    return Field(default, description=help, **limits)


class DistillJob(BaseModel):
    """One run. The fields are the command's options. ValueError for those that do not fit together."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    teacher: str | None = _of(None, "folder, GGUF file or hub id [the default pair's teacher]")
    keep: str = _of("every-2nd", "every-2nd, a list 0,2,4,..., or a number of layers")
    data: tuple[Path, ...] = _of(
        (), ".txt, .jsonl or .jsonl.gz files or folders of them (--quick: left out, the teacher's own text)"
    )
    quick: bool = _of(
        False,
        "blocks of two layers that are missed least, fitted by least squares, then trained; only sizes that held-out "
        "text shows to be worth it",
    )
    minutes: float = _of(20.0, "of --quick: how long it may keep the machine busy; 0: no training", ge=0)
    background: bool = _of(False, "of --quick: at the lowest priority, until the process that started it ends")
    max_kl: float = _of(1.0, "of --quick: the most KL of a size that is offered", gt=0)
    out: Path | None = _of(
        None,
        "folder of the new pair, and of what a run goes on from (--quick: left out, its place in the store, where "
        "servers of the teacher find it)",
    )
    start_from: tuple[Path, ...] = _of((), "students to start from: their mean")
    start_weights: tuple[float, ...] = _of(
        (), "or their sum with these weights, 1 in all; a negative one leads away from that student"
    )
    recipe: Literal["stochastic", "published", "adapt", "cosine"] = _of("stochastic", "values of the options below")
    order: Literal["last", "first", "klpatch", "start"] = _of(
        "klpatch", "how sizes grow; start: as the first student of --start-from"
    )
    tokens: float = _of(2e6, "to train on; 0: only prune, order, store", ge=0)
    row_tokens: int = _of(256, "tokens of a packed row", ge=2)
    batch_rows: int = _of(8, "rows of a step and device", ge=1)
    accumulate: int = _of(1, "batches per optimizer step", ge=1)
    lr: float | None = _of(None, "peak learning rate [1e-3 with muon, else 3e-4]")
    schedule: str = _of("cosine", "transformers' lr_scheduler_type")
    decay_share: float = _of(0.25, "of warmup_stable_decay")
    weight_decay: float = _of(0.0, "of the optimizer")
    loss_on: Literal["response", "all"] = _of("response", "which tokens of conversations count")
    self_generate: int = _of(0, "let the teacher answer up to so many bare prompts", ge=0)
    answer_tokens: int = _of(256, "longest answer of --self-generate", ge=1)
    temperature: float = _of(1.0, "of --self-generate; 0 is greedy", ge=0)
    rank: int = _of(0, "train low-rank differences of this rank [whole layers]", ge=0)
    store_rank: int = _of(0, "train whole layers, store differences of this rank", ge=0)
    int8: bool = _of(False, "store low-rank factors as int8 with a scale per row")
    calibration_rows: int = _of(96, "rows for warm start and patch order", ge=1)
    ce: float | None = _of(None, "weight of the cross-entropy, not taken on said_by documents [recipe]")
    kl: float | None = _of(None, "weight of the KL to the teacher [recipe]")
    align: float | None = _of(None, "weight of the mean cosine distance [recipe]")
    unlikelihood: float | None = _of(None, "weight at loops in a size's own words (said_by) [recipe]")
    position_share: float | None = _of(None, "share of positions that get logits [recipe]")
    pure_share: float | None = _of(None, "share of rows that run the student alone; 1 turns patching off [recipe]")
    small_bias: float | None = _of(None, "1: the other rows' sizes spread evenly; more: towards small ones [recipe]")
    row_sizes: str | None = _of(None, "sizes of the other rows instead, each as often as named: 28L,28L,29L")
    order_noise: float | None = _of(None, "how much the order is shuffled at each step, in ranks [recipe]")
    warm_start: bool | None = _of(None, "closed-form fit before training [recipe]")
    train_ends: bool | None = _of(None, "train embedding, norm and head too [recipe]")
    train_single: bool | None = _of(None, "train one-layer blocks too [recipe]")
    optimizer: Literal["muon", "adamw"] | None = _of(None, "[recipe]")
    compile: bool = _of(False, "fuse the layers with torch.compile: minutes to start, faster steps")
    licence: str | None = _of(None, "of the student, for its model card and those of its exports (as Apache-2.0)")
    device: Literal["auto", "cpu", "cuda"] = _of("auto", "of each process")
    seed: int = _of(0, "of rows, sizes and initial values")
    save_steps: int = _of(200, "steps between checkpoints that --resume continues from", ge=1)
    resume: bool = _of(False, "continue from the newest checkpoint in --out")
    store: str | None = _of(None, "folder of the local model store")

    @model_validator(mode="after")
    def _check(self) -> DistillJob:
        if not self.data and not self.quick:
            raise ValueError("--data: name files to train on, or ask for --quick")
        if self.out is None and not self.quick:
            raise ValueError("--out: name the folder of the new pair")
        for path in (*self.data, *self.start_from):
            if not path.exists():
                raise ValueError(f"{'--data' if path in self.data else '--start-from'}: there is no {path}")
        if self.preset.train_ends and (self.rank or self.store_rank):
            raise ValueError("--rank and --store-rank share embedding and head with the teacher: add --no-train-ends")
        if self.row_sizes and self.small_bias is not None:
            raise ValueError("--row-sizes draws evenly from its list: leave --small-bias out, or --row-sizes")
        if self.order == "start" and not self.start_from:
            raise ValueError("--order start: there is no --start-from to take it from")
        if self.start_weights and not self.start_from:
            raise ValueError("--start-weights: there is no --start-from whose weights they would be")
        return self

    @property
    def folder(self) -> Path:
        """--out, where it must be given."""
        assert self.out is not None, "`_check` refuses to do without"
        return self.out

    @property
    def preset(self) -> Preset:
        """The recipe with every option that was given."""
        return with_overrides(PRESETS[self.recipe], self.model_dump() | {"row_sizes": row_sizes(self.row_sizes)})

    @property
    def options(self) -> dict[str, Any]:
        """What the manifest of the pair says of the run."""
        return {name: value for name, value in self.model_dump().items() if name not in _IN_THE_MANIFEST}
