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

    `batches` are token ids [B, T]. The states of the teacher and of the last path are kept, so a path costs only from
    where it leaves both: the default pair's search runs 1,548 layers instead of 2,002. The model's weights must stay
    as they are between calls.
    """
    # A path is one entry for the embedding and one per station: True where the state is computed as the teacher's is.
    teacher = (True,) * (len(model.elasticity.stations) + 1)
    last, cached, trails = teacher, [], []
    for ids in batches:
        states = model.teacher_states(ids)
        picked = torch.arange(stride - 1, ids.shape[1], stride, device=ids.device)
        cached.append((ids, states, picked, F.log_softmax(model.logits(states[-1][:, picked]).float(), -1)))
        trails.append(states)

    @torch.no_grad()
    def divergence(on_teacher: Sequence[bool]) -> float:
        nonlocal last
        own_embed = model.ends is not None and not on_teacher[0]
        own_head = model.ends is not None and not on_teacher[-1]
        sides = (side or str(i) not in model.student for i, side in enumerate(on_teacher))
        path = (not own_embed, *sides)
        if path == teacher and not own_head:
            return 0.0
        with_teacher, with_last = _shared(path, teacher), _shared(path, last)
        total = count = 0.0
        for number, (ids, states, picked, reference) in enumerate(cached):
            trail = trails[number][:with_last] if with_last > with_teacher else states[:with_teacher]
            trail = trail or [model.embed(ids, False)]
            rope = model.rope(trail[0])
            for index in range(len(trail) - 1, len(on_teacher)):
                trail.append(model.run_station(index, trail[-1], rope, on_teacher[index]))
            trails[number] = trail
            ours = F.log_softmax(model.logits(trail[-1][:, picked], not own_head).float(), -1)
            total += float((reference.exp() * (reference - ours)).sum())
            count += reference.shape[0] * reference.shape[1]
        last = path
        return total / count

    return divergence


def _shared(path: Sequence[bool], other: Sequence[bool]) -> int:
    """How many leading entries are equal."""
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=True)) if a != b), len(path))


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
    places: int | None = None,
) -> list[int]:
    """Stations with more than one teacher layer, in the order in which they become the teacher's.

    "up" starts at the student and adds the best block (KLPatch); "down" starts at the teacher and takes away the
    block that is missed least, which favours the large sizes. One-layer stations are on the teacher's side throughout.

    `places`: how many are searched, the first ones ("up") or the last ones ("down"); all others keep the order that
    they have among themselves in `elasticity`.
    """
    own = sorted((s.index for s in elasticity.stations if s.num_layers > 1), key=elasticity.thresholds.__getitem__)
    if direction == "down":
        own = own[::-1]
    left, chosen = list(own), list[int]()
    while left and (places is None or len(chosen) < places):

        def tried(candidate: int) -> float:
            moved = {*chosen, candidate}
            sides = [(s.index in moved) == (direction == "up") or s.num_layers == 1 for s in elasticity.stations]
            return divergence(sides)

        scores = {candidate: tried(candidate) for candidate in left} if len(left) > 1 else {left[0]: 0.0}
        best = min(scores, key=scores.__getitem__)
        chosen.append(best)
        left.remove(best)
        progress(f"{len(chosen)} blocks: station {best}, KL {scores[best]:.4f}")
    chosen += left
    return chosen if direction == "up" else chosen[::-1]
