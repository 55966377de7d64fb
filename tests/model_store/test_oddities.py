"""Checkpoints as they are in the wild: served as transformers computes them, or refused in one sentence.

Each row is a tiny random checkpoint that transformers saved and somebody changed. A row without a message must give
transformers' log-probabilities on the same folder, float32, to 1e-5; one with a message must be refused with it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_store.errors import BoomerangError
from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.engine.engine import Engine
from tests.model.test_oracle import all_logprobs, make_request, run
from tests.model_store.changes import (
    LFS,
    Change,
    add,
    both,
    config,
    drop,
    head_copied,
    head_only,
    instead,
    old,
    own_head,
    quantised,
    rope,
    shape,
    sharded,
    stored_as,
    tensors,
    without,
    write,
)
from tests.tiny_pairs import make_model

LAYERS = {"teacher": 3, "student": 2}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BIASED = {"attention_bias": True, "mlp_bias": True}
EQUAL = [
    # heads
    *((f"{f}: tied in config, another head in the file", f, both(own_head, config(tie_word_embeddings=True)))
      for f in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")),
    ("gpt2: tied by default, another head", "gpt2", both(own_head, without("tie_word_embeddings"))),
    ("qwen2: untied by default, a head", "qwen2", both(own_head, without("tie_word_embeddings"))),
    *((f"{f}: tied, the same table twice", f, both(config(tie_word_embeddings=True), head_copied))
      for f in ("llama/tied", "gpt2/tied", "qwen2/tied")),
    *((f"{f}: tied, only the head saved", f, head_only)
      for f in ("llama/tied", "gpt2/tied", "qwen2/tied", "qwen3/tied", "gpt_neox/tied")),
    # yarn
    *((f"{f}: yarn, mscale {m} and {a}", f, rope(**YARN, mscale=m, mscale_all_dim=a))
      for f, m, a in (("llama", 1.0, 0.8), ("qwen2", 0.707, 0.707), ("qwen3", 0.5, 1.0), ("mistral", 1.0, 0.0),
                      ("gpt_neox", 2.0, 1.0))),
    ("llama: yarn, mscale alone", "llama", rope(**YARN, mscale=0.7)),
    ("llama: yarn, mscale_all_dim alone", "llama", rope(**YARN, mscale_all_dim=0.7)),
    ("llama: yarn, mscale in the old spelling", "llama", old(**YARN, mscale=1.2, mscale_all_dim=0.6)),
    ("qwen2: yarn, attention_factor", "qwen2", rope(**YARN, attention_factor=1.3)),
    ("qwen2: yarn, attention_factor and mscale", "qwen2", rope(**YARN, attention_factor=0.9, mscale=2.0)),
    ("qwen2: yarn, betas", "qwen2", rope(**YARN, beta_fast=16, beta_slow=2)),
    ("qwen2: yarn, betas null", "qwen2", rope(**YARN, beta_fast=None, beta_slow=None, attention_factor=None)),
    ("qwen2: yarn, not truncated", "qwen2", rope(**YARN, truncate=False)),
    ("qwen2: yarn, factor null", "qwen2", rope(**YARN | {"factor": None})),
    ("qwen2: yarn as the model card says", "qwen2", old(type="yarn", factor=4.0, original_max_position_embeddings=64)),
    ("llama: yarn without original length", "llama", rope(rope_type="yarn", factor=2.0)),
    ("llama: yarn, factor 1", "llama", rope(**YARN | {"factor": 1.0})),
    ("llama: yarn, factor below 1", "llama", rope(**YARN | {"factor": 0.5})),
    # rope in two places, in two spellings
    *((f"{f}: {s['rope_type']} added beside rope_parameters", f, config(rope_scaling=s))
      for f, s in (("llama", {"rope_type": "linear", "factor": 4.0}), ("qwen2", YARN), ("qwen3", LLAMA3),
                   ("mistral", {"rope_type": "linear", "factor": 2.0}), ("gpt_neox", YARN), ("llama", YARN))),
    ("llama: rope_scaling null beside rope_parameters", "llama", config(rope_scaling=None)),
    ("llama: rope_scaling {} beside rope_parameters", "llama", config(rope_scaling={})),
    ("llama: rope_theta beside rope_parameters", "llama", config(rope_theta=500.0)),
    ("qwen2: rope_theta only outside", "qwen2", config(rope_parameters={"rope_type": "default"}, rope_theta=500.0)),
    ("llama: type for rope_type", "llama", rope(type="linear", factor=3.0)),
    ("llama: type and rope_type", "llama", rope(type="linear", rope_type="linear", factor=3.0)),
    ("llama: linear, old", "llama", old(type="linear", factor=3.0)),
    ("llama: llama3, old", "llama", old(**LLAMA3, original_max_position_embeddings=64)),
    ("llama: llama3 without original length", "llama", rope(**LLAMA3)),
    ("llama: default written out", "llama", rope(rope_type="default")),
    ("qwen3: no rope keys", "qwen3", without("rope_parameters")),
    ("llama: unknown rope keys", "llama", rope(rope_type="linear", factor=2.0, finetuned=True)),
    ("llama: partial_rotary_factor, which it ignores", "llama", rope(rope_type="default", partial_rotary_factor=0.5)),
    ("gpt_neox: rotary_pct, old", "gpt_neox", without("rope_parameters", rotary_pct=0.5, rotary_emb_base=500)),
    ("gpt_neox: rotary keys absent", "gpt_neox", without("rope_parameters")),
    ("gpt_neox: whole heads rotated", "gpt_neox", rope(rope_type="default", partial_rotary_factor=1.0)),
    ("gpt_neox: a quarter, linear", "gpt_neox", rope(rope_type="linear", factor=2.0, partial_rotary_factor=0.25)),
    ("gpt_neox: an odd number of channels", "gpt_neox", rope(rope_type="default", partial_rotary_factor=0.2)),
    # windows
    ("mistral: a window", "mistral", config(sliding_window=16)),
    ("mistral: layer_types, which it ignores", "mistral", config(sliding_window=16,
     layer_types=["full_attention"] * 3)),
    ("mistral: window absent", "mistral", without("sliding_window")),
    ("llama: a window, which it ignores", "llama", config(sliding_window=8)),
    ("qwen2: a window for the last layer", "qwen2", config(use_sliding_window=True, sliding_window=16,
     max_window_layers=1, layer_types=None)),
    ("qwen2: a window that no layer has", "qwen2", config(use_sliding_window=True, sliding_window=8,
     max_window_layers=28, layer_types=None)),
    ("qwen2: a window not in use", "qwen2", config(use_sliding_window=False, sliding_window=8)),
    ("qwen3: no window keys", "qwen3", without("sliding_window", "use_sliding_window", "max_window_layers",
     "layer_types")),
    # keys that are absent, or say what the modelling code does not do
    ("llama: rms_norm_eps absent", "llama", without("rms_norm_eps")),
    ("llama: rms_norm_eps large", "llama", config(rms_norm_eps=0.1)),
    ("llama: hidden_act absent", "llama", without("hidden_act")),
    ("llama: head_dim absent", "llama", without("head_dim")),
    ("llama: max_position_embeddings absent", "llama", without("max_position_embeddings")),
    ("llama: hidden_act gelu", "llama", config(hidden_act="gelu")),
    ("qwen2: hidden_act gelu_new", "qwen2", config(hidden_act="gelu_new")),
    ("mistral: hidden_act gelu_pytorch_tanh", "mistral", config(hidden_act="gelu_pytorch_tanh")),
    ("qwen3: hidden_act swish", "qwen3", config(hidden_act="swish")),
    ("mistral: attention_bias, which it has not", "mistral", config(**BIASED)),
    ("qwen2: attention_bias, which it does not ask", "qwen2", config(**BIASED)),
    ("gpt_neox: sequential residual", "gpt_neox", config(use_parallel_residual=False)),
    ("gpt_neox: use_parallel_residual absent", "gpt_neox", without("use_parallel_residual")),
    ("gpt_neox: hidden_act gelu_fast", "gpt_neox", config(hidden_act="gelu_fast")),
    ("gpt_neox: layer_norm_eps", "gpt_neox", config(layer_norm_eps=0.05)),
    ("gpt2: attention not scaled", "gpt2", config(scale_attn_weights=False)),
    ("gpt2: activation_function gelu", "gpt2", config(activation_function="gelu")),
    ("gpt2: activation_function silu", "gpt2", config(activation_function="silu")),
    ("gpt2: layer_norm_epsilon", "gpt2", config(layer_norm_epsilon=0.05)),
    ("gpt2: the common names", "gpt2", without("n_embd", "n_head", "n_positions", hidden_size=64,
     num_attention_heads=4, max_position_embeddings=256)),
    ("gpt2: n_inner written out", "gpt2", config(n_inner=256)),
    ("gpt2: reorder_and_upcast_attn", "gpt2", config(reorder_and_upcast_attn=True)),
    ("llama: vocabulary keys of other families", "llama", config(n_embd=99, n_layer=7)),
    # how it is stored
    *((f"llama: stored as {d}", "llama", stored_as(d))
      for d in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)),
    ("gpt2: stored as bfloat16", "gpt2", stored_as(torch.bfloat16)),
    ("llama: norms in float32 beside bfloat16", "llama", tensors(
     lambda found: {k: v if "norm" in k else v.bfloat16() for k, v in found.items()})),
    ("llama: one shard and an index", "llama", sharded()),
    ("gpt2: one shard and an index", "gpt2", sharded()),
    ("llama: rotary buffers of old files", "llama",
     add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))),
    ("gpt_neox: masks of old files", "gpt_neox", add(gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 4, 4),
     gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9))),
    ("llama: one rotary buffer for all layers", "llama", add(model__rotary_emb__inv_freq=torch.ones(8))),
    ("gpt2: masks of old files", "gpt2", add(transformer__h__0__attn__bias=torch.ones(1, 1, 4, 4))),
]  # fmt: skip
REFUSED = [
    # shapes: one table, before anything is read
    *((f"{f}: {name} is {sizes}", f, shape(name, *sizes), rf"{name.split('.', 1)[-1]} is .*, its config says")
      for f, name, sizes in (
          ("llama", "model.embed_tokens.weight", (67, 64)), ("llama", "model.embed_tokens.weight", (140, 64)),
          ("llama", "model.embed_tokens.weight", (131, 32)), ("llama", "model.norm.weight", (32,)),
          ("llama", "model.layers.1.input_layernorm.weight", (63,)),
          ("llama", "model.layers.1.mlp.up_proj.weight", (90, 64)),
          ("llama", "model.layers.0.self_attn.k_proj.weight", (64, 64)),
          ("llama", "model.layers.0.self_attn.o_proj.weight", (64,)),
          ("qwen2", "model.layers.1.self_attn.v_proj.bias", (16,)),
          ("qwen3", "model.layers.0.self_attn.q_norm.weight", (16,)),
          ("gpt2", "transformer.wpe.weight", (100, 64)), ("gpt2", "transformer.ln_f.bias", (65,)),
          ("gpt2", "transformer.h.1.mlp.c_fc.weight", (256, 64)), ("gpt2", "transformer.h.1.attn.c_attn.bias", (64,)),
          ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (64, 192)),
          ("gpt_neox", "gpt_neox.final_layer_norm.weight", (1,)))),
    ("llama: a head with fewer rows", "llama", shape("lm_head.weight", 67, 64), "lm_head.weight is .*67.*says .131"),
    ("llama: vocab_size above the rows", "llama", config(vocab_size=140), r"\[131, 64\], its config says \[140, 64\]"),
    ("llama: vocab_size below the rows", "llama", config(vocab_size=100), r"\[131, 64\], its config says \[100, 64\]"),
    ("llama: a tensor lacks", "llama", drop("layers.1.mlp.down_proj"), "lacks the tensor 'layers.1.mlp.down_proj.weig"),
    ("llama: no final norm", "llama", drop("model.norm"), "lacks the tensor 'norm.weight'"),
    ("llama: no embedding, untied", "llama", drop("embed_tokens"), "lacks the tensor 'embed_tokens.weight'"),
    ("llama: a bias too many", "llama", add(model__layers__0__mlp__up_proj__bias=torch.ones(96)), "no place for"),
    ("llama: a bias of the head", "llama", add(lm_head__bias=torch.ones(131)), "no place for: lm_head.bias"),
    ("llama: attention_bias without biases", "llama", config(attention_bias=True), "lacks .*q_proj.bias"),
    ("llama: a layer too many", "llama", config(num_hidden_layers=1), "its config says 1 layers, the file has layer"),
    ("llama: a layer too few", "llama", config(num_hidden_layers=9), "lacks the tensor 'layers"),
    ("llama: names of an adapter", "llama", tensors(lambda f: {"base_model.model." + k: v for k, v in f.items()}),
     "lacks the tensor .*; it has 'base_model"),
    ("llama: a tensor with and without prefix", "llama", add(norm__weight=torch.ones(64)), "'norm.weight' twice"),
    ("llama: integers", "llama", tensors(
     lambda found: {k: v.to(torch.int8) if "up_proj" in k else v for k, v in found.items()}),
     "is of type I8, not of floats"),
    # quantised, named as such
    ("gptq", "llama", quantised(quant_method="gptq", bits=4), r"quantised \(gptq, 4 bits;"),
    ("awq", "llama", quantised(quant_method="awq", bits=4, version="gemm"), r"quantised \(awq, 4 bits"),
    ("bitsandbytes, no method named", "llama", quantised(load_in_8bit=True), r"quantised \(bitsandbytes"),
    ("bitsandbytes", "qwen2", quantised(quant_method="bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes"),
    ("fp8", "qwen3", quantised(quant_method="fp8", activation_scheme="dynamic"), r"quantised \(fp8"),
    ("compressed-tensors", "llama", quantised(quant_method="compressed-tensors"), r"quantised \(compressed-tensors"),
    ("a quantization_config that says nothing", "llama", quantised(), r"quantised \(unknown method"),
    ("compression_config", "llama", config(compression_config={"quant_method": "sparseml"}), r"quantised \(sparseml"),
    ("qweight without a word in config", "llama", add(model__layers__0__self_attn__q_proj__qweight=torch.ones(2, 2)),
     r"is quantised \(it has layers.0.self_attn.q_proj.qweight"),
    ("float8 scales without a word in config", "llama",
     add(model__layers__0__self_attn__q_proj__weight_scale_inv=torch.ones(1)), r"is quantised \(it has .*scale_inv"),
    # families and options
    ("no model_type", "llama", without("model_type"), "names no model_type"),
    ("another family", "llama", config(model_type="mamba"), "'mamba' is not supported"),
    *((f"{f}: tokens see those after them", f, config(is_causal=False), "is_causal is false")
      for f in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")),
    ("activation relu", "llama", config(hidden_act="relu"), "activation 'relu'"),
    ("activation quick_gelu", "gpt2", config(activation_function="quick_gelu"), "activation 'quick_gelu'"),
    ("attention scaled by layer", "gpt2", config(scale_attn_by_inverse_layer_idx=True), "scaled by layer index"),
    ("cross attention", "gpt2", config(add_cross_attention=True), "cross attention"),
    ("dynamic rope", "llama", rope(rope_type="dynamic", factor=2.0), "'dynamic' is not supported"),
    ("dynamic rope, old", "qwen2", old(type="dynamic", factor=2.0), "'dynamic' is not supported"),
    ("a rope nobody knows", "llama", rope(rope_type="spiral"), "'spiral' is not supported"),
    ("part of a head of llama, linear", "llama", rope(rope_type="linear", factor=2.0, partial_rotary_factor=0.5),
     "rotate 8 of 16 channels"),
    ("rope_theta 0", "llama", rope(rope_type="default", rope_theta=0), "angles that are no numbers|rope_parameters"),
    ("rope_theta in words", "llama", rope(rope_type="default", rope_theta="big"), "rope_parameters"),
    ("linear without factor", "llama", rope(rope_type="linear"), "does not take this config.*factor"),
    ("llama3 without factors", "llama", rope(rope_type="llama3", factor=2.0), "does not take this config.*freq_factor"),
    ("factor 0", "llama", rope(rope_type="linear", factor=0), "rope_parameters|does not take"),
    ("layer_types too short", "qwen2", config(layer_types=["full_attention"]), "layer_types|does not take this config"),
    ("layer_types nobody knows", "qwen3", config(layer_types=["linear_attention"] * 3), "layer_types|does not take"),
    # counts
    ("10^9 layers", "qwen2", config(num_hidden_layers=10**9, layer_types=None), "layers is 10+: no model"),
    ("10^9 layers of GPT-2", "gpt2", config(n_layer=10**9), "n_layer is 1000000000: no model"),
    ("10^15 channels", "llama", config(hidden_size=10**15), "hidden_size is 10+: no model"),
    ("10^12 tokens", "llama", config(vocab_size=10**12), "vocab_size is 10+: no model"),
    ("0 heads", "llama", config(num_attention_heads=0, head_dim=16), "num_attention_heads is 0|does not take"),
    ("0 layers", "llama", config(num_hidden_layers=0), "num_hidden_layers is 0"),
    ("0 channels of a head", "llama", config(head_dim=0), "head_dim is 0"),
    ("-16 channels of a head", "qwen3", config(head_dim=-16), "head_dim is -16"),
    ("0 channels of an MLP", "gpt2", config(n_inner=0), "intermediate_size is 0"),
    ("-1 positions", "llama", config(max_position_embeddings=-1), "max_position_embeddings is -1"),
    ("3 key/value heads of 4", "llama", config(num_key_value_heads=3), "no multiple of 3 key/value heads"),
    ("layers in words", "llama", config(num_hidden_layers="3"), "does not take this config.*num_hidden_layers"),
    ("half a layer", "llama", config(num_hidden_layers=2.5), "does not take this config.*num_hidden_layers"),
    ("vocab_size null", "llama", config(vocab_size=None), "does not take this config.*vocab_size"),
    ("vocab_size absent", "llama", without("vocab_size"), r"\[131, 64\], its config says \[32000, 64\]"),
    ("intermediate_size absent", "llama", without("intermediate_size"), r"\[96, 64\], its config says \[11008, 64\]"),
    ("head_dim of qwen3 absent", "qwen3", without("head_dim"), r"is \[96, 64\], its config says \[512, 64"),
    ("key/value heads of mistral absent", "mistral", without("num_key_value_heads"), "4 is no multiple of 8 key/value"),
    ("hidden_size not in heads", "gpt2", config(n_head=5), "channels are expected|does not take"),
    ("an epsilon in words", "llama", config(rms_norm_eps="small"), "does not take this config.*rms_norm_eps"),
    # files
    ("config.json is a list", "llama", write("config.json", "[1]"), r"config.json is a JSON list, not an object"),
    ("config.json is empty", "llama", write("config.json", ""), r"config.json is not valid JSON: it is empty"),
    ("config.json is cut", "llama", write("config.json", '{"a": '), r"config.json is not valid JSON"),
    ("config.json has a byte-order mark", "llama", write("config.json", b"\xef\xbb\xbf{}"), r"g.json is not valid"),
    ("config.json in another encoding", "llama", write("config.json", b'{"a": "\xff"}'), r"is not text in UTF-8"),
    *((f"{name} is a pointer of Git LFS", "llama", write(name, LFS), rf"{name} is a pointer of Git LFS, not the file")
      for name in ("config.json", "model.safetensors")),
    ("the weights are a folder", "llama", instead("model.safetensors", Path.mkdir), "not a readable safetensors file"),
    ("the weights are a link to nowhere", "llama",
     instead("model.safetensors", lambda file: file.symlink_to("nowhere")), "no safetensors file|not a readable safet"),
    ("no config.json", "llama", lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ("an adapter", "llama", write("adapter_config.json", "{}"), "merge the adapter"),
    ("an index without weight_map", "llama", sharded({"metadata": {}}), r"index.json has no weight_map"),
    ("an index with a list", "llama", sharded({"weight_map": []}), r"index.json has no weight_map"),
    ("an empty index", "llama", sharded(""), r"index.json is not valid JSON: it is empty"),
    ("an index of other folders", "llama", sharded({"weight_map": {"a": "../model.safetensors"}}), "not a file beside"),
    ("an index of files that lack", "llama", sharded({"weight_map": {"a": "b.safetensors"}}), "lacks 'b.safetensors'"),
    ("a cut file", "llama", write("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "not a readable safetensors"),
    ("a pickle", "llama", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is never read"),
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Family -> folder of teacher and student as transformers saves them, made when first asked for."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("original")
            family, _, tied = kind.partition("/")
            for seed, (side, layers) in enumerate(LAYERS.items()):
                make_model(family, layers, seed, tied=bool(tied)).save_pretrained(made[kind] / side)
            kept = {"copied_teacher_layers": [0, 2], "pruned_teacher_layers": [1]}
            (made[kind] / "student" / "student_config.json").write_text(json.dumps(kept))
        return made[kind]

    return get


def changed(originals, kind: str, folder: Path, change: Change, sides: tuple[str, ...]) -> tuple[Path, Path]:
    shutil.copytree(originals(kind), folder, dirs_exist_ok=True)
    for side in sides:
        change(folder / side)
        _match_layer_types(folder / side, LAYERS[side])
    return folder / "teacher", folder / "student"


def _match_layer_types(folder: Path, layers: int) -> None:
    """Rows say `layer_types` of the teacher; the student has fewer layers."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return
    if isinstance(values, dict) and len(values.get("layer_types") or ()) == LAYERS["teacher"] != layers:
        (folder / "config.json").write_text(json.dumps(values | {"layer_types": values["layer_types"][:layers]}))


