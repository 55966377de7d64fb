#!/usr/bin/env bash
# Triton 3.7.1: words broadcast to a new axis leave their threads, words copied along it by tl.join do not.
#
# words[:, :, None] >> 4 * tl.arange(0, 8) takes eight 4-bit codes from each word. The layout of the result does not
# follow from that of the loaded words. A broadcast tensor gets the default, which spreads the last axis over lanes, a
# value each. So all words are exchanged before they are shifted, and a sum over the eight takes three shuffles a value.
# No later pass finds the layout in which nothing moves. tl.join infers its layout from its operands instead: three of
# them make the same tensor with all copies in the word's thread, which costs nothing. A loop over the shifts, without
# the new axis, moves nothing either.
# Met by a kernel that multiplies one row with weights in 4-bit codes: 16.6 instructions a weight, 5.6 with the loop.
#
# The pages of tl.broadcast_to and tl.join say nothing of layouts, and a search of the issues found none about it. In a
# review of vLLM's AWQ kernel (ROCm/vllm, pull request 170) a broadcast was expected to cost less than three
# tl.interleave, and was found to be slower, without the cause.
#
# Seen on 30 November 2026, Python 3.11, x86-64, no GPU, compiled for compute capability 9.0, four warps:
#   128 codes a thread, broadcast: 465 shuffles, 1571 instructions
#   128 codes a thread, joined: 16 shuffles, 461 instructions
#   128 codes a thread, loop: 16 shuffles, 605 instructions
# Exits 0 if the compiler behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
cat > "$folder/sums.py" <<'PYTHON'  # a file, as Triton reads the source of kernels
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARPS, N, W = 4, 32, 64


@triton.jit
def sums(word_ptr, out_ptr, steps, N: tl.constexpr, W: tl.constexpr, FORM: tl.constexpr):
    """out [N] = the sums of all codes of words [steps, N, W], eight a word."""
    n, w, code = tl.arange(0, N), tl.arange(0, W), tl.arange(0, 8)[None, None, :]
    out = tl.zeros([N, W], tl.float32)
    for step in range(steps):
        words = tl.load(word_ptr + (step * N + n[:, None]) * W + w[None, :])
        if FORM == "broadcast":
            out += tl.sum((words[:, :, None] >> 4 * code & 15).to(tl.float32), axis=2)
        elif FORM == "joined":
            copies = tl.join(words, words)
            copies = tl.join(copies, copies)
            copies = tl.reshape(tl.join(copies, copies), [N, W, 8])
            out += tl.sum((copies >> 4 * code & 15).to(tl.float32), axis=2)
        else:
            for i in tl.static_range(8):
                out += (words >> 4 * i & 15).to(tl.float32)
    tl.store(out_ptr + n, tl.sum(out, axis=1))


def count(form: str) -> tuple[int, int]:
    """Shuffles and instructions of the kernel."""
    constants = {"N": N, "W": W, "FORM": form}
    types = {"word_ptr": "*i32", "out_ptr": "*fp32", "steps": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(sums, types, constants, {(i,): [["tt.divisibility", 16]] for i in range(2)})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}).asm
    instructions = re.findall(r"\t([A-Z][A-Z0-9]+)\b", code["sass"])
    return instructions.count("SHFL"), len(instructions)


codes = N * W * 8 // (WARPS * 32)
seen = {form: count(form) for form in ("broadcast", "joined", "loop")}
for form, (shuffles, instructions) in seen.items():
    print(f"{codes} codes a thread, {form}: {shuffles} shuffles, {instructions} instructions")
assert seen["broadcast"][0] > 3 * codes, "changed: the codes of a word are not spread over lanes any more"
assert 0 < seen["joined"][0] == seen["loop"][0] < codes / 4, "changed: words do not stay where they were loaded"
assert seen["broadcast"][1] > 2 * max(seen["joined"][1], seen["loop"][1]), "changed: instructions"
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/sums.py" 2> >(grep -v "^nvdisasm warning" >&2)
