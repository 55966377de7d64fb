#!/usr/bin/env bash
# transformers 5.23.0: for Llama, `partial_rotary_factor` is not read with rope type "default", and breaks the model with "linear".
#
# modeling_rope_utils.py reads `partial_rotary_factor` for every rope type, and documents it. LlamaRotaryEmbedding has a
# "default" of its own that does not: a config that rotates half of each head is rotated whole, without a word. The same
# config with rope type "linear" and factor 1.0 (which should change nothing) gets half as many frequencies, and the
# forward pass raises, for Llama's apply_rotary_pos_emb knows no part that passes through. So the key is ignored or
# fatal by the rope type beside it, and never does what it says. A reader of checkpoints that
# honours the key for a Llama disagrees with transformers on "default".
#
# Seen on 30 November 2026, Python 3.11, x86-64, torch 2.13.0:
#   default: 8 frequencies for heads of 16, forward pass ok
#   linear: 4 frequencies for heads of 16, RuntimeError: The size of tensor a (16) must match the size of tensor b (8)
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

found = {}
for name, rope in {"default": {}, "linear": {"factor": 1.0}}.items():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": name, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **rope},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    try:
        model(torch.arange(8)[None])
        outcome = "forward pass ok"
    except RuntimeError as error:
        outcome = f"RuntimeError: {str(error).split(' at ')[0]}"
    found[name] = len(model.model.rotary_emb.inv_freq), outcome.split(":")[0]
    print(f"{name}: {found[name][0]} frequencies for heads of 16, {outcome}")
sys.exit(found != {"default": (8, "forward pass ok"), "linear": (4, "RuntimeError")})
PYTHON
