"""`boomerang export --size 24L` (or `24L-q6`): one size as an ordinary checkpoint folder, and as GGUF.

Offers `ExportJob` and `run(job)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model_store.errors import BoomerangError
from model_store.files import read_json, read_json_if_there

if TYPE_CHECKING:
    import numpy as np

    from model_store.export_point import PointCodes
    from model_store.pair import Pair

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "tokenizer.model", "added_tokens.json", "generation_config.json",
)  # fmt: skip
_CHECKED_TOKENS = 48  # of the check of an export, beyond its windows


class ExportError(BoomerangError, ValueError):
    """A size that cannot be written in the asked form, or that does not compute what the pair computes."""


class ExportJob(BaseModel):
    """One export; the fields are the command's options."""

    model_config = ConfigDict(frozen=True)

    teacher: str | None = Field(None, description="folder, GGUF file or hub id [the default pair's]")
    student: str | None = Field(None, description="folder or hub id of the student")
    patch_order: Literal["last_to_first", "first_to_last"] | None = Field(
        None, description="use this order, not the pair's own"
    )
    size: str = Field(description="as 24L; 24L-q6: with weights rounded to what 6 bits read")
    out: Path = Field(description="folder to write; it must not exist or be empty")
    gguf: Path | None = Field(None, description="also write this GGUF file (llama, qwen2, qwen3)")
    gguf_pre: str | None = Field(None, description="llama.cpp's name of the pre-tokenizer, where it is not recognised")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of the tensors; in GGUF too unless a precision is named (Q8_0, Q5_1, Q4_1)"
    )
    no_verify: bool = Field(False, description="skip loading the result and comparing its logits")
    store: str | None = Field(None, description="folder of the local model store")


def run(job: ExportJob, nested: Callable[[Pair], Path] | None = None) -> int:
    """Write, compare, report. `nested` makes the file of a pair's nested codes; a precision cannot do without."""
    from model_store.pair import open_pair

    pair = open_pair(job.teacher, job.student, patch_order=job.patch_order, store=job.store)
    size, width = parse_point(job.size, pair)
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise ExportError(f"--out: {job.out} exists and is not an empty folder")
    codes = None
    if width is not None:
        if nested is None:
            raise ExportError("--size: nested codes are made by the server's packages, which are not here")
        from model_store.export_point import PointCodes

        codes = PointCodes(nested(pair), width)
    export_size(pair, size, job.out, job.dtype, codes)
    print(f"wrote {job.out}: {size}L, {pair.parameters(size):,} parameters")
    if not job.no_verify:
        difference = verify(pair, size, job.out, dtype=job.dtype, codes=codes)
        print(f"logits equal the pair's at {size}L (largest difference {difference:.2e})")
    if job.gguf:
        from model_store.export_gguf import verify_gguf, write_gguf

        write_gguf(job.out, job.gguf, job.gguf_pre, None if codes is None else point_grids(pair, size, codes))
        verify_gguf(job.out, job.gguf, rounded=codes is not None)
        how = "equal" if codes is None else "within rounding"
        print(f"wrote {job.gguf} ({job.gguf.stat().st_size / 1e6:.0f} MB), read back {how}")
    return 0


def parse_size(text: str, pair: Pair) -> int:
    """Layer count of "24L" or "24". ExportError names the sizes there are."""
    match = re.fullmatch(r"(\d+)[lL]?", text.strip())
    sizes = pair.elasticity.sizes
    if not match or int(match[1]) not in sizes:
        raise ExportError(f"--size: the pair has no size {text!r} (it has {sizes[0]}L to {sizes[-1]}L)")
    return int(match[1])


