"""An exported checkpoint folder as a GGUF file for llama.cpp, through the gguf package (its dtype, not quantised)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from model_store.arrays import to_numpy, to_torch
from model_store.export import ExportError
from model_store.export_point import AFFINE, affine_blocks, can_hold
from model_store.families import FAMILIES
from model_store.gguf_file import read_gguf
from model_store.gguf_import import import_gguf, tensor_names
from model_store.gguf_pretokenizers import BY_NAME
from model_store.gguf_tokenizer import cuts, read_tokenizer
from model_store.layout import full_name, layer_prefix
from model_store.opening import put_around
from model_store.spec import ModelSpec
from model_store.store import scratch_folder
from model_store.tokenizer_files import TokenizerFiles, read_tokenizer_files, text_of
from model_store.weights import weight_files

# What the matrices are in a file of each dtype, and what such a file calls itself.
_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_FILE_TYPES = {
    8: gguf.LlamaFileType.MOSTLY_Q8_0, 6: gguf.LlamaFileType.MOSTLY_Q8_0, 5: gguf.LlamaFileType.MOSTLY_Q5_1,
    4: gguf.LlamaFileType.MOSTLY_Q4_1,
}  # fmt: skip
_WRITTEN = ("llama", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "gemma3_text")


def write_gguf(folder: Path, file: Path, pre: str | None = None, point: dict[str, Any] | None = None) -> None:
    """Write the checkpoint in `folder` as `file`, matrices in the dtype that its config names, vectors in float32.

    `point`: the width of a reduced size and the grids of its matrices (`export.point_grids`): they are written in the
    nearest type of so many bits.

    ExportError for a family, a dtype or a tokenizer that this writer does not know.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config.get("model_type")
    if family not in _WRITTEN:
        raise ExportError(f"--gguf writes {', '.join(_WRITTEN)}, not {family}")
    if (dtype := config.get("dtype")) not in _TYPES:
        raise ExportError(f"--gguf writes {', '.join(_TYPES)}, not {dtype}")
    spec = ModelSpec.from_hf_config(config)
    if spec.rope_scaling:
        raise ExportError("--gguf: scaled rotary positions are not written; convert the folder with llama.cpp's script")
    _check_layers(spec)
    architecture = FAMILIES[family].gguf
    assert architecture is not None
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(f"{folder.name}")
    writer.add_file_type(_TYPES[dtype][1] if point is None else _FILE_TYPES[point["width"]])
    writer.add_vocab_size(spec.vocab_size)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.rotary_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    if family == "granite":
        writer.add_attention_scale(spec.attention_scale)
        writer.add_embedding_scale(spec.embedding_scale)
        writer.add_residual_scale(spec.residual_scale)
        writer.add_logit_scale(1 / spec.logit_scale)
    if family == "gemma3_text" and spec.sliding_window:
        writer.add_sliding_window(spec.sliding_window)
    _add_tokenizer(writer, folder, config, pre)
    ends, layer = ({theirs: ours for ours, theirs in names.items()} for names in tensor_names(family))
    prefix = re.escape(full_name(layer_prefix(family), family))
    for source in weight_files(folder):
        with safe_open(source, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                stem, _, kind = name.rpartition(".")
                match = re.fullmatch(rf"{prefix}(\d+)\.(.+)", stem)
                target = layer.get(match[2]) if match else ends.get(stem)
                if target is None:
                    raise ExportError(f"--gguf: llama.cpp has no name for the tensor {name}")
                target = f"blk.{match[1]}.{target}" if match else target
                _add_tensor(writer, f"{target}.{kind}", handle.get_tensor(name), dtype, name, spec, point)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_layers(spec: ModelSpec) -> None:
    """ExportError for what llama.cpp fixes for a family and this model has otherwise: its files cannot say it."""
    family, layers = spec.family, range(spec.num_layers)
    types: tuple[str, ...] = ()
    unrotated: tuple[int, ...] = ()
    activation, scale = "silu", spec.head_dim**-0.5
    if family == "gemma3_text":
        activation = "gelu_tanh"
        types = tuple("full_attention" if i % 6 == 5 else "sliding_attention" for i in layers)
        if spec.num_layers == 62:
            scale = (spec.hidden_size // spec.num_heads) ** -0.5
        if spec.local_inv_freq and not math.isclose(spec.local_inv_freq[1], 1e4 ** (-2 / spec.head_dim), rel_tol=1e-5):
            raise ExportError("--gguf: llama.cpp takes the angles of layers with a window from 10000 only")
    if family == "smollm3":
        unrotated = tuple(i for i in layers if i % 4 == 3)
    windows = tuple(spec.window(i) is not None for i in layers)
    if windows != tuple(types[i] == "sliding_attention" if types else False for i in layers):
        where = "every sixth layer without one" if types else "none"
        raise ExportError(f"--gguf: sliding windows: llama.cpp has {where} in this family, this model has others")
    if spec.unrotated_layers != unrotated:
        raise ExportError("--gguf: llama.cpp leaves every fourth layer of this family unrotated, this model others")
    if spec.activation != activation:
        raise ExportError(f"--gguf: llama.cpp computes this family with {activation} only, not with {spec.activation}")
    if family != "granite" and not math.isclose(spec.attention_scale, scale, rel_tol=1e-6):
        raise ExportError(f"--gguf: llama.cpp scales scores of this family by {scale:g}, not by {spec.attention_scale}")


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, value: torch.Tensor, dtype: str, source: str, spec: ModelSpec,
    point: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    family, part = FAMILIES[spec.family], name.split(".")[-2]

    def placed(rows: torch.Tensor) -> torch.Tensor:
        if not family.gguf_permutes or part not in ("attn_q", "attn_k"):
            return rows
        heads = spec.num_heads if part == "attn_q" else spec.num_kv_heads
        # llama.cpp rotates neighbouring channels where Hugging Face rotates the two halves.
        return rows.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(rows.shape)

    value = placed(value)
    if family.norm_offset and part.endswith("norm"):
        value = value.float() + family.norm_offset
    if (
        point is not None
        and can_hold(value)
        and (source in point["grids"] or "embed" not in source or spec.tie_word_embeddings)
    ):
        width, grid = point["width"], point["grids"].get(source)
        if grid is not None and width in AFFINE:
            kind = gguf.GGMLQuantizationType[AFFINE[width]]
            scale, minimum = (to_numpy(placed(to_torch(part))) for part in grid)
            writer.add_tensor(name, affine_blocks(to_numpy(value), (scale, minimum), width), raw_dtype=kind)
        else:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), q8), raw_dtype=q8)
        return
    if value.ndim == 1:  # llama.cpp wants vectors in float32
        writer.add_tensor(name, value.float().numpy())
        return
    raw = value.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()  # bytes: numpy has no bfloat16
    writer.add_tensor(name, raw.reshape(value.shape[0], -1), raw_dtype=_TYPES[dtype][0])


