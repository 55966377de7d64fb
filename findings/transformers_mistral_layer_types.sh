#!/usr/bin/env bash
# transformers 5.23.0: AutoModelForCausalLM and MistralForCausalLM make different models of one Mistral folder with `layer_types`.
#
# The folder's config.json says model_type "mistral", sliding_window 4, and full attention in every layer by
# `layer_types`. AutoConfig reads that as a MinistralConfig, and AutoModelForCausalLM makes a MinistralForCausalLM, whose
# layers follow the list. The class that config.json names in `architectures`, MistralForCausalLM, loads the same folder
# with a hint in the log, ignores the list and gives every layer the window. Within the window the logits are equal, so
# a test on short prompts sees nothing; behind it they part.
#
# Seen on 30 November 2026, Python 3.11, x86-64, torch 2.13.0:
#   architectures: ['MistralForCausalLM']
#   AutoModelForCausalLM: MinistralForCausalLM
#   logits within the window equal: True, behind it: False
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = MistralConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, sliding_window=4, initializer_range=0.5,
)  # fmt: skip
MistralForCausalLM(config).save_pretrained(folder)
written = json.loads((folder / "config.json").read_text())
written["layer_types"] = ["full_attention"] * 2
(folder / "config.json").write_text(json.dumps(written))

loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
named = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    one, other = (model(torch.arange(16)[None]).logits[0] for model in (loaded, named))
within, behind = (torch.allclose(one[part], other[part], atol=1e-4) for part in (slice(0, 4), slice(8, 16)))
print(f"architectures: {written['architectures']}\nAutoModelForCausalLM: {type(loaded).__name__}")
print(f"logits within the window equal: {within}, behind it: {behind}")
found = written["architectures"], type(loaded).__name__, within, behind
sys.exit(found != (["MistralForCausalLM"], "MinistralForCausalLM", True, False))
PYTHON
