"""Exports load in transformers and compute what the pair computes; GGUF reads back equal."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model_store.export import ExportError, export_size, parse_size, verify
from model_store.export_gguf import verify_gguf, write_gguf
from model_store.pair import open_pair
from server.cli import main
from tests.api import tiny
from tests.tiny_pairs import FAMILIES, Oracle, make_pair


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_sizes_equal_the_oracle(family, tmp_path):
    teacher, student = make_pair(tmp_path, family)
    pair = open_pair(teacher, student)
    oracle = Oracle(teacher, student)
    ids = [3, 7, 11, 90, 4]
    for size in pair.elasticity.sizes:
        folder = tmp_path / f"{size}"
        export_size(pair, size, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = oracle.model(pair.elasticity, size)
        with torch.no_grad():
            for parameter in ours.parameters():  # not .to(bfloat16): buffers such as rotary frequencies stay exact
                parameter.copy_(parameter.bfloat16().float())
            torch.testing.assert_close(
                model(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4
            )
        assert model.config.num_hidden_layers == size


def test_verify_and_model_card(tmp_path):
    pair = open_pair(*make_pair(tmp_path))
    export_size(pair, 5, tmp_path / "out")
    assert verify(pair, 5, tmp_path / "out") < 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 of the 6 layers" in card and "S0" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_hidden_layers"] = 4  # a damaged export is noticed
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="logits differ"):
        verify(pair, 5, tmp_path / "out")


def test_size_must_exist(tmp_path):
    pair = open_pair(*make_pair(tmp_path))
    assert parse_size("5L", pair) == parse_size(" 5 ", pair) == 5
    for text in ("7L", "big", ""):
        with pytest.raises(ExportError, match="4L to 6L"):
            parse_size(text, pair)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_reads_back_equal(family, dtype, tmp_path):
    teacher, student = make_pair(tmp_path, family, tied=True)
    for folder in (teacher, student):
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        (folder / "config.json").write_text(json.dumps(config))
    pair = open_pair(teacher, student)
    export_size(pair, 6, tmp_path / "out", dtype)
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        write_gguf(tmp_path / "out", tmp_path / "model.gguf")
    _write_tokenizer(tmp_path / "out", pair.spec.vocab_size)
    write_gguf(tmp_path / "out", tmp_path / "model.gguf")
    verify_gguf(tmp_path / "out", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    assert matrices == {{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]}
    assert reader.fields["general.file_type"].contents() == {"bfloat16": 32, "float16": 1, "float32": 0}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_command_writes_both_forms_in_the_dtype_asked_for(dtype, tmp_path, capsys):
    teacher, student = tiny.make_pair(tmp_path)
    names = ["--teacher", str(teacher), "--student", str(student), "--size", "5L", "--dtype", dtype]
    assert main(["export", *names, "--out", str(tmp_path / "out"), "--gguf", str(tmp_path / "out.gguf")]) == 0
    assert "logits equal" in (said := capsys.readouterr().out) and "read back equal" in said
    own = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in own.values()} == {getattr(torch, dtype)}


def test_a_weight_beyond_float16_is_refused(tmp_path):
    teacher, student = make_pair(tmp_path)
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"][3, 4] = 1e5
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"--dtype float16: model.layers.5.mlp.down_proj.weight"):
        export_size(open_pair(teacher, student), 6, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def _write_tokenizer(folder, size):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*list(bytes_to_unicode().values())[: size - 1], "ab"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def test_gguf_refuses_other_families(tmp_path):
    pair = open_pair(*make_pair(tmp_path, "gpt2"))
    export_size(pair, 6, tmp_path / "out")
    with pytest.raises(ExportError, match="not gpt2"):
        write_gguf(tmp_path / "out", tmp_path / "model.gguf")