# Cut differently by every two ways of cutting text that llama.cpp has names for.
_PROBES = (
    "I'm SURE they'LL say 'tis 12 1234567 ½ ٣٤٥", "  a   b\t\tc \n\n d\r\ne ", "x=f(a_b, c.d); // +1,234.56 $9 ^~|`<>",
    "École ǅ CamelCase ABCdef McDonald's naïve", "你好，世界。カタ ひら 한국어 ㄱ 3个",
    "नमस्ते दुनिया สวัสดี مرحبا، ۔ बात।", "…—‘’ \u00a0\u2003\u3000x 🙂👩‍👩‍👧 e\u0301",
)  # fmt: skip


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], pre: str | None) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"--gguf: {folder} has no tokenizer.json")
    files = read_tokenizer_files(folder, num_rows=config["vocab_size"])
    tokenizer = json.loads(files.backend.to_str())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ExportError(f"--gguf writes byte-level BPE tokenizers, not {model['type']}")
    if model.get("byte_fallback") or "ByteLevel" not in json.dumps(tokenizer.get("pre_tokenizer")):
        raise ExportError(
            "--gguf writes byte-level BPE tokenizers, not sentencepiece's with byte fallback (Llama 2, Mistral): "
            "convert the folder with llama.cpp's script"
        )
    if tokenizer.get("normalizer"):
        raise ExportError(f"--gguf: llama.cpp has no normalizer like this tokenizer's: {tokenizer['normalizer']}")
    name = pre or _pre_tokenizer(files.backend, bool(model.get("ignore_merges")))
    if name not in BY_NAME:
        raise ExportError(f"--gguf-pre {name} is not known (known: {', '.join(BY_NAME)})")
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ExportError(f"--gguf: llama.cpp has no tokens like {added['content']!r}, which takes blanks along")
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    _add_special_tokens(writer, files, config)
    if files.templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in files.templates.items()])