@torch.no_grad()
def assert_served_as_by_transformers(pair, folders: dict[int, Path], **options) -> None:
    """Log-probabilities of the largest and the smallest size against transformers on the folder of each."""
    length = min(24, pair.spec.max_context - 4)
    config = EngineConfig(max_model_len=length + 4, kv_cache_bytes=1 << 20, executor="torch", max_num_batched_tokens=64)
    engine = Engine(pair.load(WeightForm(torch.float32)), config)
    prompt = torch.randint(131, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    requests = {size: make_request(f"{size}", prompt, size, max_tokens=3, logprobs=-1) for size in folders}
    outputs = run(engine, list(requests.values()), check=False)
    for size, folder in folders.items():
        tokens = list(requests[size].output_token_ids)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, length - 1 :]
        torch.testing.assert_close(all_logprobs(outputs[str(size)]), logits.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, change", [row[1:] for row in EQUAL], ids=[row[0] for row in EQUAL])
def test_served_as_transformers_computes_it(kind, change, originals, tmp_path):
    teacher, student = changed(originals, kind, tmp_path, change, ("teacher", "student"))
    assert_served_as_by_transformers(open_pair(teacher, student), {3: teacher, 2: student})


@pytest.mark.parametrize("kind, change, message", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_in_one_sentence(kind, change, message, originals, tmp_path):
    teacher, student = changed(originals, kind, tmp_path, change, ("teacher",))
    with pytest.raises(BoomerangError, match=message) as caught:
        open_pair(teacher, student)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_head_that_is_not_there_is_the_embedding_and_is_said(kind, originals, tmp_path, caplog):
    teacher, student = changed(originals, kind, tmp_path, drop("lm_head"), ("teacher", "student"))
    drop("embed_out")(teacher), drop("embed_out")(student)
    pair = open_pair(teacher, student)
    assert caplog.text.count("the file has no head: the embedding is used for it") == 2
    on_disk = sum(value.numel() for value in load_file(teacher / "model.safetensors").values())
    assert pair.parameters(3) == on_disk
    assert_served_as_by_transformers(pair, {3: teacher}, tie_word_embeddings=True)


NOTES = {
    "quality.json": ('{"sizes": []}', '{"sizes": null}', '{"sizes": {"all": {}}}', '{"sizes": {"2": 5}}',
                     '{"sizes": {"2": {"kl": "low"}}}', "[]", "{"),
    "pair.json": ('{"name": 5}', '{"name": ["a"]}', '{"teacher": 5}', '{"patch_order": 3}', '{"thresholds": {}, "a',
                  '{"thresholds": 5}', '{"thresholds": ["a", 3]}'),
    "student_config.json": ("[0, 2]", "", "{}", '{"copied_teacher_layers": "02"}', '{"copied_teacher_layers": [0, 9]}',
                            '{"copied_teacher_layers": [0, 2], "pruned_teacher_layers": [0]}'),
}  # fmt: skip


@pytest.mark.parametrize("name, content", [(name, text) for name, texts in NOTES.items() for text in texts])
def test_notes_of_a_pair_that_are_damaged_are_refused_in_one_sentence(name, content, originals, tmp_path):
    teacher, student = changed(originals, "llama", tmp_path, write(name, content), ("student",))
    with pytest.raises(BoomerangError) as caught:
        open_pair(teacher, student)
    assert "\n" not in str(caught.value)
