"""KL and cross-entropy against the teacher over a large vocabulary, without the logits of a whole batch in memory.

Beside them the unlikelihood loss -log(1 - p(token)) of Welleck et al. (arXiv 1908.04319) for tokens not to be said.

Positions go through the head a few at a time; each chunk's gradient with respect to the hidden states is taken while
its logits are still in the cache. At 49,152 entries the plain formula writes some ten float32 copies of the logits.

N = positions, E = hidden, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MiB in float32; smaller ones repack the head too often


def _of_logits(
    logits: torch.Tensor, reference: torch.Tensor | None, target: torch.Tensor, counts: torch.Tensor,
    kl_weight: float, ce_weight: torch.Tensor | None, unlikely: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """KL, cross-entropy and unlikelihood [n] of logits [n, V], and the weighted loss's gradient, in their dtype."""
    ours = F.log_softmax(logits, -1, dtype=torch.float32)
    ce = -ours.gather(-1, target)[:, 0]
    likely = ours.exp()
    slope = likely * kl_weight
    kl = torch.zeros_like(ce)
    if reference is not None:
        theirs = F.log_softmax(reference, -1, dtype=torch.float32)
        wanted = theirs.exp()
        kl = (wanted * (theirs - ours)).sum(-1)
        slope = slope - wanted * kl_weight
    slope = slope * counts
    if ce_weight is not None:
        slope = (slope + likely * ce_weight).scatter_add(-1, target, -ce_weight)
    against = torch.zeros_like(ce)
    if unlikely is not None:
        # d/dz of -log(1 - p) is p / (1 - p) times dp/dz / p; both factors stay bounded as p nears 1.
        rest = (1 - likely.gather(-1, target)).clamp_min(1e-5)
        against = -rest.log()[:, 0]
        odds = (1 - rest) / rest * unlikely
        slope = (slope - likely * odds).scatter_add(-1, target, odds)
    return kl, ce, against, slope.to(logits.dtype)


_chunk = _of_logits


def compile_head_loss(on: bool) -> None:
    """Fuse the passes over the logits of a chunk with torch.compile: about half of their time on a CPU."""
    global _chunk
    _chunk = torch.compile(_of_logits, dynamic=True) if on else _of_logits


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None,
        reference_weight: torch.Tensor, counts: torch.Tensor, kl_weight: float, ce_weight: torch.Tensor | None,
        unlikely: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        size = max(1, _CHUNK_ELEMENTS // len(weight))
        compute = reference_weight.dtype
        grad = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(compute)
        kl = torch.zeros(len(hidden), device=hidden.device)
        ce = torch.zeros(len(hidden), device=hidden.device)
        against = torch.zeros(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            x = hidden[part].to(compute)
            theirs = reference[part].to(compute) @ reference_weight.T if reference is not None else None
            kl[part], ce[part], against[part], slope = _chunk(
                x @ head.T, theirs, targets[part, None], counts[part, None], kl_weight,
                None if ce_weight is None else ce_weight[part, None],
                None if unlikely is None else unlikely[part, None],
            )  # fmt: skip
            grad[part] = (slope @ head).to(grad.dtype)
            if grad_weight is not None:
                grad_weight += (slope.T @ x).float()
        ctx.save_for_backward(grad, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(kl, ce, against)
        loss = (kl_weight * kl * counts).sum()
        if ce_weight is not None:
            loss = loss + (ce * ce_weight).sum()
        if unlikely is not None:
            loss = loss + (against * unlikely).sum()
        return loss, kl, ce, against

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, *unused: Any) -> tuple:
        grad, grad_weight = ctx.saved_tensors
        weight = (grad_weight * slope).to(ctx.weight_dtype) if grad_weight is not None else None
        return (grad * slope, weight, *[None] * 7)


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor,
    reference_weight: torch.Tensor, counts: torch.Tensor, kl_weight: float, ce_weight: float,
    unlikely: torch.Tensor | None = None, truths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weighted loss (a scalar with gradient) and, without gradient, per position [N] in nats: KL, CE, unlikelihood.

    `hidden` and `reference` [N, E] are the normed last states of student and teacher, `weight` and `reference_weight`
    [V, E] their heads, `targets` [N] the next tokens, `counts` [N] each position's share in the loss, `truths` [N] its
    share in the cross-entropy if that is another, `unlikely` [N] the weight with which its target is made unlikely.
    Products run in the teacher's dtype.
    """
    if not kl_weight:
        reference = None
    ce_shares = float(ce_weight) * (counts if truths is None else truths) if ce_weight else None
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(
            hidden, weight, targets, reference, reference_weight, counts, float(kl_weight), ce_shares, unlikely
        )
