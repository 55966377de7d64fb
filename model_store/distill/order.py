"""Patch orders. KLPatch: the greedy nested order of "Understanding Layer Patching" (arXiv 2607.08170; App. J of ADAPT).

At each size every block that is still the student's is tried on the teacher's side alone; the one that leaves the
smallest KL divergence to the teacher stays. The order is nested, as batches of mixed sizes need.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel


@torch.no_grad()
def kl_of_paths(
    model: ElasticModel, batches: Sequence[torch.Tensor], stride: int = 4
) -> Callable[[Sequence[bool]], float]:
    """A function that gives the mean KL(teacher || path), in nats per token, over every `stride`-th position.

    `batches` are token ids [B, T]. The teacher's states are kept, so a path costs only from its first student layer.
    """
    cached = []
    for ids in batches:
        states = model.teacher_states(ids)
        picked = torch.arange(stride - 1, ids.shape[1], stride)
        cached.append((ids, states, picked, F.log_softmax(model.logits(states[-1][:, picked]).float(), -1)))

    @torch.no_grad()
    def divergence(on_teacher: Sequence[bool]) -> float:
        own_embed = model.ends is not None and not on_teacher[0]
        own_head = model.ends is not None and not on_teacher[-1]
        first = next((i for i, side in enumerate(on_teacher) if not side and str(i) in model.student), None)
        if own_embed:
            first = 0
        elif first is None and not own_head:
            return 0.0
        total = count = 0.0
        for ids, states, picked, reference in cached:
            hidden = model.embed(ids, False) if own_embed else states[-1 if first is None else first]
            rope = model.rope(hidden)
            for index in range(len(on_teacher) if first is None else first, len(on_teacher)):
                hidden = model.run_station(index, hidden, rope, on_teacher[index])
            ours = F.log_softmax(model.logits(hidden[:, picked], not own_head).float(), -1)
            total += float((reference.exp() * (reference - ours)).sum())
            count += reference.shape[0] * reference.shape[1]
        return total / count

    return divergence


@contextlib.contextmanager
def in_dtype(model: ElasticModel, dtype: torch.dtype) -> Iterator[None]:
    """The student in evaluation mode and `dtype` for as long as the context lasts: many paths, no casts in between."""
    trained = model.student
    try:
        model.student = copy.deepcopy(trained).to(dtype)
        model.eval()
        yield
    finally:
        model.student = trained
        model.train()


def greedy_order(
    elasticity: Elasticity,
    divergence: Callable[[Sequence[bool]], float],
    direction: str = "up",
    progress: Callable[[str], None] = lambda line: None,
) -> list[int]:
    """Stations with more than one teacher layer, in the order in which they become the teacher's.

    "up" starts at the student and adds the best block (KLPatch); "down" starts at the teacher and takes away the
    block that is missed least, which favours the large sizes. One-layer stations are on the teacher's side throughout.
    """
    left = [s.index for s in elasticity.stations if s.num_layers > 1]
    chosen: list[int] = []
    while left:

        def tried(candidate: int) -> float:
            moved = {*chosen, candidate}
            sides = [(s.index in moved) == (direction == "up") or s.num_layers == 1 for s in elasticity.stations]
            return divergence(sides)

        scores = {candidate: tried(candidate) for candidate in left} if len(left) > 1 else {left[0]: 0.0}
        best = min(scores, key=scores.__getitem__)
        chosen.append(best)
        left.remove(best)
        progress(f"{len(chosen)} blocks: station {best}, KL {scores[best]:.4f}")
    return chosen if direction == "up" else chosen[::-1]
