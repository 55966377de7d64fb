"""Pairs whose sides were saved by different hands: what interlocks by meaning, and what is measured and exported."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.distill.from_pair import lend_size, load_elastic
from model_store.distill.write import freeze_vectors, write_config, write_low_rank
from model_store.export import ExportError, export_size, verify
from model_store.export_gguf import write_gguf
from model_store.lowrank import LOW_RANK_FILE
from model_store.pair import PairError, open_pair
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.engine.engine import Engine
from tests.model.test_oracle import all_logprobs, make_request, run
from tests.model_store.test_oddities import config, old, own_head, rope, without
from tests.tiny_pairs import KEPT, VOCAB, Oracle, make_model, make_pair

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
IDS = torch.randint(VOCAB, (48,), generator=torch.Generator().manual_seed(1)).tolist()
SAME = [
    (old(**YARN), rope(**YARN)),
    (old(type="yarn", factor=4.0, original_max_position_embeddings=64), rope(**YARN, beta_fast=32, beta_slow=1.0)),
    (rope(**YARN), rope(**YARN, attention_factor=None, finetuned=True)),
    (rope(**YARN), rope(**YARN, mscale=1.0, mscale_all_dim=None)),
    (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), rope(**YARN | {"factor": 4})),
    (old(type="linear", factor=2.0), old(rope_type="linear", factor=2.0)),
    (rope(rope_type="default"), rope(rope_type="linear", factor=1.0)),
    (without("rope_parameters"), without("rope_parameters", rope_scaling={"type": "default"}, rope_theta=10000)),
]


@pytest.mark.parametrize("teachers, students", SAME, ids=range(len(SAME)))
def test_the_same_angles_spelled_differently_interlock(teachers, students, tmp_path):
    teacher, student = make_pair(tmp_path, "qwen2")
    teachers(teacher), students(student)
    pair = open_pair(teacher, student)
    assert_served(pair, {6: teacher, 4: student})


@pytest.mark.parametrize(
    "students", [rope(**YARN, mscale=0.5, mscale_all_dim=1.0), rope(**YARN | {"factor": 8.0}), rope(rope_theta=5e5)]
)
def test_other_angles_do_not(students, tmp_path):
    teacher, student = make_pair(tmp_path, "qwen2")
    rope(**YARN)(teacher), students(student)
    with pytest.raises(PairError, match="their rotary angles differ"):
        open_pair(teacher, student)


@torch.no_grad()
def served(pair, size: int, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the last positions, as the server computes them."""
    settings = EngineConfig(max_model_len=len(ids) + 4, kv_cache_bytes=1 << 20, executor="torch")
    engine = Engine(pair.load(WeightForm(torch.float32)), settings)
    outputs = run(engine, [make_request("r", ids, size, max_tokens=1, logprobs=-1, prompt_logprobs=-1)], check=False)
    return all_logprobs(outputs["r"])