def parse_point(text: str, pair: Pair) -> tuple[int, int | None]:
    """Layers, and bits if a precision is named, of "24L", "24" or "24L-q6". ExportError names what there is."""
    from model_store.nested import WIDTHS

    depth, separator, precision = text.strip().rpartition("-")
    if not separator or precision.lower() == "exact":
        return parse_size(depth if separator else text, pair), None
    bits = precision.lower().removeprefix("q")
    if precision[:1].lower() != "q" or not bits.isdecimal() or int(bits) not in WIDTHS:
        raise ExportError(
            f"--size: {precision!r} is no precision (there are exact, {', '.join(f'q{w}' for w in WIDTHS)})"
        )
    return parse_size(depth, pair), int(bits)


def export_size(pair: Pair, size: int, folder: Path, dtype: str = "bfloat16", codes: PointCodes | None = None) -> None:
    """Write config, safetensors, tokenizer files and model card of one size into `folder` (atomically), its matrices
    as they were loaded or as `codes` read.

    ExportError for a weight that float16 cannot hold.
    """
    import numpy as np

    from model_store.gguf_import import write_safetensors
    from model_store.tokenizer_files import TEMPLATE_DIR

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        target = Path(scratch) / "checkpoint"
        target.mkdir()
        names: list[str] = []

        def noted() -> Iterator[tuple[str, np.ndarray]]:
            for name, tensor in _tensors(pair, size, dtype, codes):
                if dtype == "float16" and not np.isfinite(tensor).all():
                    raise ExportError(f"--dtype float16: {name} has values beyond its range: take bfloat16 or float32")
                names.append(name)
                yield name, tensor

        write_safetensors(target, noted())
        tied = not any(name in ("lm_head.weight", "embed_out.weight") for name in names)
        config = _config(pair, size, tied, dtype)
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _TOKENIZER_FILES:
            if (pair.tokenizer_path / name).is_file():
                shutil.copyfile(pair.tokenizer_path / name, target / name)
        if (pair.tokenizer_path / TEMPLATE_DIR).is_dir():
            shutil.copytree(pair.tokenizer_path / TEMPLATE_DIR, target / TEMPLATE_DIR)
        (target / "README.md").write_text(model_card(pair, size, None if codes is None else codes.width))
        if folder.exists():
            folder.rmdir()
        target.rename(folder)


# Spellings that what is written replaces, and notes of the tool that wrote the teacher.
_STALE = (
    "num_hidden_layers", "n_layer", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window",
    "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern",
    "torch_dtype", "_name_or_path", "auto_map", "transformers_version", "quantization_config", "compression_config",
)  # fmt: skip


def _config(pair: Pair, size: int, tied: bool, dtype: str) -> dict[str, Any]:
    """The teacher's config.json with what differs in this size; each layer keeps its own kind of attention.

    ExportError if no one config can say what the layers do.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from model_store.families import FAMILIES
    from model_store.spec import resolved_config

    raw = read_json(pair.teacher_path / "config.json")
    config = {key: value for key, value in raw.items() if key not in _STALE}
    config |= {"tie_word_embeddings": tied, "dtype": dtype}
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[pair.spec.family]]
    config[FAMILIES[pair.spec.family].num_layers_key] = size
    if raw.get("rope_scaling") and raw.get("rope_parameters"):  # one of them would be read, the other believed
        config = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
        config["rope_parameters"] = resolved_config(raw).rope_parameters
    return config | _by_layer(pair, size)


def _by_layer(pair: Pair, size: int) -> dict[str, Any]:
    """What differs between a size's layers, for its config: sliding windows, and which of them know positions."""
    from model_store.families import FAMILIES
    from model_store.weights import Checkpoint

    num_teacher, path = pair.elasticity.num_teacher_layers, pair.elasticity.path(size)
    teacher = Checkpoint(pair.teacher_path, pair.store).spec
    student = pair.student_spec or teacher
    kinds, rotates = [], []  # of each layer: its window, whether it knows positions
    for layer in path.layers:
        spec, index = (teacher, layer) if layer < num_teacher else (student, layer - num_teacher)
        if spec is teacher and index != layer:
            index = pair.elasticity.kept[index]  # a low-rank student's layer
        kinds.append(spec.window(index))
        rotates.append(spec.rope(index) != "none")
    windows = {window for window in kinds if window is not None}
    found: dict[str, Any] = {}
    if not all(rotates) or teacher.unrotated_layers:
        found["no_rope_layers"] = [int(rotated) for rotated in rotates]
    which = FAMILIES[pair.spec.family].windows
    if which.startswith("all") and not teacher.layer_types:
        if len({*kinds}) > 1 and min(windows) < pair.spec.max_position_embeddings:
            raise ExportError(f"layers with windows of {sorted({*kinds}, key=str)}: no config of this family says that")
        return found | {"sliding_window": kinds[0] if len({*kinds}) == 1 else None}
    if which == "none":
        return found
    if len(windows) > 1:
        raise ExportError(f"layers with sliding windows of {sorted(windows)}: no config of this family says that")
    types = ["full_attention" if window is None else "sliding_attention" for window in kinds]
    found |= {"layer_types": types, "use_sliding_window": bool(windows), "sliding_window": min(windows, default=None)}
    first = types.index("sliding_attention") if windows else size
    if "full_attention" not in types[first:]:
        found["max_window_layers"] = first  # as readers without layer_types have it
    return found


