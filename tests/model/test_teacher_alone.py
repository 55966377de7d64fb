"""A teacher without a student: one size, and everything that works with a pair works with it."""

import json
import random

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from model_store.pair import PairError, open_pair
from model_store.weight_form import Storage, WeightForm
from server.cli import main
from server.config import Settings
from server.forms import open_settings_pair
from server.offline import OfflineEngine, teacher_generator
from tests.api import tiny
from tests.model.test_oracle import VOCAB, all_logprobs, executor, make_engine, make_request, run  # noqa: F401
from tests.tiny_pairs import FAMILIES, Oracle, make_pair


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(tmp_path, family, executor):  # noqa: F811
    teacher, student = make_pair(tmp_path, family)
    pair, oracle = open_pair(teacher, store=tmp_path / "store"), Oracle(teacher, student)
    assert (pair.student_path, pair.elasticity.sizes, pair.name) == (None, (6,), "teacher")
    engine, rng = make_engine(pair, executor), random.Random(0)
    requests = [
        make_request(f"r{i}", [rng.randrange(VOCAB) for _ in range(length)], 6, prompt_logprobs=-1)
        for i, length in enumerate((1, 9, 40))
    ]
    outputs = run(engine, requests)
    for request in requests:
        text = request.prompt_token_ids
        assert request.output_token_ids == oracle.greedy(pair.elasticity, 6, text, 6, request.output_token_ids)
        reference = torch.log_softmax(oracle.logits(pair.elasticity, 6, text)[:-1], -1)
        difference = (all_logprobs(outputs[request.request_id])[: len(text) - 1] - reference).abs()
        assert (difference <= 1e-4 * reference.abs().clamp(min=1.0)).all()


def test_what_it_needs_is_the_teachers(tmp_path):
    teacher, student = make_pair(tmp_path)
    alone, pair = open_pair(teacher, store=tmp_path), open_pair(teacher, student, store=tmp_path)
    for form in (WeightForm(torch.float32), WeightForm(torch.bfloat16, storage=Storage.INT8)):
        assert alone.union_bytes((6,), form) == pair.union_bytes((6,), form) == alone.load(form).num_bytes()
    rows = alone.size_table()
    assert [row["size"] for row in rows] == [6] and rows[0]["fraction"] == 1.0
    assert alone.digest != pair.digest
    with pytest.raises(PairError, match="not even the smallest size can be served: 6L needs"):
        alone.load(WeightForm(torch.float32), memory_budget=1000)
    with pytest.raises(PairError, match="has no patch order"):
        open_pair(teacher, patch_order="last_to_first", store=tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.make_pair(tmp_path_factory.mktemp("alone"))[0]


def test_a_server_of_one_size(teacher, tmp_path):
    flags = ["--store", str(tmp_path), "--size-policy", "auto", "--slo-tpot-ms", "1000", "--speculative-size", "auto"]
    tiny.noted(teacher, None, tmp_path)
    with tiny.RunningServer((teacher, "none"), *flags, *tiny.QUICK) as server:
        ask = lambda path, **body: httpx.post(server.url + path, json=body, timeout=60)  # noqa: E731
        cards = httpx.get(server.url + "/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [tiny.NAME, f"{tiny.NAME}:6L"] and cards[0]["sizes"] == ["6L"]
        for size in ("auto", "6L", "100%", "teacher", "student"):
            answer = ask("/v1/completions", prompt="The quick", max_tokens=3, size=size).json()
            assert answer["size"]["layers"] == 6
        message = [{"role": "user", "content": "Hello"}]
        budget = {"slo": {"tpot_ms": 1000}, "memory_budget_mb": 10}
        assert ask("/v1/chat/completions", messages=message, max_tokens=3, **budget).status_code == 200
        assert ask("/v1/messages", model=tiny.NAME, messages=message, max_tokens=3).status_code == 200
        assert ask("/v1/responses", input="Hello", max_output_tokens=16).status_code == 200
        refused = ask("/v1/completions", prompt="a", size="5L")
        assert refused.status_code == 400 and "sizes are 6L" in refused.json()["error"]["message"]
        assert httpx.get(server.url + "/").status_code == 200
    (calibration,) = (tmp_path / "calibration").glob("*.json")
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2024-05-10 00:00:00.0,20,5\n" * 3)
    assert main(["simulate", "--trace", str(trace), "--calibration", str(calibration)]) == 0


def test_the_commands(teacher, tmp_path, capsys):
    common = ["--teacher", str(teacher), "--store", str(tmp_path / "store")]
    assert main(["sizes", *common, "--json"]) == 0
    assert [row["size"] for row in json.loads(capsys.readouterr().out)["sizes"]] == [6]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    held_out = ["--text", str(text), "--windows", "2", "--window-tokens", "32"]
    assert main(["evaluate", *common, *held_out]) == 0
    assert open_pair(teacher, store=tmp_path / "store").quality[6]["kl"] == 0
    assert not list(teacher.glob("quality.json"))  # a model's folder is not written to
    assert main(["evaluate", *common, *held_out, "--compare-orders"]) != 0
    assert main(["export", *common, "--size", "6L", "--out", str(tmp_path / "out")]) == 0
    assert "as it is" in (tmp_path / "out" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 6


def test_it_answers_prompts_for_distillation(teacher, tmp_path):
    class Job:
        device, store = "cpu", str(tmp_path)

    Job.teacher = str(teacher)
    assert len(teacher_generator(Job, 64)(6, [[1, 2, 3]], 2)[0]) in (1, 2)


def test_it_is_elastic_in_bits(teacher, tmp_path):
    settings = {"teacher": str(teacher), "student": "none", "store": str(tmp_path), "device": "cpu"}
    for quantization in ("q8", "q4"):
        made = Settings(**settings, quantization=quantization, kv_cache_memory=1 << 20)
        engine = OfflineEngine(open_settings_pair(made), made, 32)
        assert len(engine.generate(6, [[1, 2, 3]], 4)[0]) > 0
    assert len(list((tmp_path / "nested").glob("*.safetensors"))) == 1  # one file for all widths
