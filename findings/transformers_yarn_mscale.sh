#!/usr/bin/env bash
# transformers 5.23.0: YaRN's `mscale` counts only where `mscale_all_dim` is given and not zero; alone it is dropped in silence.
#
# In DeepSeek's own modelling code the rotary embedding is scaled by m(factor, mscale) / m(factor, mscale_all_dim), with
# m(s, k) = 0.1 k ln s + 1, and `mscale_all_dim` is 0 where a config does not name it, so that the lower half is 1.
# transformers takes the quotient only if both keys are truthy and m(factor, 1) otherwise: `mscale` of 0.5 and of 0.707
# give the same scale as no `mscale` at all. A config with `mscale` alone, or with an explicit `mscale_all_dim` of 0,
# has other logits than in the code that the keys come from.
#
# Seen on 30 November 2026, Python 3.11, x86-64, torch 2.13.0 (factor 40; by DeepSeek's formula in brackets):
#   {}: 1.3689
#   {'mscale': 0.5}: 1.3689 (1.1844)
#   {'mscale': 0.5, 'mscale_all_dim': 0.0}: 1.3689 (1.1844)
#   {'mscale': 0.5, 'mscale_all_dim': 1.0}: 0.8653 (0.8653)
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def m(k: float) -> float:
    return 0.1 * k * math.log(40.0) + 1.0


def scale(**keys: float) -> float:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0, **keys
        },
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]


cases = [{}, {"mscale": 0.5}, {"mscale": 0.5, "mscale_all_dim": 0.0}, {"mscale": 0.5, "mscale_all_dim": 1.0}]
found = [scale(**case) for case in cases]
for case, value in zip(cases, found, strict=True):
    original = f" ({m(case['mscale']) / m(case.get('mscale_all_dim', 0.0)):.4f})" if case else ""
    print(f"{case}: {value:.4f}{original}")
expected = [m(1.0), m(1.0), m(1.0), m(0.5) / m(1.0)]
sys.exit(not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, expected, strict=True)))
PYTHON
