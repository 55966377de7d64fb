"""The common layout, against each family's own modules; and the ways a checkpoint can be spelled or be broken."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model_store.arrays import BFLOAT16, in_torch
from model_store.weight_form import WeightForm
from model_store.weights import Checkpoint, WeightError, weight_files
from tests.tiny_pairs import FAMILIES, VOCAB, layers_of, make_model


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, 2, seed=3)
    model.save_pretrained(folder)
    return model, folder


def project(layer, hidden: torch.Tensor, family: str) -> tuple[torch.Tensor, ...]:
    """q, k, v [T, heads, D] by the family's own module."""
    if family == "gpt2":
        q, k, v = layer.attn.c_attn(hidden).chunk(3, dim=-1)
    elif family == "gpt_neox":
        heads = hidden.shape[-1] // layer.attention.head_size
        fused = layer.attention.query_key_value(hidden).view(len(hidden), heads, 3 * layer.attention.head_size)
        return fused.chunk(3, dim=-1)
    elif family == "phi3":
        size = layer.self_attn.qkv_proj.out_features // 8  # four query and two KV heads
        q, k, v = layer.self_attn.qkv_proj(hidden).split((4 * size, 2 * size, 2 * size), dim=-1)
    else:
        q, k, v = (getattr(layer.self_attn, f"{name}_proj")(hidden) for name in "qkv")
    return q, k, v


def test_layers_compute_what_the_family_computes(saved):
    model, folder = saved
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    hidden = torch.randn(5, spec.hidden_size)
    for index, layer in enumerate(layers_of(model)):
        loaded = checkpoint.layer(index, WeightForm(torch.float32))
        assert all(t.flags.c_contiguous for t in loaded.tensors())
        weights = in_torch(loaded)
        fused = F.linear(hidden, weights.qkv_weight, weights.qkv_bias)
        parts = fused.split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        for ours, theirs in zip(parts, project(layer, hidden, spec.family), strict=True):
            torch.testing.assert_close(ours, theirs.reshape(5, -1), rtol=1e-5, atol=1e-5)
    ends = in_torch(checkpoint.ends(WeightForm(torch.float32)))
    assert torch.equal(ends.embed, model.get_input_embeddings().weight)
    assert torch.equal(ends.head, model.get_output_embeddings().weight)
    assert sum(t.numel() for t in {id(t): t for t in ends.tensors()}.values()) + 2 * spec.layer_parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_a_tied_head_is_the_embedding_itself(tmp_path):
    make_model("llama", 1, seed=0, tied=True).save_pretrained(tmp_path)
    ends = Checkpoint(tmp_path).ends(WeightForm(torch.bfloat16))
    assert ends.head is ends.embed and ends.embed.dtype == BFLOAT16


@pytest.mark.parametrize("family, prefix", [("llama", "model."), ("gpt_neox", "gpt_neox."), ("gpt2", "transformer.")])
def test_base_model_names_are_accepted(tmp_path, family, prefix):
    make_model(family, 1, seed=0, tied=True).save_pretrained(tmp_path)
    expected = Checkpoint(tmp_path).layer(0, WeightForm(torch.float32))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    # Buffers of old checkpoints are not weights.
    tensors |= {"h.0.attn.bias": torch.ones(1), "layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for ours, theirs in zip(checkpoint.layer(0, WeightForm(torch.float32)).tensors(), expected.tensors(), strict=True):
        assert np.array_equal(ours, theirs)


def test_shards_with_an_index(tmp_path):
    model = make_model("qwen3", 3, seed=0)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(weight_files(tmp_path / "shards")) > 1
    for index in range(3):
        whole, shards = (tmp_path / name for name in ("whole", "shards"))
        one, other = (Checkpoint(folder).layer(index, WeightForm(torch.float32)) for folder in (whole, shards))
        assert all(np.array_equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
    weight_files(tmp_path / "shards")[0].unlink()
    with pytest.raises(WeightError, match="which its index names"):
        Checkpoint(tmp_path / "shards")


def test_broken_checkpoints_say_what_is_wrong(tmp_path):
    with pytest.raises(WeightError, match="has no config"):
        Checkpoint(tmp_path)
    make_model("llama", 1, seed=0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)

    save_file({k: v for k, v in tensors.items() if "down_proj" not in k}, file)
    with pytest.raises(WeightError, match=r"lacks the tensor 'layers\.0\.mlp\.down_proj\.weight'"):
        Checkpoint(tmp_path).layer(0, WeightForm(torch.float32))

    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with pytest.raises(WeightError, match=r"1 tensors that its .* no place for: layers\.0\.self_attn\.q_proj.bias"):
        Checkpoint(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))
    save_file(tensors, file)
    with pytest.raises(WeightError, match=r"gate_proj.weight is \[96, 64\], its config says \[90, 64\]"):
        Checkpoint(tmp_path).layer(0, WeightForm(torch.float32))

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightError, match="not a readable safetensors"):
        Checkpoint(tmp_path)

    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="is a pickle and is never read"):
        Checkpoint(tmp_path)


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    make_model("gpt2", 1, seed=0).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    layer, ends = checkpoint.layer(0, WeightForm(torch.float32)), checkpoint.ends(WeightForm(torch.float32))
    assert ends.embed.shape == (VOCAB, 64)
    assert all(t.base is None for t in (*layer.tensors(), *ends.tensors()))  # no view of something larger
