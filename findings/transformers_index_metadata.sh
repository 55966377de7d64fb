#!/usr/bin/env bash
# transformers 5.23.0: a sharded checkpoint whose index has no `metadata` cannot be opened: KeyError: 'metadata', without a
# file name. huggingface_hub 2.4.0, from the same house, treats that key as optional and opens the same folder.
#
# `model.safetensors.index.json` maps tensors to files in `weight_map`; `metadata` holds sums for display (`total_size`) that no
# reader needs. Tools that split or rename shards leave it away. transformers subscripts it before it reads anything else, so
# from_pretrained ends with a bare KeyError; huggingface_hub's load_torch_model matches every key, and its hub metadata calls
# read the entry with a default. An empty `metadata` is enough for transformers.
#
# Seen on 30 November 2026, Python 3.11, x86-64, torch 2.13.0:
#   huggingface_hub: <All keys matched successfully>
#   transformers: KeyError: 'metadata'
#   transformers, with an empty metadata: loaded
# Exits 0 if the libraries behave so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 huggingface_hub==2.4.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

from huggingface_hub import load_torch_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
model = LlamaForCausalLM(config)
model.save_pretrained("sharded", max_shard_size="30KB")
path = Path("sharded/model.safetensors.index.json")
index = json.loads(path.read_text())
assert len(set(index["weight_map"].values())) > 1


def opened(**metadata: dict) -> str:
    path.write_text(json.dumps({"weight_map": index["weight_map"], **metadata}))
    try:
        LlamaForCausalLM.from_pretrained("sharded")
    except KeyError as error:
        return f"KeyError: {error}"
    return "loaded"


bare, empty = opened(), opened(metadata={})
path.write_text(json.dumps({"weight_map": index["weight_map"]}))
hub = str(load_torch_model(model, "sharded"))
print(f"huggingface_hub: {hub}\ntransformers: {bare}\ntransformers, with an empty metadata: {empty}")
sys.exit((hub, bare, empty) != ("<All keys matched successfully>", "KeyError: 'metadata'", "loaded"))
PYTHON
