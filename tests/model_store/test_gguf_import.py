"""GGUF files written from tiny models come back as those models."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_store import gguf_import
from model_store.evaluate import store_quality
from model_store.evaluate.orders import adopt
from model_store.gguf_import import import_gguf
from model_store.int8 import dense, is_plain
from model_store.pair import PairError, open_pair
from model_store.sources import import_gguf_file, resolve
from model_store.spec import ModelSpec
from model_store.store import StoreError
from model_store.weight_form import Storage, WeightForm
from model_store.weights import MATRICES, Checkpoint
from tests import tiny_pairs
from tests.model_store.gguf_files import ARCHITECTURES, TOKENS, write_gguf


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_pairs, "VOCAB", len(TOKENS))
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))


FLOAT32 = WeightForm(torch.float32)


def plain_llama(tied: bool = True):
    scaled = tiny_pairs.make_model("llama", 2, seed=4, tied=tied)
    config = copy.deepcopy(scaled.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(scaled.state_dict())
    return model


def as_llama_cpp_has_it(family: str, tied: bool):
    """A model of the family without what llama.cpp's files do not say."""
    if family == "llama":
        return plain_llama(tied)
    changes = {
        "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1], "use_sliding_window": False, "sliding_window": None,
                    "layer_types": ["full_attention"] * 5},
        "gemma3_text": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "query_pre_attn_scalar": 24},
    }.get(family, {})  # fmt: skip
    layers = len(changes["layer_types"]) if changes else 2
    model = tiny_pairs.make_model(family, layers, seed=4, tied=tied)
    for name, value in changes.items():
        setattr(model.config, name, value)
    again = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_survives_the_round_trip(family, tied, tmp_path):
    model = as_llama_cpp_has_it(family, tied)
    write_gguf(model, tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    imported, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in model.state_dict().items():
        if family == "gemma3_text" and name.endswith("norm.weight"):
            value = (value + 1) - 1  # as the file has it
        assert torch.equal(imported.state_dict()[name], value.bfloat16().float()), name
    expected = ModelSpec.from_hf_config(json.loads(model.config.to_json_string(use_diff=False)))
    assert Checkpoint(tmp_path / "out").spec == expected
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(imported.state_dict()[name])
        ids = torch.randint(0, 200, (1, 20))
        torch.testing.assert_close(imported(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_quantised_files_are_dequantised(tmp_path):
    model = plain_llama()
    write_gguf(model, tmp_path / "tiny.gguf", quantise="Q8_0")
    (tmp_path / "out").mkdir()
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind)).bfloat16())


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path):
    model = plain_llama()
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    spec = ModelSpec.from_hf_config(model.config.to_dict() | {"rope_parameters": scaling})
    plain = ModelSpec.from_hf_config(model.config.to_dict())
    factors = plain.rope_inv_freq()[0] / spec.rope_inv_freq()[0]
    write_gguf(model, tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors})
    path = resolve(tmp_path / "tiny.gguf")
    assert Checkpoint(path).spec.rope_scaling == {k: v for k, v in scaling.items() if k != "rope_theta"}

    write_gguf(model, tmp_path / "odd.gguf", extra={"rope_freqs.weight": np.linspace(1, 3, 8)})
    with pytest.raises(StoreError, match="not those of Llama 3"):
        resolve(tmp_path / "odd.gguf")


def test_a_tensor_without_a_place_is_refused_and_nothing_is_left(tmp_path):
    write_gguf(plain_llama(), tmp_path / "odd.gguf", extra={"blk.0.ffn_gate_exps.weight": np.ones((2, 32))})
    with pytest.raises(StoreError, match=r"a tensor that this family does not: blk\.0\.ffn_gate_exps"):
        resolve(tmp_path / "odd.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all")
    with pytest.raises(StoreError, match="not a readable GGUF"):
        resolve(tmp_path / "text.gguf")
    assert not list((tmp_path / "store").glob("models/*")) and not [
        path for path in (tmp_path / "store" / "incoming").iterdir() if path.is_dir()
    ]


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    model = plain_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    whole = import_gguf_file(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_import, "_MAX_SHARD_BYTES", 60_000)
    (tmp_path / "out").mkdir()
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    one, other = Checkpoint(whole), Checkpoint(tmp_path / "out")
    for a, b in zip(
        one.layer(1, FLOAT32).tensors(),
        other.layer(1, FLOAT32).tensors(),
        strict=True,
    ):
        assert np.array_equal(a, b)


