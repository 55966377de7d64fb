"""Between the QKV product and attention, in one pass: norm of q and k, rotary embedding, K and V into their pages.

T = tokens, H = query heads, K = KV heads, D = head dim, P = page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.runtime import INTERPRETED


@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr", "count_ptr"]
)
def rotary_kernel(
    qkv_ptr, q_ptr, k_pages_ptr, v_pages_ptr, table_ptr, positions_ptr, slots_ptr, count_ptr, cos_ptr, sin_ptr,
    q_norm_ptr, k_norm_ptr, num_tokens, max_blocks, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)  # of the fused row: H of q, then K of k, then K of v
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    # Rows beyond the lane's count are padding: they must leave no trace in the pages.
    is_row = rows < tl.minimum(tl.load(count_ptr), num_tokens)
    in_head = channels < D
    mask = is_row[:, None] & in_head[None, :]
    source = qkv_ptr + (rows[:, None].to(tl.int64) * (H + 2 * K) + head) * D
    positions = tl.load(positions_ptr + rows, mask=is_row, other=0)
    x = tl.load(source + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    if head < H + K:
        half: tl.constexpr = ROTARY // 2
        # Channel c < ROTARY is turned against the one half the rotary width away.
        partners = tl.where(channels < half, channels + half, tl.where(channels < ROTARY, channels - half, channels))
        other = tl.load(source + partners[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
            is_q = head < H
            own = tl.load(q_norm_ptr + channels, mask=in_head & is_q, other=0.0).to(tl.float32)
            own += tl.load(k_norm_ptr + channels, mask=in_head & (head >= H), other=0.0).to(tl.float32)
            theirs = tl.load(q_norm_ptr + partners, mask=in_head & is_q, other=0.0).to(tl.float32)
            theirs += tl.load(k_norm_ptr + partners, mask=in_head & (head >= H), other=0.0).to(tl.float32)
            x *= scale * own[None, :]
            other *= scale * theirs[None, :]
        if ROTARY > 0:
            is_turned = channels < ROTARY
            angle = positions[:, None] * half + tl.where(channels < half, channels, channels - half)[None, :]
            turn = is_row[:, None] & is_turned[None, :]
            cos = tl.load(cos_ptr + angle, mask=turn, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=turn, other=0.0)
            x = x * cos + tl.where(channels < half, -other, other) * sin
    if head < H:
        target = q_ptr + (rows[:, None].to(tl.int64) * H + head) * D + channels[None, :]
        tl.store(target, x.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
        pages = tl.load(table_ptr + slots.to(tl.int64) * max_blocks + positions // PAGE, mask=is_row, other=0)
        kv_head = (head - H) % K
        offsets = ((pages.to(tl.int64) * K + kv_head) * PAGE + positions % PAGE) * D
        offsets = offsets[:, None] + channels[None, :]
        if head < H + K:
            tl.store(k_pages_ptr + offsets, x.to(k_pages_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(v_pages_ptr + offsets, x.to(v_pages_ptr.dtype.element_ty), mask=mask)


def rotate_and_write(
    qkv: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
    slots: torch.Tensor, count: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rotary_dim: int,
    num_heads: int, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """qkv [T, (H + 2K) D] -> rotated q [T, H, D]; writes k and v of rows below `count` into their pages.

    pages [n, K, P, D]; table int32 [max_num_seqs, max_blocks] of this layer; positions, slots int32 [T]; count
    int32 [1]; cos and sin float32 [positions, rotary_dim / 2].
    """
    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    num_tokens = qkv.shape[0]
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return q
    rows = 16 if INTERPRETED else (1 if num_tokens <= 256 else 8)
    width = triton.next_power_of_2(head_dim)
    rotary_kernel[(triton.cdiv(num_tokens, rows), num_heads + 2 * num_kv_heads)](
        qkv, q, k_pages, v_pages, table, positions, slots, count, cos, sin,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, num_tokens, table.shape[1], eps,
        H=num_heads, K=num_kv_heads, D=head_dim, ROTARY=rotary_dim, PAGE=page_size, HAS_NORM=q_norm is not None,
        ROWS=rows, WIDTH=width, num_warps=1 if rows * width <= 256 else 4,
    )  # fmt: skip
    return q