def _tensors(
    pair: Pair, size: int, dtype_name: str, codes: PointCodes | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor of everything the size runs, in its family's own names and layouts."""
    from model_store.arrays import dtype_of
    from model_store.layout import end_tensors, full_name, layer_prefix
    from model_store.weight_form import WeightForm
    from model_store.weights import Checkpoint, split_layer

    form, path, family = WeightForm(dtype_of(dtype_name)), pair.elasticity.path(size), pair.spec.family
    for position, layer in enumerate(path.layers):
        weights = pair.read_layer(layer, form)
        if codes is not None:
            weights = codes.layer(layer, weights, form.dtype)
        for name, tensor in split_layer(weights, pair.spec):
            yield full_name(f"{layer_prefix(family)}{position}.{name}", family), tensor
    teacher = Checkpoint(pair.teacher_path, pair.store)
    sources = {"teacher": teacher, "student": teacher}
    if pair.student_spec is not None and pair.student_path is not None:
        sources["student"] = Checkpoint(pair.student_path, pair.store)
    sides = {"embed": path.embed_from, "norm": path.norm_from, "head": path.head_from}
    is_tied = sources[path.head_from].spec.tie_word_embeddings and sources[path.head_from] is sources[path.embed_from]
    for field, (part, name, _) in end_tensors(pair.spec).items():
        value = sources[sides[part]].end_tensors(form, parts=[part])[field]
        # A tied embedding is read as its head is.
        if codes is not None and (part == "head" or sources[sides[part]].spec.tie_word_embeddings):
            read = codes.head(sides[part], form.dtype) if part in ("head", "embed") else None
            value = value if read is None else read
        if value is not None and not (part == "head" and is_tied):
            yield full_name(name, family), value


def point_grids(pair: Pair, size: int, codes: PointCodes) -> dict[str, Any]:
    """Grids of the matrices of a size, by name in the exported folder."""
    from model_store.arrays import FLOAT32
    from model_store.layout import full_name, layer_prefix
    from model_store.weight_form import WeightForm

    found: dict[str, Any] = {}
    for position, layer in enumerate(pair.elasticity.path(size).layers):
        weights = pair.read_layer(layer, WeightForm(FLOAT32))
        for name, grid in codes.grids(layer, weights, pair.spec).items():
            found[full_name(f"{layer_prefix(pair.spec.family)}{position}.{name}", pair.spec.family)] = grid
    return {"width": codes.width, "grids": found}


def model_card(pair: Pair, size: int, width: int | None = None) -> str:
    """README.md of an export: what it is made of, its licence, and what it was measured to be worth."""
    manifest_file = pair.notes_path / "pair.json"
    manifest = read_json_if_there(manifest_file)
    path, num_teacher = pair.elasticity.path(size), pair.elasticity.num_teacher_layers
    origin = [str(i) if i < num_teacher else f"S{i - num_teacher}" for i in path.layers]
    licence = manifest.get("licence", "that of the teacher")
    teacher = manifest.get("teacher", pair.teacher_path.name)
    point = "" if width is None else f", {width} bits"
    lines = [
        "---", f"license: {str(licence).lower()}", f"base_model: {teacher}", "---", "",
        f"# {pair.name}, {size}L{point}", "",
        f"One size of an elastic pair: {size} of the {num_teacher} layers of `{teacher}`, some of them replaced by "
        "distilled student layers that stand for several (Boomerang distillation, arXiv 2510.05064). "
        "Written by `boomerang export`; any size of the same pair can be served from one copy of the tensors."
        if pair.student_path else f"`{teacher}` as it is, written by `boomerang export`.", "",
        f"- parameters: {pair.parameters(size):,}", f"- licence: {licence}", f"- patch order: {pair.patch_order}",
        f"- layers (numbers are the teacher's, S are student layers): {', '.join(origin)}", "",
    ]  # fmt: skip
    if quality := pair.quality.get(size):
        rows = [f"| {name} | {value} |" for name, value in quality.items() if not name.endswith("_ci")]
        of = "" if width is None else " These are of the weights as they were loaded."
        lines += [
            f"Measured against the teacher by `boomerang evaluate`:{of}",
            "",
            "| figure | value |",
            "|---|---|",
            *rows,
        ]
    if kinds := _kinds_of(pair, size, width):
        lines += [
            "",
            "KL to the teacher, nats per token, by kind of text:",
            "",
            "| kind | KL | how |",
            "|---|---|---|",
            *kinds,
        ]
    return "\n".join(lines) + "\n"


def _kinds_of(pair: Pair, size: int, width: int | None) -> list[str]:
    """Rows of a card: what was measured of this point, or what depth and width cost alone, added up."""
    rows = []
    for kind, found in pair.kinds.items():
        alone, cost = found["sizes"].get(str(size)), found["widths"].get(str(width))
        if width is None and alone:
            rows.append(f"| {kind} | {alone['kl']:.4f} | measured |")
        elif width is not None and (row := found["points"].get(f"{size}L-q{width}")):
            rows.append(f"| {kind} | {row['kl']:.4f} | measured |")
        elif width is not None and alone and cost:
            rows.append(f"| {kind} | {alone['kl'] + cost['kl']:.4f} | sum of what layers and bits cost alone |")
    return rows


def verify(
    pair: Pair, size: int, folder: Path, tolerance: float = 1e-3, dtype: str = "bfloat16",
    codes: PointCodes | None = None,
) -> float:  # fmt: skip
    """Largest difference of float32 logits between the exported model and the pair. ExportError above `tolerance`.

    Both start from the same tensors of `dtype`; what is compared is the assembly, not rounding. The pair's side is
    built without the export's config: each layer runs as its own checkpoint has it, beyond any sliding window.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from model_store.distill.from_pair import load_elastic

    sides = [pair.spec, *([pair.student_spec] if pair.student_spec else [])]
    beyond = max(spec.sliding_window or 0 for spec in sides) + _CHECKED_TOKENS
    length = min(beyond, pair.spec.max_position_embeddings)
    ids = torch.randint(pair.spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        exported = model(ids, use_cache=False).logits
        ours = load_elastic(pair, getattr(torch, dtype))
        ours.teacher.float()
        ours = ours.float()
        if codes is not None:
            from model_store.evaluate.kinds import read_at

            read_at(ours, pair, codes.file, codes.width)
            for parameter in (*ours.parameters(), *ours.teacher.parameters()):
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
        expected = ours.size_logits(ids, size)
    difference = float((exported - expected).abs().max())
    if not difference <= tolerance:
        raise ExportError(f"{folder} does not compute what the pair computes: logits differ by up to {difference:.3g}")
    return difference
