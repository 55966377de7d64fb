"""Compiles every kernel to machine code for a GPU that need not be there: `python -m server.kernels.cuda.compile`.

Prints registers, spilled bytes, shared memory and the instructions of the longest loop of each, at the shapes of common
models; for products also those of a thread for each weight that it unpacks there. Finds what the interpreter cannot:
type errors, tiles beyond shared memory, spills, warps that all do the same.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.kernels.cuda import activation, attention, coded_linear, draw, linear, norm, rotary, tables
from server.kernels.cuda.codes import FORMS, CodeForm

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(slots=True)
class Case:
    """One compilation: argument types ("T" stands for the model's) and constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()  # pointers that may start anywhere
    whole: tuple[str, ...] = ()  # numbers that are multiples of 16
    weights: int = 0  # unpacked in a turn of the longest loop, by all threads


def cases(*, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int = 32) -> list[Case]:
    """What a model of these shapes launches: RMS and layer norm, every activation, decode and chunk attention, draw."""
    two = triton.next_power_of_2
    found = []
    for kind in ("rms", "layer"):
        types = {"x_ptr": "*T", "weight_ptr": "*T", "bias_ptr": "*T", "other_ptr": "*T", "split_ptr": "*i32",
                 "out_ptr": "*T", "num_rows": "i32", "width": "i32", "eps": "fp32"}  # fmt: skip
        width = two(hidden)
        is_layer = kind == "layer"
        constants = {"IS_LAYER": is_layer, "HAS_BIAS": is_layer, "HAS_SPLIT": not is_layer, "ROWS": 1, "WIDTH": width}
        found.append(
            Case(f"{kind} norm", norm.norm_kernel, types, constants, num_warps=norm.num_warps(width),
                 unaligned=("split_ptr",))
        )  # fmt: skip
    for kind, number in activation.KINDS.items():
        types = {"up_ptr": "*T", "out_ptr": "*T", "num_rows": "i32", "width": "i32"}
        constants = {"KIND": number, "IS_GATED": kind == "silu", "ROWS": 1, "COLUMNS": 1024}
        found.append(Case(kind, activation.activation_kernel, types, constants))
    pages = {"k_pages_ptr": "*T", "v_pages_ptr": "*T", "table_ptr": "*i32"}
    shape = {"H": num_heads, "K": num_kv_heads, "D": head_dim, "PAGE": page_size}
    for has_norm, rotary_dim in ((True, head_dim), (False, head_dim // 4 * 2), (False, 0)):
        for rows in (1, 8):
            types = {"qkv_ptr": "*T", "q_ptr": "*T", **pages, "positions_ptr": "*i32", "slots_ptr": "*i32",
                     "count_ptr": "*i32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "q_norm_ptr": "*T",
                     "k_norm_ptr": "*T", "num_tokens": "i32", "max_blocks": "i32", "eps": "fp32"}  # fmt: skip
            constants = {**shape, "ROTARY": rotary_dim, "HAS_NORM": has_norm, "ROWS": rows, "WIDTH": two(head_dim)}
            warps = 1 if rows * two(head_dim) <= 256 else 4
            name = f"rotary {rotary_dim}{', qk norm' if has_norm else ''}, {rows} rows"
            found.append(Case(name, rotary.rotary_kernel, types, constants, num_warps=warps))
    items = {"tokens_ptr": "*i32", "lengths_ptr": "*i32", "slots_ptr": "*i32", "positions_ptr": "*i32"}
    tiles = attention.Tiles.of(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, item_bytes=2)
    chunk_queries = tiles.chunk_rows // (num_heads // num_kv_heads)
    for name, splits, queries, rows in (
        ("decode", 1, 1, tiles.decode_rows), ("decode", 8, 1, tiles.decode_rows),
        ("chunk", 1, chunk_queries, tiles.chunk_rows), ("chunk", 0, chunk_queries, tiles.chunk_rows),
    ):  # fmt: skip
        types = {"q_ptr": "*T", "out_ptr": "*T", "partial_ptr": "*fp32", "score_ptr": "*fp32", **pages, **items,
                 "count_ptr": "*i32", "first_token": "i32", "max_blocks": "i32", "scale": "fp32"}  # fmt: skip
        constants = {**shape, "SPLITS": splits, "QUERIES": queries, "BLOCK_M": rows, "BLOCK_N": tiles.keys,
                     "WIDTH": tiles.width}  # fmt: skip
        found.append(
            Case(f"{name} attention, {splits or 'any'} splits", attention.attention_kernel, types, constants,
                 unaligned=(*items, "count_ptr"))
        )  # fmt: skip
    types = {"partial_ptr": "*fp32", "score_ptr": "*fp32", "out_ptr": "*T", "tokens_ptr": "*i32",
             "lengths_ptr": "*i32", "count_ptr": "*i32", "first_token": "i32"}  # fmt: skip
    powers = [1 << bit for bit in range(1, attention.MAX_SPLITS.bit_length())]
    for name, splits, queries in (("decode", 8, 1), *(("chunk", power, chunk_queries) for power in powers)):
        constants = {"H": num_heads, "D": head_dim, "SPLITS": splits, "QUERIES": queries, "WIDTH": tiles.width}
        found.append(
            Case(f"{name}, reduce {splits} splits", attention.reduce_kernel, types, constants, num_warps=1,
                 unaligned=("tokens_ptr", "lengths_ptr", "count_ptr"))
        )  # fmt: skip
    types = {"logits_ptr": "*T", "settings_ptr": "*fp64", "tokens_ptr": "*i32", "vocab": "i32", "row_stride": "i32",
             "settings_stride": "i32"}  # fmt: skip
    found.append(Case("draw", draw.draw_kernel, types, {"SHIFT": 16, "BLOCK": 4096}, num_warps=8))
    types = {"table_ptr": "*i32", "updates_ptr": "*i32", "num_updates": "i32"}
    found.append(Case("table updates", tables.scatter_kernel, types, {"BLOCK": 1024}))
    return found


def product_cases(capability: int) -> list[Case]:
    """Whatever the model: int8 weights; both products of low-rank terms, with int8 factors and plain ones."""
    found = []
    for rows in (1, 64, 512):
        tiles = linear.Tiles.of(rows)
        for name, has_blocks, has_split, kind in (
            ("int8 product", False, False, "*i8"), ("low rank a, int8", False, True, "*i8"),
            ("low rank b, int8", True, True, "*i8"), ("low rank b", True, True, "*T"),
        ):  # fmt: skip
            types = {"x_ptr": "*T", "weight_ptr": kind, "scale_ptr": "*fp32", "bias_ptr": "*T", "out_ptr": "*T",
                     "blocks_ptr": "*i32", "split_ptr": "*i32", "num_rows": "i32", "num_outputs": "i32",
                     "width": "i32", "x_stride": "i32"}  # fmt: skip
            constants = {
                "HAS_SCALE": kind == "*i8", "HAS_BIAS": not has_split, "ADD": not has_split or has_blocks,
                "HAS_BLOCKS": has_blocks, "HAS_SPLIT": has_split, "EVEN": not has_blocks, "BLOCK_M": tiles.rows,
                "BLOCK_N": linear.TERM_BLOCK if has_blocks else tiles.outputs, "BLOCK_K": tiles.inputs,
            }  # fmt: skip
            found.append(
                Case(f"{name}, {rows} rows", linear.linear_kernel, types, constants, num_warps=tiles.num_warps,
                     num_stages=tiles.num_stages, unaligned=("split_ptr",), whole=("num_outputs", "width", "x_stride"),
                     weights=constants["BLOCK_N"] * tiles.inputs)
            )  # fmt: skip
    return found + _coded_cases(capability)


def _coded_cases(capability: int) -> list[Case]:
    """Forms that have all there is between them: minima, scales by 16 inputs and by block, no plane and the most."""
    found = []
    whole = ("num_outputs", "width", "x_stride", "out_stride")
    forms = {f"codes in {name}": FORMS[name][0] for name in ("Q4_K", "Q6_K")}
    for name, form in (forms | {"nested codes": CodeForm(8, is_nested=True)}).items():
        integers = "*i8" if form.group == 16 else "*u8"
        codes = {"low_ptr": "*i32", "high_ptr": "*i32", "scale_ptr": "*fp16" if form.is_nested else integers,
                 "minimum_ptr": integers, "block_scale_ptr": "*fp16", "block_minimum_ptr": "*fp16",
                 "num_outputs": "i32", "width": "i32"}  # fmt: skip
        for rows in (1, 16, 64, 256):
            tiles = coded_linear.Tiles.of(rows, item_bytes=2, major=capability // 10)
            types = codes | {"x_ptr": "*T", "bias_ptr": "*T", "out_ptr": "*T", "num_rows": "i32", "x_stride": "i32",
                             "out_stride": "i32"}  # fmt: skip
            constants = coded_linear.constants(form) | {
                "HAS_BIAS": True, "ADD": True, "ONE": rows == 1, "BLOCK_M": tiles.rows,
                "BLOCK_N": tiles.outputs, "GROUPS": tiles.groups, "STAGES": tiles.num_stages,
                "OUTPUTS_LEFT": tiles.outputs_left,
            }  # fmt: skip
            found.append(
                Case(f"{name} product, {rows} rows", coded_linear.coded_linear_kernel, types, constants,
                     num_warps=tiles.num_warps, num_stages=tiles.num_stages, whole=whole,
                     weights=tiles.outputs * tiles.groups * 32)
            )  # fmt: skip
        types = codes | {"ids_ptr": "*i32", "out_ptr": "*T", "num_tokens": "i32"}
        constants = coded_linear.constants(form) | {"TOKENS": 1, "GROUPS": 32}
        found.append(Case(f"{name}, embedding", coded_linear.coded_rows_kernel, types, constants, whole=whole[:2]))
    types = {"partial_ptr": "*fp32", "bias_ptr": "*T", "out_ptr": "*T", "num_rows": "i32", "num_outputs": "i32",
             "out_stride": "i32"}  # fmt: skip
    constants = {"HAS_BIAS": True, "ADD": True, "SPLITS": coded_linear.MAX_SPLITS, "COLUMNS": coded_linear.JOIN_COLUMNS}
    found.append(Case("join of split products", coded_linear.join_kernel, types, constants, whole=(whole[0], whole[3])))
    return found


def compile_case(case: Case, dtype: str, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel. Raises what the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr").replace("T", _TYPES[dtype]) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") and name not in case.unaligned]
    aligned += [names.index(name) for name in case.whole]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if (getattr(compiled.metadata, "tmem_size", None) or 0) > 512:  # columns; the code is a trap then
        raise triton.OutOfResources(compiled.metadata.tmem_size, 512, "tensor memory")
    found = resources(compiled.asm["ptx"], capability)
    each = round(found["loop"] * 32 * case.num_warps / case.weights, 1) if case.weights else None
    return {"kernel": case.name, "dtype": dtype, **found, "each": each, "shared": compiled.metadata.shared}


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers a thread and spilled bytes, as the assembler that Triton brings along reports them; instructions of the
    longest loop."""
    tools = triton.knobs.nvidia
    assembler = (tools.ptxas_blackwell if capability >= 100 else tools.ptxas).path
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        binary = str(Path(folder, "kernel.cubin"))
        command = [assembler, "-v", f"-arch={arch}", str(file), "-o", binary]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        code = subprocess.run([tools.nvdisasm.path, binary], check=True, capture_output=True, text=True).stdout
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", report)]
    (registers,) = re.findall(r"Used (\d+) registers", report)
    return {"registers": int(registers), "spilled": sum(spills), "loop": longest_loop(code)}


def longest_loop(code: str) -> int:
    """Instructions between a label and the last branch back to it, of disassembled machine code; 0 without loops."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


SHAPES = {
    "qwen3-4b": {"hidden": 2560, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "smollm2-135m": {"hidden": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "pythia-2.8b": {"hidden": 2560, "num_heads": 32, "num_kv_heads": 32, "head_dim": 80},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(_TYPES))
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for Hopper")
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="only those whose names match")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    wanted = [(shape, case) for shape in arguments.shapes for case in cases(**SHAPES[shape])]
    wanted += [("any", case) for case in product_cases(arguments.capability)]
    for shape, case in wanted:
        for dtype in arguments.dtypes if re.search(arguments.kernels, case.name) else ():
            rows.append({"shape": shape} | compile_case(case, dtype, arguments.capability))
    if arguments.json:
        json.dump(rows, sys.stdout)
        return 0
    print(f"{'shapes':14}{'kernel':36}{'dtype':10}{'registers':>10}{'spilled':>9}{'shared':>9}{'loop':>7}{'each':>7}")
    for row in rows:
        print(
            f"{row['shape']:14}{row['kernel']:36}{row['dtype']:10}{row['registers']:>10}{row['spilled']:>9}"
            f"{row['shared']:>9}{row['loop']:>7}{row['each'] or '':>7}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
