"""The training loop: transformers' Trainer, with rows of one batch running different sizes ("stochastic patching")."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from model_store.assembly import Elasticity
from model_store.distill.elastic import LossWeights
from model_store.distill.low_rank import Factors, LowRankOptimizer
from model_store.distill.processes import has_bf16
from model_store.distill.recipe import Preset


class SizeSampler:
    """Which size each row of a step runs, and in which nested order; a pure function of seed and step.

    `pure_share` of the rows run the student alone, the others sizes spread over the rest (stratified, so that every
    step sees small and large ones; `small_bias` > 1 draws more small ones), or over `row_sizes` if there are any, where
    one that stands there twice is drawn twice as often. `order_noise` > 0 shuffles the order a little at each step, so
    that no block is only ever seen in one company: rank + uniform(0, order_noise) decides. 0 trains the served order
    exactly.
    """

    def __init__(self, elasticity: Elasticity, preset: Preset, seed: int) -> None:
        self.elasticity, self.seed = elasticity, seed
        self.pure_share, self.order_noise = preset.pure_share, preset.order_noise
        self.bias = 1.0 if preset.row_sizes else preset.small_bias
        self.between = sorted(preset.row_sizes) or elasticity.sizes[1:-1] or elasticity.sizes[:1]

    def __call__(self, step: int, rows: int) -> tuple[list[int], list[int]]:
        """(ascending size per row, thresholds of the step's order)."""
        rng = random.Random(self.seed * 1_000_003 + step)
        own, sizes = self.elasticity, self.elasticity.sizes
        pure = min(rows, int(self.pure_share * rows + rng.random()))
        others = rows - pure
        count = len(self.between)
        picks = [self.between[int(((j + rng.random()) / others) ** self.bias * count)] for j in range(others)]
        thresholds = list(own.thresholds)
        if self.order_noise:
            blocks = [s.index for s in own.stations if s.num_layers > 1]
            blocks.sort(key=lambda i: own.thresholds[i])
            keys = {block: rank + rng.random() * self.order_noise for rank, block in enumerate(blocks)}
            order = sorted(blocks, key=keys.__getitem__)
            starts = [s.start for s in own.stations]
            shuffled = Elasticity.from_order(own.num_teacher_layers, starts, order)
            thresholds = list(shuffled.thresholds)
            known = shuffled.sizes[1:-1] or shuffled.sizes[:1]
            picks = [min(known, key=lambda size, pick=pick: abs(size - pick)) for pick in picks]
        return [sizes[0]] * pure + sorted(picks), thresholds


def _orthogonal(
    grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    """torch's Newton-Schulz iteration of Muon in float32 instead of bfloat16."""
    a, b, c = ns_coefficients
    is_tall = grad.shape[0] > grad.shape[1]
    x = grad.T if is_tall else grad
    x = x.float() / x.norm().clamp_min(eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@contextlib.contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """torch.optim.Muon takes its products in bfloat16, and has no option for another dtype."""
    module, name = torch.optim._muon, "_zeropower_via_newtonschulz"
    before = getattr(module, name)
    try:
        setattr(module, name, before if dtype == torch.bfloat16 else _orthogonal)
        yield
    finally:
        setattr(module, name, before)


class MatrixOptimizer(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, as one optimizer.

    Muon (torch.optim.Muon) orthogonalises each update; with its step scaled to AdamW's typical size one learning rate
    serves both, except that vectors (norms) take a tenth: in small models a few of their entries carry massive
    activations and break at the matrices' rate. Products of matrices are float32 where the processor has no bfloat16:
    there bfloat16 takes some ten times as long.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        matrices = [p for p in parameters if p.ndim == 2]
        vectors = [p for p in parameters if p.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"
                )
            )
        if vectors:
            self.parts.append(torch.optim.AdamW(vectors, lr=lr / 10, betas=(0.9, 0.95), weight_decay=0.0))
        super().__init__(list(parameters), {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with _products_in(torch.bfloat16 if has_bf16(on_cpu) else torch.float32):
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class DistillTrainer(Trainer):
    """Trainer whose loss is the elastic model's; everything else is the library's."""

    def __init__(
        self, *args: Any, sampler: SizeSampler, weights: LossWeights, matrix_optimizer: bool,
        factors: list[Factors] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """`factors` make it train low-rank differences; else `matrix_optimizer` says whether matrices take Muon."""
        self.size_sampler, self.loss_weights, self.matrix_optimizer = sampler, weights, matrix_optimizer
        self.factors = factors
        self._parts: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        ids, mask = inputs["input_ids"], inputs["loss_mask"]
        # The sizes of all processes' rows are drawn together, so that a step is the same however many share it; every
        # so-manieth is this one's, and each has small and large ones.
        count, own = self.args.world_size, self.args.process_index
        sizes, thresholds = self.size_sampler(self.state.global_step, len(ids) * count)
        sizes = sizes[own::count]
        out = model(ids, mask, sizes, thresholds, self.loss_weights, inputs["loops"], inputs["said"])
        names = ("kl", "ce", "align", "pure", *(["unlikely"] if self.loss_weights.unlikelihood else []))
        self._parts = {name: float(out[name]) for name in names}
        return (out["loss"], out) if return_outputs else out["loss"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.optimizer is None and self.factors is not None:
            whole = {id(factors.weight) for factors in self.factors}
            others = [p for p in trained if id(p) not in whole]
            self.optimizer = LowRankOptimizer(self.factors, others, self.args.learning_rate, self.args.weight_decay)
        elif self.optimizer is None and self.matrix_optimizer:
            self.optimizer = MatrixOptimizer(trained, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer or super().create_optimizer(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: round(value, 5) for name, value in self._parts.items()}
            rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["tokens"] = self.state.global_step * rows * self.train_dataset[0]["input_ids"].numel()
        super().log(logs, *args, **kwargs)


class CurveFile(TrainerCallback):
    """Appends every logged step to a JSON-lines file: the training curve that is shipped with the pair."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            with self.path.open("a") as lines:
                lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")
