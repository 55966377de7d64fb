"""llama.cpp's own tokenizer, from the package that carries a prebuilt one; and the files that it is asked about.

`python -m tests.model_store.llama_cpp` writes what llama.cpp says into the reference that the tests compare with.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model_store.gguf_pretokenizers import BY_NAME

_HERE = Path(__file__).parent
# Of many scripts, with whatever makes tokenizers differ; and some with the special tokens of those that are made here.
TEXTS, MARKED = json.loads((_HERE / "tokenizer_texts.json").read_text()).values()
REFERENCE = _HERE / "tokenizer_reference.json.gz"
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
PLAIN = ["<|plain|>", "  "]  # user-defined


def write_vocabulary(path: Path, fields: dict[str, Any], hidden: int = 32) -> None:
    """A GGUF file of a tiny model with the tokenizer that `fields` (below tokenizer.ggml) describe."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, hidden // 2),
    ):  # fmt: skip
        add(value)
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    for name, shape in shapes(len(fields["tokens"]), hidden).items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(vocab: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Of the weights of a llama of one layer, with two heads of half its width."""
    square = {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    square |= {f"blk.0.ffn_{part}": (hidden, hidden) for part in ("gate", "up", "down")}
    norms = dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (hidden,))
    return {"token_embd": (vocab, hidden), **norms, **square}


def byte_level(merges: Sequence[str] | None, pre: str | None, **changes: Any) -> dict[str, Any]:
    """Fields of a byte-level tokenizer."""
    tokens = CONTROL + PLAIN + list(bytes_to_unicode().values())
    tokens += [
        token for token in dict.fromkeys(merge.replace(" ", "") for merge in merges or ()) if token not in tokens
    ]
    fields = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": _types(tokens), "merges": merges and list(merges),
        "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def sentencepiece(pieces: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Fields of a sentencepiece tokenizer; earlier pieces have higher scores."""
    tokens = CONTROL[:3] + [f"<0x{byte:02X}>" for byte in range(256)] + CONTROL[3:] + PLAIN
    types = [2] + [3] * 2 + [6] * 256 + [3] * 3 + [4] * 2
    num_special = len(tokens)
    tokens += [piece for piece in pieces if piece not in tokens]
    fields = {
        "model": "llama", "pre": "default", "tokens": tokens,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "token_type": types + [1] * (len(tokens) - num_special),
        "scores": [0.0] * num_special + [-float(i) for i in range(len(tokens) - num_special)],
    } | changes  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def _types(tokens: list[str]) -> list[int]:
    return [3] * len(CONTROL) + [4] * len(PLAIN) + [1] * (len(tokens) - len(CONTROL) - len(PLAIN))


def train() -> tuple[list[str], list[str]]:
    """Merges of bytes, and pieces of text, learned from the texts without cutting them: merges cross every boundary."""
    texts = [text for text in TEXTS if "\0" not in text for _ in range(2)]  # a vocabulary cannot hold a zero byte
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False, max_token_length=12))
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in json.loads(words.to_str())["model"]["merges"]
    ]
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.decoder = decoders.Replace("▁", " ")
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, show_progress=False, max_token_length=12))
    model = json.loads(pieces.to_str())["model"]
    learned = ["".join(merge) for merge in model["merges"]]
    return merges, [*learned, *sorted(set("".join(learned)))]  # every other letter is bytes


# name -> (model, changes)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {f"pre {name}": ("gpt2", {"pre": name}) for name in BY_NAME}
FORMS |= {
    "no pre": ("gpt2", {"pre": None}),
    "llama-bpe, add_bos false": ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}),
    "qwen2, add_bos true": ("gpt2", {"pre": "qwen2", "add_bos_token": True}),
    "gpt-2, add_eos true": ("gpt2", {"pre": "gpt-2", "add_eos_token": True}),
    "no types": ("gpt2", {"pre": "gpt-2", "token_type": None}),
    "sentencepiece": ("llama", {}),
    "sentencepiece, no prefix": ("llama", {"add_space_prefix": False}),
    "sentencepiece, no bos": ("llama", {"add_bos_token": False}),
    "sentencepiece, eos": ("llama", {"add_eos_token": True}),
    "sentencepiece, defaults": ("llama", {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}),
}


def fields_of(name: str, merges: list[str], pieces: list[str]) -> dict[str, Any]:
    model, changes = FORMS[name]
    return byte_level(merges, **changes) if model == "gpt2" else sentencepiece(pieces, **changes)


class LlamaCpp:
    """A running llama.cpp server with one file. ImportError without the package."""

    def __init__(self, path: Path, context: int = 64) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.post("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]


def main() -> None:
    """Ask llama.cpp about every form and write what it says."""
    merges, pieces = train()
    texts = TEXTS + MARKED
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FORMS:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(path, fields_of(name, merges, pieces))
            server = LlamaCpp(path)
            answers[name] = [server.tokenize(text) for text in texts]
            del server
            print(name, sum(map(len, answers[name])), file=sys.stderr)
    content = {
        "made_with": "xllamacpp 2026.10.11549",
        "merges": merges,
        "pieces": pieces,
        "texts": texts,
        "ids": answers,
    }
    REFERENCE.write_bytes(gzip.compress(json.dumps(content, ensure_ascii=False).encode(), mtime=0))


if __name__ == "__main__":
    main()