def test_the_tokenizer_and_its_template(tmp_path):
    write_gguf(plain_llama(), tmp_path / "tiny.gguf")
    path = resolve(tmp_path / "tiny.gguf")
    assert resolve(tmp_path / "tiny.gguf") == path  # imported once
    tokenizer = AutoTokenizer.from_pretrained(path)
    for text in ("the 12 the\n\n", "naïve — 你好 👩‍👩‍👧 \x00", "<|im_start|>user\nhi<|im_end|>", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("  the 12").input_ids)
    assert pieces == ["Ġ", "Ġthe", "Ġ", "1", "2"]  # the merge "12" is never reached: digits stand alone
    assert tokenizer("<|im_end|>").input_ids == [2] and tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 1
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]  # llama.cpp ends at both
    written = (path / "config.json").read_text() + (path / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in written


def test_a_pair_of_gguf_files(tmp_path):
    write_gguf(tiny_pairs.make_model("qwen3", 6, seed=1), tmp_path / "teacher.gguf")
    write_gguf(tiny_pairs.make_model("qwen3", 4, seed=2), tmp_path / "student.gguf")
    with pytest.raises(PairError, match="which teacher layers"):
        open_pair(tmp_path / "teacher.gguf", tmp_path / "student.gguf")
    (tmp_path / "student_config.json").write_text('{"copied_teacher_layers": [0, 2, 4, 5]}')
    pair = open_pair(tmp_path / "teacher.gguf", tmp_path / "student.gguf")
    assert pair.load(WeightForm(torch.bfloat16)).sizes == (4, 5, 6)
    # What is found out about it is written where it is read: beside the file, not into the converted copy.
    other = open_pair(tmp_path / "teacher.gguf", tmp_path / "student.gguf", patch_order="first_to_last")
    assert other.elasticity.thresholds != pair.elasticity.thresholds
    adopt(other, "first_to_last")
    store_quality(other, {4: {"kl": 0.5}}, {})
    reopened = open_pair(tmp_path / "teacher.gguf", tmp_path / "student.gguf")
    assert reopened.elasticity.thresholds == other.elasticity.thresholds and reopened.quality == {4: {"kl": 0.5}}


# Types of the parts of a file: fused tensors of several types, one that is kept dequantised, no codes for the output.
MIXED = {
    "token_embd": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_qkv": "Q4_0",
    "attn_output": "Q4_0", "ffn_gate": "Q5_1", "ffn_up": "Q5_1",
}  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_codes_are_kept_and_mean_what_was_dequantised(family, tmp_path):
    model = plain_llama() if family == "llama" else tiny_pairs.make_model(family, 2, seed=4, tied=True)
    write_gguf(model, tmp_path / "tiny.gguf", quantise=MIXED)
    (tmp_path / "out").mkdir()
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=False, dtype=torch.float32)
    checkpoint = Checkpoint(tmp_path / "out")
    codes = WeightForm(torch.float32, storage=Storage.CODES)
    for index in range(2):
        plain, coded = checkpoint.layer(index, FLOAT32), checkpoint.layer(index, codes)
        for name in MATRICES:
            assert np.array_equal(dense(getattr(coded, name), np.float32), getattr(plain, name)), name
        kinds = {name: getattr(coded, name).kind for name in MATRICES if name != "down_weight"}
        assert kinds["qkv_weight"] == ("Q4_0" if family in ("gpt2", "phi3") else "Q4_1 + Q5_0")
        assert is_plain(coded.down_weight)
        shapes = coded.tensors()
        assert checkpoint.layer_bytes(index, 4) == sum(t.nbytes for t in shapes if t.ndim == 2)
    ends, expected = checkpoint.ends(codes), checkpoint.ends(FLOAT32)
    assert np.array_equal(dense(ends.embed, np.float32), expected.embed) and ends.head is ends.embed
    assert ends.embed.kind == "Q8_0"
