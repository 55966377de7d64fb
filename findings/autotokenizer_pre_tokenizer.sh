#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer drops the pre-tokenizer of tokenizer.json where tokenizer_config.json names GPT2Tokenizer.
#
# A tokenizer.json that cuts every digit apart (Digits, then ByteLevel) is read by the tokenizers library and by
# AutoTokenizer with `tokenizer_class` PreTrainedTokenizerFast as it says. With `tokenizer_class` GPT2Tokenizer or
# GPTNeoXTokenizer AutoTokenizer builds that class's own pre-tokenizer instead, and merges of digits apply: other ids for
# every number, without a warning. Published models have this pair of files (SmolLM2 was trained with single digits and
# names GPT2Tokenizer). A server that reads tokenizer.json and a script that uses AutoTokenizer then disagree.
#
# Seen on 30 November 2026, Python 3.11, x86-64, no torch installed:
#   tokenizers: ['a', 'Ġ', '1', '2', '3']
#   PreTrainedTokenizerFast: ['a', 'Ġ', '1', '2', '3']
#   GPT2Tokenizer: ['a', 'Ġ', '123']
#   GPTNeoXTokenizer: ['a', 'Ġ', '123']
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "<|endoftext|>"]
tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [("1", "2"), ("12", "3")]))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()


def tokens(tokenizer_class: str) -> list[str]:
    model = Path(sys.argv[1]) / tokenizer_class
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(model)
    return loaded.convert_ids_to_tokens(loaded("a 123")["input_ids"])


single, merged = ["a", "Ġ", "1", "2", "3"], ["a", "Ġ", "123"]
print(f"tokenizers: {tokenizer.encode('a 123').tokens}")
found = {name: tokens(name) for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizer")}
for name, value in found.items():
    print(f"{name}: {value}")
assert tokenizer.encode("a 123").tokens == single
assert found["PreTrainedTokenizerFast"] == single, "changed: the generic class"
assert found["GPT2Tokenizer"] == merged and found["GPTNeoXTokenizer"] == merged, "changed: the classes of a family"
PYTHON
