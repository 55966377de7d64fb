"""Exports as llama.cpp computes them. Needs its Python package (pip install xllamacpp), else skipped."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_store.export import export_size
from model_store.export_gguf import write_gguf
from model_store.pair import open_pair
from tests.model_store.llama_cpp import LlamaCpp
from tests.model_store.test_export import _write_tokenizer
from tests.tiny_pairs import VOCAB, make_pair

pytest.importorskip("xllamacpp")


def as_its_files_say(family: str, num_layers: int) -> dict[str, Any]:
    """What llama.cpp fixes for a family and its files do not say."""
    if family == "smollm3":
        full = ["full_attention"] * num_layers
        rotates = [int(i % 4 != 3) for i in range(num_layers)]
        return {"no_rope_layers": rotates, "use_sliding_window": False, "sliding_window": None, "layer_types": full}
    if family == "gemma3_text":
        kinds = ("full_attention", "sliding_attention")
        plain = {"rope_type": "default"}
        return {
            "layer_types": [kinds[i % 6 != 5] for i in range(num_layers)], "query_pre_attn_scalar": 24,
            "sliding_window": 4,
            "rope_parameters": {kinds[0]: plain | {"rope_theta": 1e6}, kinds[1]: plain | {"rope_theta": 1e4}},
        }  # fmt: skip
    return {}


ASKED = {"n_predict": 1, "n_probs": VOCAB, "temperature": 0}


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in ("llama", "qwen2", "qwen3") for tied in (True, False)]
    + [("smollm3", True), ("olmo2", False), ("granite", True), ("gemma3_text", True)],
)
def test_llama_cpp_computes_what_transformers_computes(family, tied, tmp_path):
    teacher, student = make_pair(tmp_path, family, tied=tied)
    for folder in (teacher, student):
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        (folder / "config.json").write_text(json.dumps(config | as_its_files_say(family, config["num_hidden_layers"])))
    export_size(
        open_pair(teacher, student), 6 if family in ("gemma3_text", "smollm3") else 5, tmp_path / "out", "float32"
    )
    _write_tokenizer(tmp_path / "out", VOCAB)
    write_gguf(tmp_path / "out", tmp_path / "model.gguf")
    server, ids = LlamaCpp(tmp_path / "model.gguf"), [5, 17, 101, 9, 64, 3, 88, 120, 33, 71, 6, 42]
    while "completion_probabilities" not in (answer := server.post("/completion", prompt=ids, **ASKED)):
        ids.append(7 * len(ids) % VOCAB)  # it says nothing of a token that ends the answer
    found = {row["id"]: row["logprob"] for row in answer["completion_probabilities"][0]["top_logprobs"]}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert len(found) > VOCAB // 2
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < 0.02  # its KV are float16
