"""Low-rank students: expanded at load they equal the sum; untouched layers are the teacher's own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.arrays import BFLOAT16
from model_store.int8 import dense
from model_store.lowrank import LOW_RANK_FILE
from model_store.pair import PairError, open_pair
from model_store.weight_form import WeightForm
from model_store.weights import WeightError
from tests.tiny_pairs import KEPT, make_model

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RANK = 3


def write_student(folder, teacher, *, quantise: bool = False) -> dict[str, torch.Tensor]:
    """A low-rank student of KEPT whose last layer is untouched; returns its full tensors by Llama name."""
    weights = load_file(teacher / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    stored, full = {}, {}
    for index, origin in enumerate(KEPT[:-1]):
        base, source = f"model.layers.{index}.", f"model.layers.{origin}."
        for name in LINEARS:
            weight = weights[f"{source}{name}.weight"]
            factors = []
            for side, shape in (("lora_A", (RANK, weight.shape[1])), ("lora_B", (weight.shape[0], RANK))):
                value = torch.randn(shape, generator=generator) * 0.1
                if quantise:
                    scale = value.abs().amax(dim=1) / 127
                    value = (value / scale[:, None]).round().to(torch.int8)
                    stored[f"{base}{name}.{side}_scale"] = scale
                    factors.append(value.float() * scale[:, None])
                else:
                    factors.append(value)
                stored[f"{base}{name}.{side}"] = value
            full[f"{base}{name}.weight"] = weight + factors[1] @ factors[0]
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = torch.rand(64, generator=generator)
            stored[f"{base}{name}.weight"] = full[f"{base}{name}.weight"] = norm
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / LOW_RANK_FILE)
    (folder / "student_config.json").write_text(json.dumps({"copied_teacher_layers": list(KEPT)}))
    return full


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def teacher(request, tmp_path):
    make_model(request.param, 6, seed=1, tied=True).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("quantise", [False, True])
def test_expanded_layers_are_the_sum(teacher, tmp_path, quantise):
    full = write_student(tmp_path / "student", teacher, quantise=quantise)
    pair = open_pair(teacher, tmp_path / "student")
    loaded = pair.load(WeightForm(torch.float32)).in_torch()
    kept = pair.load(WeightForm(torch.float32, True)).in_torch()
    assert 6 not in kept.layers and kept.layers[9] is kept.layers[5]
    for index in range(3):
        layer, base = loaded.layers[6 + index], f"model.layers.{index}."
        expected = torch.cat([full[f"{base}self_attn.{name}_proj.weight"] for name in "qkv"])
        torch.testing.assert_close(layer.qkv_weight, expected)
        expected = torch.cat([full[f"{base}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        torch.testing.assert_close(layer.up_weight, expected)
        torch.testing.assert_close(layer.down_weight, full[f"{base}mlp.down_proj.weight"])
        assert torch.equal(layer.mlp_norm_weight, full[f"{base}post_attention_layernorm.weight"])
        origin = loaded.layers[KEPT[index]]
        for name in ("qkv_bias", "q_norm_weight"):  # not part of the difference
            ours, theirs = getattr(layer, name), getattr(origin, name)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
        # The factors give the same result unexpanded: base @ x + b @ (a @ x).
        delta, x = kept.low_rank[6 + index], torch.randn(4, 64)
        assert delta.base == KEPT[index]
        out = x @ origin.qkv_weight.T
        for term in delta.terms["qkv"]:
            a, b = dense(term.a, torch.float32), dense(term.b, torch.float32)
            out[:, term.start : term.stop] += x @ a.T @ b.T
        torch.testing.assert_close(out, x @ layer.qkv_weight.T, rtol=1e-4, atol=1e-4)


def test_untouched_layers_and_ends_are_shared(teacher, tmp_path):
    write_student(tmp_path / "student", teacher)
    pair = open_pair(teacher, tmp_path / "student")
    loaded = pair.load(WeightForm(torch.bfloat16))
    assert loaded.layers[9] is loaded.layers[5] and loaded.ends["student"] is loaded.ends["teacher"]
    assert not loaded.low_rank
    assert loaded.num_bytes() == pair.union_bytes(pair.elasticity.sizes, WeightForm(torch.bfloat16))
    kept = pair.load(WeightForm(torch.bfloat16, True))
    assert kept.num_bytes() == pair.union_bytes(pair.elasticity.sizes, WeightForm(torch.bfloat16, low_rank=True))
    exact = pair.load(WeightForm(torch.float32))
    for layer in loaded.layers:  # rounded once, from the float32 sum
        for ours, theirs in zip(loaded.layers[layer].tensors(), exact.layers[layer].tensors(), strict=True):
            assert np.array_equal(ours, theirs.astype(BFLOAT16))
    small = pair.load(
        WeightForm(torch.float32), memory_budget=pair.union_bytes(pair.elasticity.sizes[:1], WeightForm(torch.float32))
    )
    assert small.sizes == (4,) and set(small.layers) == {6, 7, 8, 9}
    need = pair.union_bytes(pair.elasticity.sizes[:1], WeightForm(torch.float32, low_rank=True))
    small = pair.load(WeightForm(torch.float32, low_rank=True), memory_budget=need)
    assert small.sizes == (4,) and set(small.layers) == {0, 2, 4, 5, 9} and small.num_bytes() == need


def test_files_that_do_not_fit_are_refused(teacher, tmp_path):
    student = tmp_path / "student"
    write_student(student, teacher)
    stored = load_file(student / LOW_RANK_FILE)
    name = "model.layers.1.mlp.down_proj.lora_B"
    for change, message in (
        (stored | {"model.layers.7.input_layernorm.weight": torch.ones(64)}, "no student layer uses: model.layers.7"),
        (stored | {"model.layers.1.mlp.down_proj.weight": torch.ones(64)}, "no student layer uses"),
        ({key: value for key, value in stored.items() if key != name}, "lacks the tensor"),
        (stored | {name: stored[name][:-1].clone()}, r"lora_B is \[63, 3\], the teacher.s \[64, 3\]"),
        (stored | {f"{name}_scale": torch.ones(9)}, r"lora_B_scale is \[9\], not one for each of 64"),
        (stored | {name: stored[name].to(torch.int8)}, "lacks the tensor '.*lora_B_scale'"),
        (stored | {name: stored[name][:, :-1].clone()}, r"lora_B is \[64, 2\], the teacher.s \[64, 3\]"),
    ):
        save_file(change, student / LOW_RANK_FILE)
        with pytest.raises(WeightError, match=message):
            open_pair(teacher, student).load(WeightForm(torch.float32))


def test_other_families_are_refused(tmp_path):
    make_model("gpt2", 6, seed=1).save_pretrained(tmp_path / "gpt2")
    make_model("llama", 6, seed=1).save_pretrained(tmp_path / "teacher")
    write_student(tmp_path / "student", tmp_path / "teacher")
    with pytest.raises(PairError, match="low-rank students of family gpt2"):
        open_pair(tmp_path / "gpt2", tmp_path / "student")
