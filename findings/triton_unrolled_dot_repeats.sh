#!/usr/bin/env bash
# Triton 3.7.1: loop_unroll_factor=2 on the loop of a product in 32 x 32 tiles makes it multiply everything twice.
#
# A tile of 32 x 32 with four warps: one tl.dot in the loop gets its warps as 2 x 2, and each warp multiplies a quarter.
# Unrolled, the loop has two dots that add to one sum. Triton takes them for chained products, as attention has them,
# and puts all warps on the rows if there are no fewer rows than columns, however few the rows: four warps on the two
# pieces of 16 rows. Two warps then load, widen and multiply the same. Nothing is said of it.
# tl.static_range, or a second dot written out (low and high halves of packed codes, say), does the same.
# A tile of 16 x 16 is multiplied twice as it is (its two pieces are two warps' work) and four times unrolled, by every
# warp. 16 x 32 is shared in either case. So a tile needs more columns than rows, and eight columns for each warp. From
# 64 rows on compute capability 9.0 has another instruction, which is not concerned.
# Met by a kernel that widens 4-bit codes for tl.dot, at 16 x 16: every warp widened every weight.
#
# The page of tl.range has only how many times it unrolls. In the source, of earlier versions, it is warpsPerTileV2() in
# AccelerateMatmul.cpp: any other dot of the same block that feeds this one or is fed by it counts as chained, also by
# the sum. A search of the issues found none about it. Pull request 2581 brought the choice by shape, for attention.
#
# Seen on 30 November 2026, Python 3.11, x86-64, no GPU, compiled for compute capability 9.0:
#   32 x 32, not unrolled: each product 1 times, each weight widened 2 times
#   32 x 32, unrolled by 2: each product 2 times, each weight widened 4 times
#   16 x 16, not unrolled: each product 2 times, each weight widened 2 times
#   16 x 16, unrolled by 2: each product 4 times, each weight widened 4 times
#   16 x 32, not unrolled: each product 1 times, each weight widened 1 times
#   16 x 32, unrolled by 2: each product 1 times, each weight widened 1 times
# Exits 0 if the compiler behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
cat > "$folder/product.py" <<'PYTHON'  # a file, as Triton reads the source of kernels
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARPS, K, STEPS = 4, 64, 16


@triton.jit
def product(x_ptr, w_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr,
            UNROLL: tl.constexpr):  # fmt: skip
    """out [M, N] = x [M, STEPS * K] times the transpose of w [N, STEPS * K]."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    out = tl.zeros([M, N], tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        x = tl.load(x_ptr + m * STEPS * K + step * K + k[None, :])
        w = tl.load(w_ptr + n * STEPS * K + step * K + k[:, None]).to(tl.float32).to(tl.float16)
        out += tl.dot(x, w)
    tl.store(out_ptr + m * N + n, out)


def repeats(m: int, n: int, unroll: int) -> tuple[float, float]:
    """How often all warps together compute each product, and widen each weight."""
    constants = {"M": m, "N": n, "K": K, "STEPS": STEPS, "UNROLL": unroll}
    types = {"x_ptr": "*fp16", "w_ptr": "*i32", "out_ptr": "*fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product, types, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}).asm
    assert len(re.findall(r"= tt\.dot ", code["ttgir"])) == unroll, "changed: the dots of the loop"
    multiplied = code["ptx"].count("mma.sync.aligned.m16n8k16") * WARPS / unroll * (16 * 8 * 16)
    widened = len(re.findall(r"cvt\.rn\.f(?:32|16)\.s32", code["ptx"])) * WARPS * 32 / unroll
    return multiplied / (m * n * K), widened / (n * K)


wanted = {(32, 32): [(1, 2), (2, 4)], (16, 16): [(2, 2), (4, 4)], (16, 32): [(1, 1), (1, 1)]}
for (m, n), values in wanted.items():
    for unroll, value in zip((1, 2), values, strict=True):
        seen = repeats(m, n, unroll)
        how = f"unrolled by {unroll}" if unroll > 1 else "not unrolled"
        print(f"{m} x {n}, {how}: each product {seen[0]:g} times, each weight widened {seen[1]:g} times")
        assert seen == value, f"changed: {value} times"
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/product.py"
