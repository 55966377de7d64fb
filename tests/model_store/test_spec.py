"""Specs read from configs of both spellings; rotary frequencies against transformers; who is not served, and why."""

import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model_store.families import FAMILIES as SERVED
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
    torch.testing.assert_close(torch.from_numpy(inv_freq), expected, rtol=1e-6, atol=0)
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
        ({"hidden_act": "relu"}, "activation 'relu'"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_hf_config(LLAMA | change)


def windows(config):
    spec = ModelSpec.from_hf_config(config)
    assert spec.max_context == 4096
    return [spec.window(layer) for layer in range(spec.num_layers)]


def test_which_layers_have_a_window():
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 1000}
    assert windows(mistral) == [1000, 1000] and windows(mistral | {"sliding_window": None}) == [None, None]
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 1000}
    assert windows(qwen | {"use_sliding_window": False}) == [None, None]
    assert windows(qwen | {"use_sliding_window": True, "max_window_layers": 1}) == [None, 1000]


def test_longrope_is_exact_up_to_the_original_length():
    phi = LLAMA | {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
                   "pad_token_id": 0, "partial_rotary_factor": 0.75}  # fmt: skip
    factors = {"short_factor": [1.0 + i for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}
    spec = ModelSpec.from_hf_config(phi | {"rope_scaling": {"type": "longrope"} | factors})
    assert (spec.max_context, spec.rotary_dim) == (4096, 12)
    assert spec.rope_factor == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    expected = 1 / (torch.tensor(factors["short_factor"]) * 10000.0 ** (torch.arange(6) / 6))
    torch.testing.assert_close(torch.from_numpy(spec.rope_inv_freq()[0]), expected)


# What the reasons for models of others must say.
REASONS = {
    "mixture of experts": ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "dbrx", "granitemoe", "phimoe", "glm4_moe"],
    "recurrence or a linear": ["mamba", "falcon_h1", "qwen3_next", "lfm2", "rwkv", "bamba", "recurrent_gemma"],
    "multi-modal": ["gemma3", "llama4", "mllama", "phi4_multimodal"],
    "soft-capping": ["gemma2"],
    "latent attention": ["minicpm3"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_families_that_are_not_served_are_refused_with_the_reason(reason):
    for family in REASONS[reason]:
        with pytest.raises(SpecError, match=f"'{family}' is not supported: .*{reason}"):
            ModelSpec.from_hf_config(default_config(family))


def default_config(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family]().to_dict()


def test_no_family_of_transformers_is_taken_for_another():
    """Every causal language model that the library knows, by its default config: served, or refused in a sentence."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family in SERVED:
            assert ModelSpec.from_hf_config(default_config(family)).family == family
            continue
        with pytest.raises(SpecError, match=f"model family '{family}' is not supported: [a-z ]+"):
            ModelSpec.from_hf_config({"model_type": family})
