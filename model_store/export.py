"""`boomerang export --size 24L`: one size as an ordinary checkpoint folder, and as GGUF.

Offers `add_arguments(parser)` and `run(args)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.errors import BoomerangError

if TYPE_CHECKING:
    import torch

    from model_store.pair import Pair

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "tokenizer.model", "added_tokens.json", "generation_config.json",
)  # fmt: skip
_LAYER = re.compile(r"((?:model\.|gpt_neox\.|transformer\.)?(?:layers|h)\.)(\d+)\.(.+)")


class ExportError(BoomerangError, ValueError):
    """A size that cannot be written in the asked form, or that does not compute what the pair computes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--teacher", help="folder, GGUF file or hub id (default: the default pair's)")
    add("--student", help="folder or hub id of the student")
    add("--patch-order", choices=("last_to_first", "first_to_last"), help="use this order, not the pair's own")
    add("--size", required=True, help="layers, as 24L or 24")
    add("--out", type=Path, required=True, help="folder to write; it must not exist or be empty")
    add("--gguf", type=Path, help="also write this GGUF file (llama, qwen2, qwen3)")
    add("--gguf-pre", help="llama.cpp's name of the pre-tokenizer, where it is not recognised")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="of the tensors written, in the GGUF file too [bfloat16]")  # fmt: skip
    add("--no-verify", action="store_true", help="skip loading the result and comparing its logits")
    add("--store", help="folder of the local model store")


def run(args: argparse.Namespace) -> int:
    """Write, compare, report."""
    from model_store.pair import open_pair

    pair = open_pair(args.teacher, args.student, patch_order=args.patch_order, store=args.store)
    size = parse_size(args.size, pair)
    if args.out.exists() and any(args.out.iterdir()):
        raise ExportError(f"--out: {args.out} exists and is not empty")
    export_size(pair, size, args.out, args.dtype)
    print(f"wrote {args.out}: {size} layers, {pair.parameters(size):,} parameters")
    if not args.no_verify:
        difference = verify(pair, size, args.out, dtype=args.dtype)
        print(f"logits equal the pair's at {size} layers (largest difference {difference:.2e})")
    if args.gguf:
        from model_store.export_gguf import verify_gguf, write_gguf

        write_gguf(args.out, args.gguf, args.gguf_pre)
        verify_gguf(args.out, args.gguf)
        print(f"wrote {args.gguf} ({args.gguf.stat().st_size / 1e6:.0f} MB), read back equal")
    return 0


def parse_size(text: str, pair: Pair) -> int:
    """Layer count of "24L" or "24". ExportError names the sizes there are."""
    match = re.fullmatch(r"(\d+)[lL]?", text.strip())
    sizes = pair.elasticity.sizes
    if not match or int(match[1]) not in sizes:
        raise ExportError(f"--size: the pair has no size {text!r} (it has {sizes[0]}L to {sizes[-1]}L)")
    return int(match[1])


def export_size(pair: Pair, size: int, folder: Path, dtype: str = "bfloat16") -> None:
    """Write config, safetensors, tokenizer files and model card of one size into `folder` (atomically).

    ExportError for a weight that float16 cannot hold.
    """
    from model_store.gguf_import import write_safetensors

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        target = Path(scratch) / "checkpoint"
        target.mkdir()
        names: list[str] = []

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in _tensors(pair, size, dtype):
                if dtype == "float16" and not tensor.isfinite().all():
                    raise ExportError(f"--dtype float16: {name} has values beyond its range: take bfloat16 or float32")
                names.append(name)
                yield name, tensor

        write_safetensors(target, noted())
        tied = not any(name in ("lm_head.weight", "embed_out.weight") for name in names)
        config = _config(json.loads((pair.teacher_path / "config.json").read_text()), size, tied, dtype)
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _TOKENIZER_FILES:
            if (pair.tokenizer_path / name).is_file():
                shutil.copyfile(pair.tokenizer_path / name, target / name)
        (target / "README.md").write_text(model_card(pair, size))
        if folder.exists():
            folder.rmdir()
        target.rename(folder)


def _config(config: dict[str, Any], size: int, tied: bool, dtype: str) -> dict[str, Any]:
    for name in ("num_hidden_layers", "n_layer"):
        if name in config:
            config[name] = size
    if types := config.get("layer_types"):
        config["layer_types"] = [types[0]] * size
    return config | {"tie_word_embeddings": tied, "dtype": dtype}