def assert_served(pair, folders, atol=1e-5):
    for size, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = model(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
        torch.testing.assert_close(served(pair, size, IDS), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("order", ["last_to_first", "first_to_last"])
@pytest.mark.parametrize("heads", ["tied", "untied", "student's own"])
def test_evaluate_measures_what_is_served(family, order, heads, tmp_path):
    teacher, student = make_pair(tmp_path, family, tied=heads != "untied")
    if heads == "student's own":
        own_head(student)
    pair = open_pair(teacher, student, patch_order=order)
    model = load_elastic(pair, torch.float32)
    for size in pair.elasticity.sizes:
        ours = served(pair, size, IDS)
        measured = model.size_logits(torch.tensor([IDS]), size)[0].log_softmax(-1)
        torch.testing.assert_close(measured, ours, rtol=0, atol=2e-5)
        with lend_size(model, size) as lent:
            lent_rows = lent(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
        torch.testing.assert_close(lent_rows, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("has_list", [True, False])
def test_layer_types_move_with_their_layers(family, has_list, tmp_path):
    """Beyond the window, against modules that keep what they were built with."""
    teacher, student = make_pair(tmp_path, family)
    for folder, first in ((teacher, 3), (student, 2)):
        without("layer_types", use_sliding_window=True, sliding_window=16, max_window_layers=first)(folder)
        if has_list:
            layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
            types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
            config(layer_types=types)(folder)
    pair, oracle = open_pair(teacher, student), Oracle(teacher, student)
    assert pair.spec.window(3) == 16 and pair.spec.window(0) is None
    for size in pair.elasticity.sizes:
        export_size(pair, size, tmp_path / f"{size}", "float32")
        assert verify(pair, size, tmp_path / f"{size}", dtype="float32") < 1e-3
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{size}", dtype=torch.float32)
        with torch.no_grad():
            found = model(torch.tensor([IDS]), use_cache=False).logits[0]
        torch.testing.assert_close(found, oracle.logits(pair.elasticity, size, IDS), rtol=1e-4, atol=1e-4)
        written = json.loads((tmp_path / f"{size}" / "config.json").read_text())
        first = written["layer_types"].index("sliding_attention")
        assert written["max_window_layers"] == first and len(written["layer_types"]) == size
    written["layer_types"] = ["full_attention"] * 6  # what the check is for
    (tmp_path / "6" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ExportError, match="logits differ"):
        verify(pair, 6, tmp_path / "6", dtype="float32")


def test_windows_that_no_config_can_say_are_refused(tmp_path):
    teacher, student = make_pair(tmp_path, "mistral")
    config(sliding_window=16)(teacher), config(sliding_window=32)(student)
    pair = open_pair(teacher, student)
    with pytest.raises(ExportError, match=r"windows of \[16, 32\]"):
        export_size(pair, 5, tmp_path / "out")
    for size, window in ((6, 16), (4, 32)):
        export_size(pair, size, tmp_path / f"{size}")
        assert json.loads((tmp_path / f"{size}" / "config.json").read_text())["sliding_window"] == window


def test_an_export_says_its_rope_once(tmp_path):
    teacher, student = make_pair(tmp_path, "qwen2")
    for folder in (teacher, student):
        config(rope_scaling=YARN)(folder)
    pair = open_pair(teacher, student)
    export_size(pair, 5, tmp_path / "out")
    assert verify(pair, 5, tmp_path / "out") < 1e-3
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_scaling" not in written and written["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_an_export_has_no_stale_keys(family, tmp_path):
    teacher, student = make_pair(tmp_path, family)
    stale = {"architectures": ["AnotherModel"], "quantization_config": None, "auto_map": {"AutoModel": "m.X"}}
    config(**stale, dtype="float16")(teacher)
    pair = open_pair(teacher, student)
    export_size(pair, 5, tmp_path / "out", "float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map", "_name_or_path"} & written.keys() and written["dtype"] == "float32"
    assert written["architectures"] == json.loads((student / "config.json").read_text())["architectures"]
    assert verify(pair, 5, tmp_path / "out", dtype="float32") < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_teacher_whose_head_is_not_tied_as_its_config_says(family, tmp_path):
    teacher, student = make_pair(tmp_path, family, tied=True)
    own_head(teacher)
    pair = open_pair(teacher, student)
    for size in pair.elasticity.sizes:
        export_size(pair, size, tmp_path / f"{size}", "float32")
        assert verify(pair, size, tmp_path / f"{size}", dtype="float32") < 1e-3
        assert_served(pair, {size: tmp_path / f"{size}"}, atol=2e-5)


def biased_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "biased llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changed", [False, True])
def test_low_rank_students_keep_biases_and_head_norms(family, changed, tmp_path):
    """Stored if they were trained; served, measured and exported in either case."""
    if family == "biased llama":
        biased_llama(tmp_path / "teacher")
    else:
        make_model(family, 6, seed=1).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    model = ElasticModel(teacher, Elasticity.last_to_first(6, KEPT))
    vectors = ("bias", "q_norm.weight", "k_norm.weight")
    with torch.no_grad():
        for name, parameter in model.student.named_parameters():
            if not name.endswith(vectors) or changed:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    (tmp_path / "student").mkdir()
    write_low_rank(tmp_path / "student", model, lambda name: 64)
    (tmp_path / "example").touch()
    assert {f.stat().st_mode for f in (tmp_path / "student").iterdir()} == {(tmp_path / "example").stat().st_mode}
    write_config(tmp_path / "student", model)
    names = load_file(tmp_path / "student" / LOW_RANK_FILE)
    has_vectors = family in ("biased llama", "qwen2", "qwen3")
    assert any(name.endswith(vectors) for name in names) == (changed and has_vectors)
    pair = open_pair(tmp_path / "teacher", tmp_path / "student")
    for size in pair.elasticity.sizes[:-1]:
        trained = model.eval().size_logits(torch.tensor([IDS]), size)[0].log_softmax(-1)
        ours = served(pair, size, IDS)
        assert (ours - trained).abs().max() < 0.2  # rounding to bfloat16; a bias that lacks is some units
        export_size(pair, size, tmp_path / f"{size}", "float32")
        assert verify(pair, size, tmp_path / f"{size}", dtype="float32") < 1e-3
        assert_served(pair, {size: tmp_path / f"{size}"}, atol=2e-5)
    kept = pair.load(WeightForm(torch.float32, low_rank=True))
    assert bool(kept.low_rank) != (changed and has_vectors)
    assert kept.num_bytes() == pair.union_bytes(kept.sizes, WeightForm(torch.float32, low_rank=True))
    freeze_vectors(model)
    assert not any(p.requires_grad for n, p in model.student.named_parameters() if n.endswith(vectors))


def test_a_second_start_asks_transformers_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))
    teacher, student = make_pair(tmp_path)
    script = (
        "import sys, torch; from model_store.pair import open_pair; from model_store.weight_form import WeightForm\n"
        f"open_pair({str(teacher)!r}, {str(student)!r}).load(WeightForm(torch.float32))\n"
        "print('transformers' in sys.modules)"
    )
    said = [subprocess.check_output([sys.executable, "-c", script], text=True).strip() for _ in range(2)]
    assert said == ["True", "False"]
    config(rms_norm_eps=0.5)(teacher)
    config(rms_norm_eps=0.5)(student)
    assert open_pair(teacher, student).spec.norm_eps == 0.5


def test_tokenizers_are_compared_by_meaning(tmp_path, caplog):
    teacher, student = make_pair(tmp_path)
    base = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "pre_tokenizer": None,
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    }  # fmt: skip

    def write(folder, **changes):
        (folder / "tokenizer.json").write_text(json.dumps(base | changes))

    def model(**changes):
        return base["model"] | changes

    write(teacher)
    for same in ({}, {"model": model(merges=[["a", "b"]])}, {"version": "1.0"}):
        write(student, **same)
        open_pair(teacher, student)
    assert "token" not in caplog.text
    for change, said in (
        ({"model": model(vocab={"a": 0, "b": 1})}, r"token 2 \('ab'\) is in the teacher's tokenizer only"),
        ({"added_tokens": [*base["added_tokens"], {"id": 4, "content": "<pad>"}]}, "token 4 .'<pad>'. is in the stud"),
        ({"model": model(merges=[])}, "differ in merges"),
        ({"pre_tokenizer": {"type": "Digits"}}, "differ in pre_tokenizer"),
    ):
        caplog.clear()
        write(student, **change)
        open_pair(teacher, student)
        assert re.search(said, caplog.text)
    for change, said in (
        ({"model": model(vocab={"a": 1, "b": 0, "ab": 2})}, "token 0 is 'a' in the teacher's tokenizer and 'b'"),
        ({"added_tokens": [{"id": 3, "content": "<bos>"}]}, "token 3 is '<s>' in the teacher's tokenizer and '<bos>'"),
    ):
        write(student, **change)
        with pytest.raises(PairError, match=said):
            open_pair(teacher, student)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            config(use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None),
            "sliding windows: llama.cpp has none",
        ),
        (config(hidden_act="gelu"), "with silu only, not with gelu"),
        (rope(**YARN), "scaled rotary positions are not written"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_written_for_it(change, said, tmp_path):
    teacher, student = make_pair(tmp_path, "qwen2")
    change(teacher), change(student)
    export_size(open_pair(teacher, student), 5, tmp_path / "out")
    with pytest.raises(ExportError, match=said):
        write_gguf(tmp_path / "out", tmp_path / "model.gguf")
