"""A pair as a differentiable torch module: any mixture of sizes runs in one forward pass, a row of the batch per size.

The decoder layers are transformers' own modules, called one at a time, so every family that the server serves trains
here with the library's code. B = rows, T = tokens per row, E = hidden, M = student layers, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from model_store.assembly import Elasticity
from model_store.distill.head_loss import head_loss
from model_store.families import FAMILIES

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin
Rope = Angles | dict[str, Angles]  # of all layers, or by their type


@dataclass(slots=True)
class Ends:
    """Modules around the layers; the student either has its own or refers to the teacher's."""

    embed: Any
    norm: Any
    head: Any
    positions: Any = None  # learned positions, which go with the embedding


@dataclass(slots=True)
class Body:
    """The parts of a transformers causal language model, whatever its family calls them."""

    layers: nn.ModuleList
    ends: Ends
    rotary: nn.Module | None


def body_of(model: PreTrainedModel) -> Body:
    """The parts of `model`; ValueError for an architecture whose parts have other names."""
    base = model.base_model

    def first(*names: str) -> Any:
        for name in names:
            if (part := getattr(base, name, None)) is not None:
                return part
        raise ValueError(f"{type(model).__name__} has none of {', '.join(names)}: this family cannot be distilled")

    norm = first("norm", "final_layer_norm", "ln_f")
    ends = Ends(model.get_input_embeddings(), norm, model.get_output_embeddings(), getattr(base, "wpe", None))
    return Body(first("layers", "h"), ends, getattr(base, "rotary_emb", None))


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of cross-entropy, KL(teacher || student) and mean cosine distance; share of positions with logits.

    `unlikelihood`, if not 0, takes the place of the first two at tokens in a loop of a size's own words.
    """

    ce: float = 0.0
    kl: float = 1.0
    align: float = 4.0
    position_share: float = 0.5
    unlikelihood: float = 0.0


class ElasticModel(nn.Module):
    """Teacher (frozen) and student layers. Only the student's parameters are registered as parameters."""

    teacher: PreTrainedModel
    body: Body
    elasticity: Elasticity
    student: nn.ModuleDict
    ends: nn.ModuleDict | None
    _tied_head: nn.Module | None

    def __init__(
        self,
        teacher: PreTrainedModel,
        elasticity: Elasticity,
        student: dict[int, nn.Module] | None = None,
        own_ends: bool = False,
        train_single: bool = False,
    ) -> None:
        """Without `student`, its layers are copies (float32) of the teacher's kept layers.

        A station whose block is one layer runs the teacher's own layer, unless `train_single`. With `own_ends` the
        student has an embedding, final norm and head of its own (a tied head stays tied).
        """
        super().__init__()
        body = body_of(teacher)
        teacher.requires_grad_(False).eval()
        # Not a submodule: it is neither trained nor saved with the student.
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "body", body)
        self._call_layer = _call_layer
        self.elasticity = elasticity
        self.config = teacher.config
        self.student = nn.ModuleDict()
        for station in elasticity.stations:
            if student is not None:
                layer = student.get(station.index)
            elif station.num_layers > 1 or train_single:
                layer = copy.deepcopy(body.layers[station.start]).float().requires_grad_(True)
            else:
                layer = None
            if layer is not None:
                self.student[str(station.index)] = layer.train()
        self.ends = None
        object.__setattr__(self, "_tied_head", None)
        if own_ends:
            self.set_ends(copy.deepcopy(body.ends)).float().requires_grad_(True)  # at once: what is tied stays so

    def set_ends(self, ends: Ends) -> nn.ModuleDict:
        """Give the student ends of its own; returns them. A tied head is registered once, as checkpoints hold it."""
        parts = {"embed": ends.embed, "norm": ends.norm}
        if ends.head.weight is ends.embed.weight:
            object.__setattr__(self, "_tied_head", ends.head)
        else:
            parts["head"] = ends.head
        if ends.positions is not None:
            parts["positions"] = ends.positions
        self.ends = nn.ModuleDict(parts)
        return self.ends

    # --- pieces

    @property
    def device(self) -> torch.device:
        """Where the teacher is, and token ids must be."""
        return self.body.ends.embed.weight.device

    def side(self, on_teacher: bool) -> Ends:
        if on_teacher or self.ends is None:
            return self.body.ends
        own: dict[str, nn.Module] = dict(self.ends.items())
        head = own["head"] if self._tied_head is None else self._tied_head
        return Ends(own["embed"], own["norm"], head, own.get("positions"))

    def embed(self, ids: torch.Tensor, on_teacher: bool = True) -> torch.Tensor:
        ends = self.side(on_teacher)
        hidden = ends.embed(ids)
        if (scale := getattr(self.config, "embedding_multiplier", 1.0)) != 1.0:
            hidden = hidden * scale
        return hidden if ends.positions is None else hidden + ends.positions.weight[: ids.shape[1]]

    def rope(self, hidden: torch.Tensor) -> Rope | None:
        """Cosines and sines for positions 0..T-1, or None for a family without rotary positions."""
        if self.body.rotary is None:
            return None
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if FAMILIES[self.config.model_type].local_rope:
            return {kind: self.body.rotary(hidden, positions, kind) for kind in {*self.config.layer_types}}
        return self.body.rotary(hidden, positions)

    def normed(self, ends: Ends, hidden: torch.Tensor) -> torch.Tensor:
        """What a head takes; the scale of logits is in it."""
        normed = ends.norm(_as_taken_by(ends.norm, hidden))
        scale = getattr(self.config, "logits_scaling", 1.0)
        return normed if scale == 1.0 else normed / scale

    def compile_layers(self, on: bool = True) -> None:
        """Run decoder layers through torch.compile: one graph for all layers and batch sizes, norms and gates fused."""
        # The number of rows changes from station to station: without `dynamic` each would be a graph of its own.
        self._call_layer = torch.compile(_call_layer, dynamic=True) if on else _call_layer

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        # The student is kept in float32 beside a bfloat16 teacher. A layer of the student takes any hidden states, with
        # autocast, in training or not.
        hidden = _as_taken_by(layer, hidden)
        differs = next(layer.parameters()).dtype != hidden.dtype
        with torch.autocast(hidden.device.type, torch.bfloat16) if differs else contextlib.nullcontext():
            return self._call_layer(layer, hidden, rope, _window_mask(layer, hidden))

    def run_station(self, index: int, hidden: torch.Tensor, rope: Rope | None, on_teacher: bool) -> torch.Tensor:
        station = self.elasticity.stations[index]
        if not on_teacher and str(index) in self.student:
            return self.run_layer(self.student[str(index)], hidden, rope)
        for layer in self.body.layers[station.start : station.stop]:
            hidden = self.run_layer(layer, hidden, rope)
        return hidden

    def logits(
        self, hidden: torch.Tensor, on_teacher: bool = True, head_on_teacher: bool | None = None
    ) -> torch.Tensor:
        """With the norm of one side and the head of the same, or of the side that `head_on_teacher` says."""
        head = self.side(on_teacher if head_on_teacher is None else head_on_teacher).head
        normed = self.normed(self.side(on_teacher), hidden)
        return head(normed.to(head.weight.dtype) if head.weight.dtype == torch.bfloat16 else normed)

    @torch.no_grad()
    def size_logits(self, ids: torch.Tensor, size: int) -> torch.Tensor:
        """Logits [B, T, V] of one size, as its path says."""
        path = self.elasticity.path(size)
        hidden = self.embed(ids, path.embed_from == "teacher")
        rope = self.rope(hidden)
        for index, side in enumerate(path.teacher_stations):
            hidden = self.run_station(index, hidden, rope, side)
        return self.logits(hidden, path.norm_from == "teacher", path.head_from == "teacher")

    # --- whole passes

    @torch.no_grad()
    def teacher_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The teacher's hidden state before every station and after the last: M + 1 tensors [B, T, E]."""
        states = [self.embed(ids)]
        rope = self.rope(states[0])
        for index in range(len(self.elasticity.stations)):
            states.append(self.run_station(index, states[-1], rope, True))
        return states

    def hidden(self, ids: torch.Tensor, on_teacher: Sequence[bool]) -> torch.Tensor:
        """Last hidden state [B, T, E] of the path that runs the teacher's block where `on_teacher` says so."""
        hidden = self.embed(ids, on_teacher[0])
        rope = self.rope(hidden)
        for index, side in enumerate(on_teacher):
            hidden = self.run_station(index, hidden, rope, side)
        return hidden

    def mixed(
        self, ids: torch.Tensor, sizes: Sequence[int], thresholds: Sequence[int],
        states: list[torch.Tensor],
    ) -> tuple[torch.Tensor, int, torch.Tensor]:  # fmt: skip
        """Run row b at `sizes[b]` (ascending) of the nested order `thresholds`.

        Returns the last hidden state [C, T, E] of the first C rows (the others are the teacher itself), how many of
        them end with the student's norm and head, and the mean alignment loss.

        Rows that have met no student layer yet equal the teacher's `states` and cost nothing. Because the order is
        nested and the rows are sorted, at every station the rows on the student's side are a prefix of the batch, the
        rows still equal to the teacher a suffix. The alignment is the mean cosine distance to the teacher's state
        after every station, each weighted by its share of rows that can differ.
        """
        assert list(sizes) == sorted(sizes), "rows must be sorted by size"
        rows, hidden, done = len(sizes), None, 0
        losses = []
        rope = self.rope(states[0])
        for index in range(len(thresholds)):
            has_own = str(index) in self.student or (index == 0 and self.ends is not None)
            on_student = sum(size < thresholds[index] for size in sizes) if has_own else 0
            differ = max(done, on_student)
            if differ == 0:
                continue
            fresh = states[index][done:differ]
            if index == 0 and self.ends is not None:
                fresh = self.embed(ids[:differ], False)
                losses.append(_cosine_distance(fresh, states[0][:differ]) * differ / rows)
            x = fresh if hidden is None else torch.cat([hidden, fresh.to(hidden.dtype)]) if differ > done else hidden
            parts = [self.run_station(index, x[:on_student], rope, False)] if on_student else []
            if on_student < differ:
                parts.append(self.run_station(index, x[on_student:], rope, True))
            hidden = torch.cat([part.to(parts[0].dtype) for part in parts]) if len(parts) > 1 else parts[0]
            done = differ
            losses.append(_cosine_distance(hidden, states[index + 1][:done]) * done / rows)
        if hidden is None:
            raise ValueError("every row is the teacher itself: nothing to train")
        split = sum(size < thresholds[-1] for size in sizes) if self.ends is not None else 0
        return hidden, min(split, done), torch.stack(losses).mean()

    def forward(
        self, input_ids: torch.Tensor, loss_mask: torch.Tensor, sizes: Sequence[int], thresholds: Sequence[int],
        weights: LossWeights, loops: torch.Tensor | None = None, said: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Losses of one batch [B, T], row b at `sizes[b]` (ascending). `loss_mask` [B, T]: tokens that count.

        `loops` [B, T] marks tokens with which a size repeats itself: with `unlikelihood` no row learns to say them. The
        teacher is no model there: it carries on a loop that it reads. `said` [B, T] marks all own words of a size: no
        cross-entropy is taken on them.

        Returns the weighted `loss` and its unweighted parts; the KL also apart for rows of the smallest size (`pure`).
        """
        states = self.teacher_states(input_ids)
        count = input_ids.shape[1] - 1
        picked = torch.randperm(count, device=input_ids.device)[: max(1, round(count * weights.position_share))]
        picked = picked.sort().values
        hidden, split, alignment = self.mixed(input_ids, sizes, thresholds, states)
        rows = len(hidden)
        counts = loss_mask[:rows, 1:][:, picked].float()
        unlikely = None
        if weights.unlikelihood and loops is not None:
            unlikely = counts * loops[:rows, 1:][:, picked]
            counts = counts - unlikely
        truths = counts if said is None else counts * ~said[:rows, 1:][:, picked]
        total = loss_mask[:, 1:][:, picked].float().sum().clamp_min(1.0)
        loss = weights.align * alignment
        kl = ce = pure = against = loss.new_zeros(())
        if weights.kl or weights.ce or unlikely is not None:
            targets, teacher = input_ids[:rows, 1:][:, picked], self.side(on_teacher=True)
            reference = self.normed(teacher, states[-1][:rows][:, picked])
            per_token = []
            for part, on_teacher in ((slice(0, split), False), (slice(split, rows), True)):
                if part.start == part.stop:
                    continue
                ends = self.side(on_teacher)
                own_rows = self.normed(ends, hidden[part][:, picked])
                own, *parts = head_loss(
                    own_rows.flatten(0, 1), ends.head.weight, targets[part].flatten(),
                    reference[part].flatten(0, 1), teacher.head.weight, (counts[part] / total).flatten(),
                    weights.kl, weights.ce,
                    None if unlikely is None else (unlikely[part] * weights.unlikelihood / total).flatten(),
                    (truths[part] / total).flatten(),
                )  # fmt: skip
                loss = loss + own
                per_token.append(parts)
            kl_of, ce_of, own_of = (torch.cat(parts).view_as(counts) for parts in zip(*per_token, strict=True))
            kl_of, ce_of = kl_of * counts, ce_of * truths
            kl, ce = kl_of.sum() / total, ce_of.sum() / total
            if unlikely is not None:
                against = (own_of * unlikely).sum() / unlikely.sum().clamp_min(1.0)
            alone = sum(size == self.elasticity.sizes[0] for size in sizes)
            if alone:
                pure = kl_of[:alone].sum() / counts[:alone].sum().clamp_min(1.0)
        shown = {"kl": kl, "ce": ce, "align": alignment, "unlikely": against}
        return {"loss": loss, "pure": pure, **{name: value.detach() for name, value in shown.items()}}


def _call_layer(
    layer: nn.Module, hidden: torch.Tensor, rope: Rope | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    if isinstance(rope, dict):  # of a family whose layers have angles by their type
        rope = rope[str(layer.get_submodule("self_attn").layer_type)]
    more: dict[str, Any] = {} if rope is None else {"position_embeddings": rope}
    out = layer(hidden, **more) if mask is None else layer(hidden, attention_mask=mask, **more)
    return out[0] if isinstance(out, tuple) else out


def window_of(layer: nn.Module) -> int | None:
    """The sliding window of a layer, by its own config; None if it sees everything before it."""
    attention = getattr(layer, "self_attn", None)
    if attention is None or FAMILIES[attention.config.model_type].windows == "none":
        return None
    return attention.sliding_window if hasattr(attention, "sliding_window") else attention.config.sliding_window


def _window_mask(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """What to add to scores [1, 1, T, T]; None where causality alone says it all."""
    window, length = window_of(layer), hidden.shape[1]
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    dtype = torch.bfloat16 if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    return torch.zeros(1, 1, length, length, dtype=dtype, device=hidden.device).masked_fill(
        ~(seen & ~seen.tril(-window)), torch.finfo(dtype).min
    )


def _as_taken_by(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states of the student enter a bfloat16 module as the teacher's own do: layer norms take no others."""
    dtype = next(module.parameters()).dtype
    return hidden.to(dtype) if dtype == torch.bfloat16 else hidden


def _cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).mean()