def _tensors(pair: Pair, size: int, dtype_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything the size runs, in its family's own names and layouts."""
    import torch

    from model_store.lowrank import LOW_RANK_FILE, LowRankStudent
    from model_store.weight_form import WeightForm
    from model_store.weights import Checkpoint

    dtype = getattr(torch, dtype_name)
    path, num_teacher = pair.elasticity.path(size), pair.elasticity.num_teacher_layers
    teacher = _Files(pair.teacher_path)
    low_rank_file = pair.student_path / LOW_RANK_FILE
    low_rank = LowRankStudent(low_rank_file, pair.elasticity.kept) if low_rank_file.is_file() else None
    student = None if low_rank else _Files(pair.student_path)
    for position, layer in enumerate(path.layers):
        index = layer - num_teacher
        if layer < num_teacher:
            tensors = teacher.layer(layer)
        elif student is not None:
            tensors = student.layer(index)
        elif low_rank.has_own_layer(index):
            base = Checkpoint(pair.teacher_path).layer(pair.elasticity.kept[index], WeightForm(torch.float32))
            tensors = _split(low_rank.layer(index, base, WeightForm(dtype)), pair)
        else:
            tensors = teacher.layer(pair.elasticity.kept[index])
        for name, tensor in tensors:
            yield f"{teacher.layer_prefix}{position}.{name}", tensor.to(dtype)
    sources = {"teacher": Checkpoint(pair.teacher_path)}
    sources["student"] = sources["teacher"] if low_rank else Checkpoint(pair.student_path)
    parts = {"embed": path.embed_from, "norm": path.norm_from, "head": path.head_from}
    stays_tied = path.embed_from == path.head_from or low_rank is not None
    for part, side in parts.items():
        source = sources[side]
        for name in source.end_names(part):
            if part == "head" and name in source.end_names("embed"):
                if stays_tied:
                    continue
                yield "lm_head.weight", source.tensor(name).to(dtype)
            else:
                yield teacher.full_name(name), source.tensor(name).to(dtype)


class _Files:
    """The raw tensors of a checkpoint folder, by layer."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        from model_store.weights import weight_files

        self._handles = [safe_open(file, "pt") for file in weight_files(path)]
        self._where = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        first = next(match for name in self._where if (match := _LAYER.match(name)))
        self.layer_prefix = first[1]

    def layer(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Names after the layer's number, without buffers."""
        for name, handle in self._where.items():
            match = _LAYER.match(name)
            if match and int(match[2]) == index and not name.endswith(("inv_freq", "masked_bias", "attention.bias")):
                yield match[3], handle.get_tensor(name)

    def full_name(self, plain: str) -> str:
        """The file's name of a tensor that is known without the wrapper module's prefix."""
        return next((name for name in self._where if name == plain or name.endswith(f".{plain}")), plain)


def _split(layer: Any, pair: Pair) -> Iterator[tuple[str, torch.Tensor]]:
    """A merged Llama-named layer as separate tensors."""
    spec = pair.spec
    q, k, v = layer.qkv_weight.split([spec.q_size, spec.kv_size, spec.kv_size])
    gate, up = layer.up_weight.chunk(2)
    values = {
        "input_layernorm": layer.attn_norm_weight, "self_attn.q_proj": q, "self_attn.k_proj": k,
        "self_attn.v_proj": v, "self_attn.o_proj": layer.o_weight, "post_attention_layernorm": layer.mlp_norm_weight,
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down_weight,
    }  # fmt: skip
    for name, value in values.items():
        yield f"{name}.weight", value.contiguous().clone()


def model_card(pair: Pair, size: int) -> str:
    """README.md of an export: what it is made of, its licence, and what it was measured to be worth."""
    manifest_file = pair.notes_path / "pair.json"
    manifest = json.loads(manifest_file.read_text()) if manifest_file.is_file() else {}
    path, num_teacher = pair.elasticity.path(size), pair.elasticity.num_teacher_layers
    origin = [str(i) if i < num_teacher else f"S{i - num_teacher}" for i in path.layers]
    licence = manifest.get("licence", "that of the teacher")
    teacher = manifest.get("teacher", pair.teacher_path.name)
    lines = [
        "---", f"license: {str(licence).lower()}", f"base_model: {teacher}", "---", "",
        f"# {pair.name}, {size} layers", "",
        f"One size of an elastic pair: {size} of the {num_teacher} layers of `{teacher}`, some of them replaced by "
        "distilled student layers that stand for several (Boomerang distillation, arXiv 2510.05064). "
        "Written by `boomerang export`; any size of the same pair can be served from one copy of the tensors.", "",
        f"- parameters: {pair.parameters(size):,}", f"- licence: {licence}", f"- patch order: {pair.patch_order}",
        f"- layers (numbers are the teacher's, S are student layers): {', '.join(origin)}", "",
    ]  # fmt: skip
    if quality := pair.quality.get(size):
        rows = [f"| {name} | {value} |" for name, value in quality.items() if not name.endswith("_ci")]
        lines += ["Measured against the teacher by `boomerang evaluate`:", "", "| figure | value |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def verify(pair: Pair, size: int, folder: Path, tolerance: float = 1e-3, dtype: str = "bfloat16") -> float:
    """Largest difference of float32 logits between the exported model and the pair. ExportError above `tolerance`.

    Both start from the same tensors of `dtype`; what is compared is the assembly, not rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from model_store.distill.from_pair import lend_size, load_elastic

    ids = torch.arange(3, 35)[None] % pair.spec.vocab_size
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)(ids).logits
        model = load_elastic(pair, getattr(torch, dtype))
        with lend_size(model, size) as lent:
            ours = lent.float()(ids, use_cache=False).logits
    difference = float((exported - ours).abs().max())
    if not difference <= tolerance:
        raise ExportError(f"{folder} does not compute what the pair computes: logits differ by up to {difference:.3g}")
    return difference