def _add_special_tokens(writer: gguf.GGUFWriter, files: TokenizerFiles, config: dict[str, Any]) -> None:
    """What is put around every text, as the tokenizer does it; and what ends an answer."""
    before, after = put_around(files.backend)
    if len(before) > 1 or len(after) > 1:
        raise ExportError(f"--gguf: llama.cpp adds one token before and after a text; this tokenizer {before}, {after}")
    named = {key: _token_id(files, config, key) for key in ("bos", "pad", "unk")}
    bos = before[0] if before else named["bos"]
    if bos is not None:
        writer.add_bos_token_id(bos)
    ends = list(dict.fromkeys([*after, *_ends(files, config)]))
    if not ends:
        raise ExportError("--gguf: no token ends this model's answers (eos_token_id), and llama.cpp needs one")
    if len(ends) > 3:
        raise ExportError(f"--gguf: llama.cpp's files name up to three tokens that end an answer, not {len(ends)}")
    for end, add in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(end)
    for key, write in (("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):
        if (token := named[key]) is not None:
            write(token)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _token_id(files: TokenizerFiles, config: dict[str, Any], key: str) -> int | None:
    text = text_of(files.config.get(f"{key}_token"))
    value = files.backend.token_to_id(text) if text else config.get(f"{key}_token_id")
    return value if isinstance(value, int) and 0 <= value < config["vocab_size"] else None


def _ends(files: TokenizerFiles, config: dict[str, Any]) -> list[int]:
    """The tokenizer's own end first."""
    own = _token_id(files, config, "eos")
    rest = sorted(files.eos_token_ids - {own})
    return rest if own is None else [own, *rest]


def _pre_tokenizer(tokenizer: Tokenizer, ignores_merges: bool) -> str:
    """llama.cpp's name for how text is cut before BPE, recognised by what it does to some texts."""
    if tokenizer.pre_tokenizer is None:
        raise ExportError("--gguf: this tokenizer does not cut text before BPE, which llama.cpp has no name for")
    pieces = [tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in _PROBES]
    alike = [name for name, group in BY_NAME.items() if [cuts(group).pre_tokenize_str(t) for t in _PROBES] == pieces]
    # A name may stand for more than how text is cut.
    alike.sort(key=lambda name: BY_NAME[name].ignores_merges != ignores_merges)
    if not alike:
        raise ExportError("--gguf: how this tokenizer cuts text is not recognised: name it with --gguf-pre")
    return alike[0]


def _check_tokenizer(folder: Path, file: Path) -> None:
    """ExportError if the file makes other tokens of some text than the folder does."""
    source = read_tokenizer_files(
        folder, num_rows=json.loads((folder / "config.json").read_text())["vocab_size"]
    ).backend
    written, _, _ = read_tokenizer(read_gguf(file))
    marked = [token.content for token in source.get_added_tokens_decoder().values()]
    for text in (*_PROBES, *(f"a {token} b{token}" for token in marked[:20])):
        ours, theirs = source.encode(text).ids, written.encode(text).ids
        if ours != theirs:
            raise ExportError(f"{file.name} makes other tokens of {text!r} than {folder}: another --gguf-pre may not")


def verify_gguf(folder: Path, file: Path, rounded: bool = False) -> None:
    """Read the file back as a model is imported, and compare every tensor. ExportError names the first that differs.

    `rounded`: matrices were written with fewer bits, and may differ by a hundredth of their rows' largest value.
    """
    _check_tokenizer(folder, file)
    with scratch_folder() as back:
        import_gguf(file, back, progress=False, dtype=torch.float32)  # every dtype written is exact in float32
        ours, theirs = _all_tensors(folder), _all_tensors(back)
        if ours.keys() != theirs.keys():
            raise ExportError(f"{file.name} lacks or adds tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
        for name, value in ours.items():
            mine, back_again = value.float().numpy(), theirs[name].float().numpy()
            most = 0.01 * np.abs(mine).max(axis=-1, keepdims=True) if rounded and mine.ndim == 2 else 0.0
            if mine.shape != back_again.shape or not (np.abs(mine - back_again) <= most).all():
                raise ExportError(f"{file.name}: the tensor {name} is not what was written")


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors
