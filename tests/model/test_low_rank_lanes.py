"""A low-rank student run as a difference, in the teacher's own products, against the same student expanded."""

import random

import numpy as np
import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.cost.calibrate import profile_of
from server.cost.features import NUM_FEATURES
from server.cost.model import CostModel
from server.kernels.cpu import library
from tests.model.test_oracle import make_engine, make_request, run
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import VOCAB, make_model

ORDERS = {"last_to_first": None, "first_to_last": None, "mixed": [6, 5, 6, 5]}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, 6, seed=1, tied=True).save_pretrained(folder / "teacher")
    write_student(folder / "student", folder / "teacher", quantise=request.param != "qwen2")
    return folder


@pytest.fixture(params=["torch", "native"])
def executor(request):
    if request.param == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_text_as_expanded(folders, order, executor):
    """Alone and in mixes of sizes, chunked and decoding, with prefix hits and preemption."""
    named = None if order == "mixed" else order
    pair = open_pair(folders / "teacher", folders / "student", patch_order=named, thresholds=ORDERS[order])
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 7, 8, 9, 40]))] for _ in range(8)]
    prompts += prompts[:2]
    texts, page_bytes = [], make_engine(pair, executor).executor.page_bytes()
    for low_rank in (False, True):
        loaded = pair.load(WeightForm(torch.float32, low_rank))
        engine = make_engine(pair, executor, loaded=loaded, kv_cache_bytes=120 * page_bytes)
        assert engine.executor.shared_stations == (frozenset(range(4)) if low_rank else frozenset({3}))
        sizes = pair.elasticity.sizes
        requests = [make_request(f"r{i}", p, sizes[i % 3], max_tokens=20) for i, p in enumerate(prompts)]
        run(engine, requests)
        alone = [make_request(f"a{size}", prompts[0], size) for size in pair.elasticity.sizes]
        for request in alone:
            run(engine, [request])
        texts.append([request.output_token_ids for request in requests + alone])
        assert engine.scheduler.num_preemptions > 0
    assert texts[0] == texts[1]


def test_the_same_logits_as_expanded(folders, executor):
    pair = open_pair(folders / "teacher", folders / "student")
    prompt = random.Random(1).choices(range(VOCAB), k=30)
    scores = []
    for low_rank in (False, True):
        loaded = pair.load(WeightForm(torch.float32, low_rank))
        engine = make_engine(pair, executor, loaded=loaded)
        requests = [make_request(f"r{size}", prompt, size, max_tokens=1, logprobs=-1) for size in (6, 5, 4)]
        outputs = run(engine, requests)
        rows = [o.new_logprobs[0].top for r in requests for o in outputs[r.request_id] if o.new_logprobs]
        scores.append(torch.tensor([[value for _, value in sorted(row)] for row in rows]))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


def test_the_cost_model_knows_the_form(folders):
    """A mix of the smallest and the largest size costs the teacher's layers once, and the factors."""
    pair = open_pair(folders / "teacher", folders / "student")
    weights = []
    for low_rank in (False, True):
        loaded = pair.load(WeightForm(torch.float32, low_rank))
        engine = make_engine(pair, "torch", loaded=loaded)
        profile = profile_of(loaded, engine.executor.shared_stations)
        model = CostModel(profile, np.zeros(NUM_FEATURES))
        joint, teacher, student = profile.station_weights()
        for i, size in enumerate((6, 4)):
            engine.add(make_request(f"r{i}", [3, 4], size))
        batch = engine.build_batch(engine.scheduler.schedule().scheduled)
        read = model.shape(batch).features[1]  # layer weights, each segment once
        assert read == pytest.approx(joint.sum() + teacher.sum() + student.sum())
        assert teacher.sum() + joint.sum() == pytest.approx(profile.layer_weights[:6].sum())
        weights.append(read * profile.reference_bytes)
    own_layers = sum(t.nbytes for i in (6, 7, 8) for t in pair.load(WeightForm(torch.float32)).layers[i].tensors())
    factors = sum(t.nbytes for d in loaded.low_rank.values() for t in d.tensors())
    assert weights[0] - weights[1] == pytest.approx(own_layers - factors)


def test_bfloat16_stays_close(folders, executor):
    """int8 factors stay int8 in the native executor; memory is the teacher's and theirs."""
    pair = open_pair(folders / "teacher", folders / "student")
    prompt = random.Random(1).choices(range(VOCAB), k=30)
    scores = []
    for dtype, chosen in ((torch.float32, "torch"), (torch.bfloat16, executor)):
        loaded = pair.load(WeightForm(dtype, True))
        engine = make_engine(pair, chosen, loaded=loaded)
        requests = [make_request(f"r{size}", prompt, size, max_tokens=1, logprobs=-1) for size in (6, 5, 4)]
        outputs = run(engine, requests)
        rows = [o.new_logprobs[0].top for r in requests for o in outputs[r.request_id] if o.new_logprobs]
        scores.append(torch.tensor([[value for _, value in sorted(row)] for row in rows]))
    centred = [rows - rows.mean(-1, keepdim=True) for rows in scores]
    assert torch.cosine_similarity(*centred).min() > 0.99
