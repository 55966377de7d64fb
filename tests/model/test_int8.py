"""`--quantization int8`: the model is the one whose matrices were rounded, in every executor, size, order and form."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from model_store.arrays import BFLOAT16, in_torch
from model_store.int8 import Int8Matrix, dense, quantise
from model_store.pair import open_pair
from model_store.weight_form import Storage, WeightForm
from server.cost.calibrate import profile_of
from server.kernels.cpu import library
from server.model.linear import embed, linear
from tests.model.test_oracle import all_logprobs, make_engine, make_request, open_order, run
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import KEPT, NUM_TEACHER_LAYERS, VOCAB, Oracle, make_model, make_pair

ORDERS = ("last_to_first", "first_to_last", "mixed")
# (family, tied) -> order. Tied as usual (None) and the other way round, each with every order; every family with every
# order is what test_oracle.py does.
KINDS = {
    ("llama", None): "last_to_first", ("mistral", None): "first_to_last", ("qwen2", None): "mixed",
    ("qwen3", None): "last_to_first", ("gpt_neox", None): "first_to_last", ("gpt2", None): "mixed",
    ("qwen3", True): "first_to_last", ("llama", False): "mixed",
}  # fmt: skip

INT8 = WeightForm(storage=Storage.INT8)


def rounded(model):
    """The model with every matrix of a layer, the head, and an embedding tied to it rounded, in float32."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):  # Conv1D keeps [in, out]
                rows = module.weight if isinstance(module, nn.Linear) else module.weight.T
                rows.copy_(torch.from_numpy(quantise(rows.numpy()).dense(np.float32)))
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def family(request, tmp_path_factory):
    """Folders, the float32 oracle of the rounded models, and the order in which this kind is tested."""
    name, tied = request.param
    teacher, student = make_pair(tmp_path_factory.mktemp(name), name, tied)
    tied = name in ("llama", "gpt2") if tied is None else tied
    models = [make_model(name, n, seed, tied) for n, seed in ((NUM_TEACHER_LAYERS, 1), (len(KEPT), 2))]
    return teacher, student, Oracle(*map(rounded, models)), KINDS[request.param]


def scored(engine, sizes):
    """Requests of different sizes in one batch, chunked and decoding, and the outputs of each."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 9, 40, 7, 2)]
    requests = [
        make_request(f"r{i}", prompt, sizes[i % len(sizes)], logprobs=-1, prompt_logprobs=-1)
        for i, prompt in enumerate(prompts)
    ]
    return requests, run(engine, requests)


def test_the_portable_executor_against_the_oracle(family):
    teacher, student, oracle, order = family
    pair = open_order(teacher, student, order)
    engine = make_engine(pair, "torch", loaded=pair.load(WeightForm(torch.float32, storage=Storage.INT8)))
    requests, outputs = scored(engine, pair.elasticity.sizes)
    for request in requests:
        text = request.prompt_token_ids + request.output_token_ids
        reference = torch.log_softmax(oracle.logits(pair.elasticity, request.sizes[0], text)[:-1], -1)
        assert request.output_token_ids == reference[-6:].argmax(-1).tolist()
        error = (all_logprobs(outputs[request.request_id]) - reference).abs() / reference.abs().clamp(min=1.0)
        assert error.max() < 1e-4


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_both_executors_in_bfloat16(family, executor):
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    teacher, student, oracle, order = family
    pair = open_order(teacher, student, order)
    engine = make_engine(pair, executor, loaded=pair.load(INT8))
    assert "int8 weights" in engine.executor.describe()
    requests, outputs = scored(engine, pair.elasticity.sizes)
    for request in requests:
        text = request.prompt_token_ids + request.output_token_ids
        reference = torch.log_softmax(oracle.logits(pair.elasticity, request.sizes[0], text)[:-1], -1)
        measured = all_logprobs(outputs[request.request_id])
        centred = [rows - rows.mean(-1, keepdim=True) for rows in (measured, reference)]
        # The native executor rounds activations too.
        assert torch.cosine_similarity(*centred).min() > (0.99 if executor == "native" else 0.995)


def test_bytes_are_what_the_tables_say(family):
    teacher, student, *_ = family
    for order in ORDERS:
        pair = open_order(teacher, student, order)
        for count in (1, 2, 3):
            need = pair.union_bytes(pair.elasticity.sizes[:count], INT8)
            loaded = pair.load(INT8, memory_budget=need)
            assert loaded.sizes == pair.elasticity.sizes[:count] and loaded.num_bytes() == need
        assert need < 0.7 * pair.union_bytes(pair.elasticity.sizes, WeightForm(torch.bfloat16))
    assert pair.size_table(INT8)[-1]["weight_bytes"] < need
    profile = profile_of(loaded)
    assert profile.weight_bytes_per_parameter == 1.0
    assert profile.layer_bytes[0] == sum(t.nbytes for t in loaded.layers[0].tensors())


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_low_rank_students(tmp_path, executor, low_rank):
    """Expanded, the sum is rounded; as a difference the teacher's part is, and factors lie as they were stored."""
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    make_model("llama", 6, seed=1, tied=True).save_pretrained(tmp_path / "teacher")
    write_student(tmp_path / "student", tmp_path / "teacher", quantise=True)
    pair = open_pair(tmp_path / "teacher", tmp_path / "student")
    exact = make_engine(pair, "torch", loaded=pair.load(WeightForm(torch.float32, low_rank)))
    loaded = pair.load(form := WeightForm(torch.bfloat16, low_rank, Storage.INT8))
    sizes = pair.elasticity.sizes
    assert loaded.num_bytes() == pair.union_bytes(sizes, form)
    engine = make_engine(pair, executor, loaded=loaded)
    prompt = random.Random(1).choices(range(VOCAB), k=30)
    scores = []
    for each in (exact, engine):
        requests = [make_request(f"r{size}", prompt, size, max_tokens=1, logprobs=-1) for size in sizes]
        outputs = run(each, requests)
        scores.append(torch.cat([all_logprobs(outputs[request.request_id]) for request in requests]))
    centred = [rows - rows.mean(-1, keepdim=True) for rows in scores]
    assert torch.cosine_similarity(*centred).min() > 0.99


def test_rounding():
    matrix = np.random.default_rng(0).standard_normal((5, 33), np.float32)
    matrix[2] = 0
    matrix[3] *= 1e-3
    rounded = quantise(matrix)
    assert np.abs(rounded.values).max(axis=1).tolist() == [127, 127, 0, 127, 127]
    assert (np.abs(rounded.dense(np.float32) - matrix) <= 0.5001 * rounded.scale[:, None]).all()
    assert dense(rounded, BFLOAT16).dtype == BFLOAT16 and rounded.nbytes == 5 * 33 + 5 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 8, 9])
@pytest.mark.parametrize("width", [70, 64, 96])
def test_products(dtype, num_rows, width):
    generator = torch.Generator().manual_seed(1)
    weight = in_torch(quantise(torch.randn(37, width, generator=generator).numpy()))
    bias = torch.randn(37, generator=generator).to(dtype)
    x = torch.randn(num_rows, width, generator=generator).to(dtype)
    got = linear(x, weight, bias)
    expected = x.float() @ weight.dense(torch.float32).T + bias.float()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert got.dtype == dtype and got.shape == expected.shape
    assert ((got.float() - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).all()
    ids = torch.tensor([3, 0, 36])
    assert torch.equal(embed(ids, weight, dtype), weight.dense(dtype)[ids]) and isinstance(weight, Int8Matrix)
