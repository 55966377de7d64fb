"""Training of a quick student for as long as it may take: first its layers each for themselves, then all end to end.

Local first: every student layer learns from what goes into its block to what comes out of it, with the gradient cut
at every station, so that all of them learn at once from one pass of the teacher. Half of the rows are the teacher's own
stream; the other half are the student's, so that later layers learn to undo what earlier ones got wrong. Then rows of
all sizes run together, as in `boomerang distill` (docs/stochastic_patching.md), down to the teacher's logits.

Time is processor time: a process that is stopped while others need the machine has no less of it when it goes on.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model_store.distill.elastic import ElasticModel, LossWeights
from model_store.distill.low_rank import LowRankOptimizer, make_low_rank
from model_store.distill.recipe import PRESETS
from model_store.distill.trainer import MatrixOptimizer, SizeSampler
from model_store.distill.write import freeze_vectors, input_moments

_LOCAL_SHARE = 0.1  # of the time: a start, from which end to end gains several times as much a second
_RATE, _WARM_UP = 1e-3, 0.02  # peak learning rate, and the share of the time until it is reached
_ROWS = 8  # of a step
_SAVE_SECONDS = 45.0  # between two checkpoints
_WEIGHTS = LossWeights(kl=1.0, align=2.0, position_share=0.4)
# Every size as often, but for the smallest, in which all student layers meet.
_SIZES = dataclasses.replace(PRESETS["stochastic"], pure_share=0.3, small_bias=1.0, order_noise=0.0)


class Clock:
    """Seconds that this process has kept the machine busy: processor time by number of threads."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> float:
        return time.process_time() / torch.get_num_threads()

    @property
    def spent(self) -> float:
        return self._now() - self._start


def train(
    model: ElasticModel, rows: torch.Tensor, rank: int, seconds: float, file: Path,
    report: Callable[[str, float], None], seed: int = 0,
) -> int:  # fmt: skip
    """Train the student's layers in place for `seconds`, as differences of `rank` to the teacher's (at equal tokens
    nearer to it than whole ones: docs/log/2026-11-28-training-recipes.md); returns the number of steps.

    `rows` are token ids [R, T]. Goes on from the checkpoint in `file` if there is one, and leaves one there. `report`
    is told, at every checkpoint, in which phase it is and which share of the time is over.
    """
    optimizer = _optimizer(model, rows, rank)
    step, before = 0, 0.0
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        model.student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        step, before = saved["step"], saved["seconds"]
    rates = [(group, group["initial_lr"]) for group in optimizer.param_groups]
    sampler, clock, kept = SizeSampler(model.elasticity, _SIZES, seed), Clock(), before
    mask = torch.ones_like(rows[:_ROWS], dtype=torch.bool)
    while (spent := before + clock.spent) < seconds:
        share = spent / seconds
        for group, rate in rates:
            group["lr"] = rate * min(1.0, (share + 1e-3) / _WARM_UP, (1 - share) / (1 - _WARM_UP))
        ids = _batch(rows, step, seed)
        if share < _LOCAL_SHARE:
            loss = local_loss(model, ids)
        else:
            loss = model(ids, mask[: len(ids)], *sampler(step, len(ids)), _WEIGHTS)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if spent - kept >= _SAVE_SECONDS:
            kept = spent
            _save(file, model, optimizer, step, before + clock.spent)
            report("layer by layer" if share < _LOCAL_SHARE else "end to end", share)
    _save(file, model, optimizer, step, seconds)
    return step


def _optimizer(model: ElasticModel, rows: torch.Tensor, rank: int) -> torch.optim.Optimizer:
    freeze_vectors(model)
    paths = [model.elasticity.path(size).teacher_stations for size in model.elasticity.sizes[:-1]]
    factors = make_low_rank(model, rank, input_moments(model, rows[:16].split(8), paths))
    products = {id(factor.weight) for factor in factors}
    others = [p for p in model.student.parameters() if p.requires_grad and id(p) not in products]
    optimizer: LowRankOptimizer | MatrixOptimizer
    if factors:
        optimizer = LowRankOptimizer(factors, others, _RATE, 0.0)
    else:  # a family whose layers have no `nn.Linear`
        optimizer = MatrixOptimizer(others, _RATE, 0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _batch(rows: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Rows of one step: every row once before any comes again. A pure function of its arguments."""
    per_epoch = max(1, len(rows) // _ROWS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 100_003 + step // per_epoch))
    first = step % per_epoch * _ROWS
    return rows[order[first : first + _ROWS]]


def local_loss(model: ElasticModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every student layer's output relative to its target, a token each; its own inputs given.

    The first half of the rows has the teacher's states for inputs, the other half those of the student alone.
    """
    states = model.teacher_states(ids)
    rope, half = model.rope(states[0]), len(ids) // 2
    own = states[0][half:]
    losses = []
    for station in model.elasticity.stations:
        target = states[station.index + 1]
        if str(station.index) not in model.student:
            with torch.no_grad():
                own = model.run_station(station.index, own, rope, False)
            continue
        inputs = torch.cat((states[station.index][:half], own.to(target.dtype)))
        output = model.run_station(station.index, inputs, rope, False)
        wanted = target.float()
        losses.append(((output.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)).mean())
        own = output[half:].detach()
    return torch.stack(losses).mean()


def _save(file: Path, model: ElasticModel, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    content = {
        "student": model.student.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
    }  # fmt: skip
    part = file.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, file)
