"""Specs read from configs of both spellings; rotary frequencies against transformers."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model_store.spec import ModelSpec, SpecError
from tests.tiny_pairs import FAMILIES, make_model

LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_rotary_frequencies_are_those_of_transformers(scaling):
    theta = 50000.0
    new = ModelSpec.from_hf_config(LLAMA | {"rope_parameters": scaling | {"rope_theta": theta}})
    old = ModelSpec.from_hf_config(
        LLAMA | {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}
    )
    assert new == old
    inv_freq, factor = new.rope_inv_freq()
    shape = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**shape, rope_parameters=scaling | {"rope_theta": theta})
    if scaling["rope_type"] == "default":
        expected, expected_factor = 1.0 / theta ** (torch.arange(0, 16, 2).float() / 16), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_that_of_the_model(family, tmp_path):
    model = make_model(family, 3, seed=0, tied=False)
    model.save_pretrained(tmp_path)
    spec = ModelSpec.from_hf_config(AutoConfig.from_pretrained(tmp_path).to_dict())
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    assert per_layer == [spec.layer_parameters] * 3


def _layers(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported.*depend"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "factor": 2.0,
                }
            },
            "'longrope' is not supported",
        ),
        ({"hidden_act": "relu"}, "activation 'relu'"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_hf_config(LLAMA | change)


def test_a_sliding_window_limits_the_context():
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 1000}
    assert ModelSpec.from_hf_config(mistral).max_context == 1000
    assert ModelSpec.from_hf_config(mistral | {"sliding_window": None}).max_context == 4096
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 1000}
    assert ModelSpec.from_hf_config(qwen | {"use_sliding_window": False}).max_context == 4096
    assert ModelSpec.from_hf_config(qwen | {"use_sliding_window": True, "max_window_layers": 1}).max_context == 1000
