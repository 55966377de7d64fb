"""The pieces of distillation against plain formulas: loss over the head, attention, starting points, sizes drawn."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from model_store.assembly import Elasticity
from model_store.distill.cpu_attention import matmul_attention
from model_store.distill.data import Document, check_speakers, pack, read_documents
from model_store.distill.elastic import ElasticModel, LossWeights
from model_store.distill.head_loss import head_loss
from model_store.distill.low_rank import LowRankOptimizer, make_low_rank
from model_store.distill.order import greedy_order, kl_of_paths
from model_store.distill.recipe import PRESETS
from model_store.distill.start import start_from
from model_store.distill.trainer import MatrixOptimizer, SizeSampler
from model_store.distill.write import low_rank_factors, write_config
from model_store.evaluate.chat import Answers, compare, wilson_interval
from tests.api.tiny import make_pair
from tests.tiny_pairs import FAMILIES, make_model


@pytest.mark.parametrize("against", [0.0, 0.6])
@pytest.mark.parametrize("own_truths", [False, True])
@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0)])
def test_head_loss_equals_the_plain_formula(kl_weight, ce_weight, own_truths, against, monkeypatch):
    monkeypatch.setattr("model_store.distill.head_loss._CHUNK_ELEMENTS", 3 * 50)  # several chunks, the last one short
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    reference, teacher_weight, targets = torch.randn(7, 8), torch.randn(50, 8), torch.randint(50, (7,))
    counts, unlikely = torch.rand(7), torch.rand(7) * against
    ours, theirs = F.log_softmax(hidden @ weight.T, -1), F.log_softmax(reference @ teacher_weight.T, -1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    ce = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    unlikelihood = -(1 - ours.exp().gather(1, targets[:, None])[:, 0]).log()
    truths = torch.rand(7) if own_truths else None
    true_shares = counts if truths is None else truths
    expected = (kl_weight * kl * counts + ce_weight * ce * true_shares + unlikelihood * unlikely).sum()
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss, _, ce_of, _ = head_loss(
        hidden, weight, targets, reference, teacher_weight, counts, kl_weight, ce_weight,
        unlikely if against else None, truths,
    )  # fmt: skip
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ce_of, ce.detach())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_unlikelihood_stays_finite_where_a_repetition_is_certain():
    hidden = torch.tensor([[40.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    one = torch.ones(1)
    loss, *_ = head_loss(hidden, weight, torch.tensor([0]), torch.zeros(1, 1), weight, 0 * one, 1.0, 0.0, one)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(hidden.grad).all()


class NumberTokenizer:
    eos_token_id = 0

    def __call__(self, text, **unused):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def test_only_loops_in_a_sizes_own_words_are_marked():
    phrase = "1 2 3 4 5 6 1 2 3 4 5 6 1 2 9"  # five tokens on end complete a run of four for the second time
    for text, said_by, marked in (
        (phrase, 16, []), (f"{phrase} {phrase}", None, []), (f"{phrase} {phrase}", 16, range(18, 30)),
    ):  # fmt: skip
        length = len(text.split())
        rows = pack([Document(text=text, said_by=said_by)], NumberTokenizer(), length, length, "all", 0)
        assert rows.loops[0].nonzero().flatten().tolist() == list(marked)
        assert rows.said.all() if said_by else not rows.said.any()


def small_batch(folder):
    """(elastic model, two rows of ids, their mask of ones)."""
    teacher = AutoModelForCausalLM.from_pretrained(make_pair(folder)[0], dtype=torch.float32)
    model = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]))
    ids = torch.randint(teacher.config.vocab_size, (2, 12))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return model, ids, mask


def test_at_loops_no_row_follows_the_teacher(tmp_path):
    model, ids, mask = small_batch(tmp_path)
    weights = LossWeights(kl=1.0, align=0.0, position_share=1.0, unlikelihood=2.0)
    run = lambda loops: model(ids, mask, [3, 4], model.elasticity.thresholds, weights, loops)  # noqa: E731
    none, first, all_ = (run(loops.expand_as(mask)) for loops in (~mask, torch.arange(12) < 6, mask))
    torch.testing.assert_close(none["loss"].detach(), none["kl"])
    assert none["unlikely"] == 0 and all_["kl"] == all_["pure"] == 0
    torch.testing.assert_close(all_["loss"].detach(), 2 * all_["unlikely"])
    assert 0 < first["kl"] < none["kl"]


def test_no_cross_entropy_on_a_sizes_own_words(tmp_path):
    model, ids, mask = small_batch(tmp_path)
    weights = LossWeights(ce=1.0, kl=1.0, align=0.0, position_share=1.0)
    run = lambda said: model(ids, mask, [3, 4], model.elasticity.thresholds, weights, None, said)  # noqa: E731
    whole, none, first, all_ = (run(said) for said in (None, ~mask, (torch.arange(12) < 6).expand_as(mask), mask))
    assert whole["loss"] == none["loss"] and none["ce"] > first["ce"] > all_["ce"] == 0
    torch.testing.assert_close(all_["loss"].detach(), none["kl"])
    torch.testing.assert_close(first["loss"].detach(), first["kl"] + first["ce"])


def test_matmul_attention_equals_sdpa():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    out, _ = matmul_attention(None, q, k, v, None)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_start_from_takes_layers_of_the_same_block_and_means_them(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)[0], dtype=torch.float32)  # 6 layers
    model = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]))
    # "b" has blocks {0,1}, {2,3}, {4}, {5}
    shifts = {"a": ([0, 2, 4], 1.0), "b": ([0, 2, 4, 5], 3.0), "c": ([0, 2, 4], 2.0)}
    for name, (kept, shift) in shifts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "student_config.json").write_text(json.dumps({"copied_teacher_layers": kept}))
        layers = [teacher.model.layers[i].state_dict() for i in kept]
        tensors = {f"model.layers.{i}.{k}": v + shift for i, layer in enumerate(layers) for k, v in layer.items()}
        save_file(tensors, folder / "student_layers.safetensors")
    assert start_from(model, [tmp_path / "a", tmp_path / "b"]) == {0: 2, 1: 2, 2: 1}
    for station, start, shift in ((0, 0, 2.0), (1, 2, 2.0), (2, 4, 1.0)):
        own = model.student[str(station)].mlp.down_proj.weight
        torch.testing.assert_close(own, teacher.model.layers[start].mlp.down_proj.weight + shift)
    start_from(model, [tmp_path / "c", tmp_path / "a"], [1.5, -0.5])  # half as far again, away from "a"
    for station, start in ((0, 0), (1, 2), (2, 4)):
        own = model.student[str(station)].mlp.down_proj.weight
        torch.testing.assert_close(own, teacher.model.layers[start].mlp.down_proj.weight + 2.5)
    with pytest.raises(ValueError, match="not all of --start-from have the layer of station 2"):
        start_from(model, [tmp_path / "a", tmp_path / "b"], [0.5, 0.5])
    for weights in ([1.0], [0.5, 0.4], [1.5, -0.5, 0.0]):
        with pytest.raises(ValueError, match="--start-weights: 2 numbers that sum to 1"):
            start_from(model, [tmp_path / "a", tmp_path / "c"], weights)
    with pytest.raises(ValueError, match="student_config"):
        start_from(model, [tmp_path])


def test_muon_in_float32_steps_as_torchs_own_does(monkeypatch):
    steps = {}
    for capable in (True, False):
        monkeypatch.setattr("model_store.distill.trainer.has_bf16", lambda on_cpu, capable=capable: capable)
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((24, 40), (40, 24), (24,))]
        optimizer = MatrixOptimizer(parameters, 1e-3, 0.0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        steps[capable] = [parameter.detach() for parameter in parameters]
    for own, torchs in zip(steps[False], steps[True], strict=True):
        assert (own - torchs).norm() < 0.02 * torchs.norm() != 0
    assert not torch.equal(steps[False][0], steps[True][0])  # so that torch's does not go unpatched unnoticed


def test_small_bias_draws_more_small_sizes_and_keeps_all():
    elasticity = Elasticity.last_to_first(30, [*range(0, 30, 2), 29])
    means = {}
    for bias in (1.0, 2.0):
        preset = SimpleNamespace(pure_share=0.25, small_bias=bias, order_noise=0.0, row_sizes=())
        drawn = [SizeSampler(elasticity, preset, 0)(step, 16)[0] for step in range(200)]
        assert all(sizes == sorted(sizes) and sizes.count(16) >= 4 for sizes in drawn)
        others = [size for sizes in drawn for size in sizes[4:]]
        assert set(others) == set(elasticity.sizes[1:-1])
        means[bias] = sum(others) / len(others)
    assert means[2.0] < means[1.0] - 1
    assert PRESETS["published"].pure_share == 1.0
    preset = SimpleNamespace(pure_share=0.25, small_bias=1.7, order_noise=0.0, row_sizes=(29, 28, 28, 20))
    sampler = SizeSampler(elasticity, preset, 0)
    assert all(sampler(step, 16)[0] == [16] * 4 + [20] * 3 + [28] * 6 + [29] * 3 for step in range(20))


def test_chat_figures_carry_intervals():
    assert wilson_interval(0, 40)[0] == 0.0 and 0.05 < wilson_interval(0, 40)[1] < 0.12
    low, high = wilson_interval(20, 40)
    assert math.isclose(low, 1 - high) and 0.34 < low < 0.36
    loop, fine = [5, 6] * 20, [*range(30), 0]
    answers = {2: Answers.of([loop, fine], {0}), 4: Answers.of([fine, fine], {0})}
    rows = compare(answers, 4)
    assert rows[2]["repetition"] == 0.5 and rows[2]["stop_rate"] == 0.5 and rows[4]["stop_rate"] == 1.0
    assert rows[2]["length_ratio"] == pytest.approx(71 / 62) and rows[4]["length_ratio_ci"] == pytest.approx(0)


def test_low_rank_training_equals_training_the_factors(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)[0], dtype=torch.float32)
    model = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    factors = make_low_rank(model, 4)
    first = factors[0]
    start = (first.a.detach().clone(), first.b.detach().clone())
    assert torch.linalg.matrix_rank((first.weight - first.base).float(), rtol=2e-2) <= 4
    x, target = torch.randn(5, first.weight.shape[1]), torch.randn(5, first.weight.shape[0])
    a, b = (value.clone().requires_grad_() for value in start)
    F.mse_loss(x @ (first.base + b @ a).T, target).backward()
    optimizer = LowRankOptimizer(factors, [], lr=1e-2, weight_decay=0.0)
    F.mse_loss(F.linear(x, first.weight), target).backward()
    optimizer.step()
    torch.testing.assert_close(first.a.grad, a.grad, rtol=0.05, atol=0.05 * float(a.grad.abs().max()))
    torch.testing.assert_close(first.b.grad, b.grad, rtol=0.05, atol=0.05 * float(b.grad.abs().max()))
    assert not torch.equal(first.a, start[0])
    torch.testing.assert_close(first.weight, first.base + first.b @ first.a, rtol=0.02, atol=2e-3)
    state = optimizer.state_dict()
    with torch.no_grad():
        first.a.zero_()
    optimizer.load_state_dict(state)
    assert first.a.abs().sum() == state["factors"][0][0].abs().sum()


def test_a_run_that_was_cut_short_is_a_place_to_start_from(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)[0], dtype=torch.float32)
    model = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]))
    with torch.no_grad():
        model.student["1"].mlp.down_proj.weight.zero_()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    write_config(checkpoint.parent, model)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    other = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]))
    assert start_from(other, [checkpoint]) == {0: 1, 1: 1, 2: 1}
    assert other.student["1"].mlp.down_proj.weight.abs().sum() == 0


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_low_rank_factors_are_the_best_in_the_weighted_norm(shape):
    torch.manual_seed(0)
    difference = torch.randn(*shape)
    a, b = low_rank_factors(difference, 5)
    u, s, vt = torch.linalg.svd(difference)
    torch.testing.assert_close(b @ a, u[:, :5] @ torch.diag(s[:5]) @ vt[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    inputs = torch.randn(200, shape[1]) * torch.linspace(0.1, 3, shape[1])
    moment = inputs.T @ inputs
    error = lambda a, b: float(((difference - b @ a) @ inputs.T).norm())  # noqa: E731
    assert error(*low_rank_factors(difference, 5, moment)) < error(a, b)


@pytest.mark.parametrize("own_ends", [False, True])
def test_kl_of_paths_keeps_states_without_changing_a_figure(tmp_path, own_ends):
    teacher = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path)[0], dtype=torch.float32)
    model = ElasticModel(teacher, Elasticity.last_to_first(6, [0, 2, 4]), own_ends=own_ends).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, teacher.config.vocab_size, (2, 8))
    reference = F.log_softmax(model.logits(model.hidden(ids, [True] * 3)), -1)[:, 3::4]
    kl, paths = kl_of_paths(model, [ids]), list(itertools.product([True, False], repeat=3)) * 3
    random.Random(0).shuffle(paths)
    for path in paths:
        ours = F.log_softmax(model.logits(model.hidden(ids, path), path[-1]), -1)[:, 3::4]
        expected = float((reference.exp() * (reference - ours)).sum(-1).mean())
        assert kl(path) == pytest.approx(expected, abs=1e-6)
    run, runs = model.run_station, []
    model.run_station = lambda index, *rest: runs.append(index) or run(index, *rest)
    assert sorted(greedy_order(model.elasticity, kl)) == [0, 1, 2]
    assert len(runs) < 5 * 3  # five paths are tried, three stations each


@pytest.mark.parametrize(
    ("direction", "places", "expected"),
    [
        ("up", None, [3, 2, 1, 0]), ("down", None, [3, 2, 1, 0]),  # the costliest first; missed least, so last
        ("up", 1, [3, 1, 0, 2]), ("up", 2, [3, 2, 1, 0]), ("down", 1, [1, 3, 2, 0]), ("down", 9, [3, 2, 1, 0]),
    ],
)  # fmt: skip
def test_a_search_of_some_places_leaves_the_others_in_their_order(direction, places, expected):
    kept, cost = [0, 2, 4, 6], [1, 2, 3, 4]  # what a block costs while it is the student's
    own = Elasticity.from_order(8, kept, [1, 3, 0, 2])
    divergence = lambda sides: sum(c for c, on_teacher in zip(cost, sides, strict=True) if not on_teacher)  # noqa: E731
    assert greedy_order(own, divergence, direction, places=places) == expected


@pytest.mark.parametrize("own_ends", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_beside_a_bfloat16_teacher_at_any_mixture_of_sizes(family, own_ends):
    elasticity = Elasticity.last_to_first(6, [0, 2, 4])
    ids, mask = torch.randint(0, 131, (6, 16)), torch.ones(6, 16)
    sizes, losses = [3, 3, 4, 4, 5, 6], {}
    for dtype in (torch.float32, torch.bfloat16):
        model = ElasticModel(make_model(family, 6, seed=1).to(dtype), elasticity, own_ends=own_ends)
        for thresholds in (elasticity.thresholds, elasticity.thresholds[::-1]):  # teacher's blocks after, and before
            model.zero_grad()
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model(ids, mask, sizes, thresholds, LossWeights(ce=0.5))
            out["loss"].backward()
            assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.student.parameters())
            losses.setdefault(dtype, []).append(out["loss"].item())
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


@pytest.mark.parametrize("said_by", ["16", 0, -3, 1.5, True])
def test_who_said_it_is_a_number_of_layers(said_by, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two", "said_by": said_by}) + "\n")
    with pytest.raises(ValueError, match=r"data.jsonl line 2: said_by is a number of layers"):
        list(read_documents(file))


def test_who_said_it_is_a_size_of_the_pair():
    plain, said = Document(text="one"), Document(text="two", said_by=16)
    check_speakers([plain, said], range(16, 31), are_needed=True)
    check_speakers([plain], range(16, 31), are_needed=False)
    with pytest.raises(ValueError, match=r"said_by 16L is no size of the pair \(18L to 36L\)"):
        check_speakers([said], range(18, 37), are_needed=False)
    with pytest.raises(ValueError, match="--unlikelihood: no document of --data has said_by"):
        check_speakers([plain], range(16, 31), are_needed=True)
