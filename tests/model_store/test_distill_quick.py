"""A student without training: which blocks, what the fit is worth, and that only measured sizes are offered."""

import json

import pytest
import torch
import torch.nn.functional as F

from model_store.assembly import Elasticity
from model_store.beside import load_beside
from model_store.distill.elastic import ElasticModel
from model_store.distill.from_pair import load_elastic
from model_store.distill.gate import offered_sizes, only_sizes
from model_store.distill.quick import block_costs, cheapest_blocks
from model_store.distill.warm_start import fit_by_least_squares
from model_store.distill.write import write_full, write_manifest
from model_store.pair import PairError, open_pair
from model_store.weight_form import WeightForm
from server.cli import main
from tests.api import tiny
from tests.tiny_pairs import make_model


def test_blocks_that_cost_least_together():
    assert cheapest_blocks([5, 1, 1, 4, 2], 1) == [1]
    assert cheapest_blocks([5, 1, 1, 4, 2], 2) == [1, 4]
    assert cheapest_blocks([3, 1, 3, 9, 9], 3) == [0, 2, 4]  # the only three that do not overlap
    assert cheapest_blocks([3, 1, 3, 9, 9], 2) == [0, 2]  # not the cheapest one, and then what is left


def test_only_sizes_that_are_worth_it():
    assert offered_sizes({4: 0.9, 5: 0.5, 6: 0.6, 7: 0.2, 8: 0.0}, 1.0) == [4, 5, 7, 8]
    assert offered_sizes({4: 0.9, 5: 0.5, 6: 0.6, 7: 0.2, 8: 0.0}, 0.55) == [5, 7, 8]
    assert offered_sizes({4: 0.9, 5: float("nan"), 6: 0.0}, 0.5) == [6]


def test_what_is_not_offered_is_no_size():
    own = Elasticity.from_order(8, (0, 2, 4, 6, 7), [1, 0, 2])  # sizes 5 to 8
    assert own.sizes == (5, 6, 7, 8)
    for offered in ([5, 6, 7, 8], [6, 7, 8], [6, 8], [7, 8], [5, 8]):
        elasticity, stations = only_sizes(own, offered)
        assert elasticity.sizes == tuple(offered)
        for size in offered:
            layers = lambda of, index: [(of.kept[i - 8] if i >= 8 else i, i >= 8) for i in of.path(size).layers]  # noqa
            ours = {first for first, is_student in layers(elasticity, 0) if is_student and first in (0, 2, 4)}
            theirs = {first for first, is_student in layers(own, 0) if is_student and first in (0, 2, 4)}
            assert ours - {*range(8)} == set() and theirs <= ours
        assert set(stations.values()) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "gemma3_text", "gpt2"])
def test_a_fit_brings_outputs_nearer(family):
    teacher = make_model(family, 6, seed=1)
    rows = torch.randint(0, 131, (8, 64), generator=torch.Generator().manual_seed(0))
    model = ElasticModel(teacher, Elasticity.last_to_first(6, (0, 2, 4)))
    errors = fit_by_least_squares(model, [rows], fits_attention=True)
    assert set(errors) == {0, 1, 2}

    def distance() -> float:
        states = model.teacher_states(rows)
        fitted = model.run_station(0, states[0], model.rope(states[0]), False)
        return float((states[1] - fitted).detach().norm() / states[1].norm())

    after = distance()
    model.student["0"].load_state_dict(model.body.layers[0].state_dict())
    assert after < distance()
    costs = block_costs(teacher, rows, rows[:2])
    assert len(costs) == 5 and all(cost > 0 for cost in costs)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{i} quick foxes jump over {i * i} lazy dogs, and {i % 7} rest." for i in range(400)))
    return file


def kl_of(model, size, ids):
    reference = F.log_softmax(model.size_logits(ids, 6), -1)
    return float((reference.exp() * (reference - F.log_softmax(model.size_logits(ids, size), -1))).sum(-1).mean())


@pytest.mark.parametrize("data", [True, False])
def test_the_command_makes_a_pair_whose_sizes_were_measured(data, text, tmp_path, capsys):
    teacher = tiny.make_pair(tmp_path)[0]
    command = ["distill", "--quick", "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--max-kl", "100",
               "--tokens", "4000", "--row-tokens", "64", "--keep", "4", "--store", str(tmp_path / "store"),
               "--minutes", "0.05" if data else "0"]  # fmt: skip
    assert main(command + (["--data", str(text)] if data else [])) == 0
    assert "serve it" in capsys.readouterr().out
    pair = open_pair(teacher, tmp_path / "out", store=tmp_path / "store")
    kl = {size: row["kl"] for size, row in pair.quality.items()}
    assert pair.elasticity.sizes == tuple(sorted(kl)) and kl[6] == 0 and pair.elasticity.sizes[0] in (4, 5)
    assert all(kl[a] > kl[b] for a, b in zip(sorted(kl), sorted(kl)[1:], strict=False))
    model = load_elastic(pair, torch.float32)
    ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    assert kl_of(model, pair.elasticity.sizes[0], ids) > 0
    manifest = json.loads((tmp_path / "out" / "pair.json").read_text())
    assert manifest["command"] == "boomerang distill --quick" and manifest["tokens"] > 1000


def test_no_size_is_promised_that_does_not_pass(text, tmp_path, capsys):
    teacher = tiny.make_pair(tmp_path)[0]
    common = ["distill", "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    strict = [
        "--quick",
        "--minutes",
        "0",
        "--data",
        str(text),
        "--tokens",
        "4000",
        "--row-tokens",
        "64",
        "--max-kl",
        "0.000001",
    ]
    assert main(common + strict) == 1
    assert "no size is below --max-kl 1e-06: the best has" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pair.json").exists()
    assert main(common) == 2 and "--data: name files to train on" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_what_is_not_the_students_own_is_there_once(family, tmp_path):
    teacher = make_model(family, 6, seed=1, tied=True)
    teacher.save_pretrained(tmp_path / "teacher")
    model = ElasticModel(teacher, Elasticity.from_order(6, (0, 2, 3, 4), [3, 0]))
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.01)
    (tmp_path / "student").mkdir()
    write_full(tmp_path / "student", model)
    write_manifest(tmp_path / "student", model, {})
    pair = open_pair(tmp_path / "teacher", tmp_path / "student", store=tmp_path)
    assert pair.shares_ends and pair.own_layers == {0, 3}
    form = WeightForm(torch.bfloat16)
    loaded = pair.load(form)
    assert loaded.ends["teacher"] is loaded.ends["student"]
    assert loaded.layers[6 + 1] is loaded.layers[2] and loaded.layers[6 + 3] is not loaded.layers[4]
    assert pair.union_bytes(pair.elasticity.sizes, form) == loaded.num_bytes()
    alone = open_pair(tmp_path / "teacher", "none", store=tmp_path).load(form)
    beside = load_beside(pair, alone, form)
    assert beside.layers[6 + 1] is alone.layers[2] and beside.ends is alone.ends
    assert load_elastic(pair, torch.float32).ends is None
    config = tmp_path / "student" / "student_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"own_layers": [9]}))
    with pytest.raises(PairError, match="own_layers is"):
        open_pair(tmp_path / "teacher", tmp_path / "student", store=tmp_path)


def test_a_run_goes_on_where_it_was(text, tmp_path, capsys):
    teacher = tiny.make_pair(tmp_path)[0]
    out = tmp_path / "out"
    command = ["distill", "--quick", "--teacher", str(teacher), "--out", str(out), "--max-kl", "100", "--data",
               str(text), "--tokens", "4000", "--row-tokens", "64", "--store", str(tmp_path / "store")]  # fmt: skip
    assert main([*command, "--max-kl", "1e-9", "--minutes", "0.1"]) == 1
    assert (out / "work" / "training.pt").is_file()
    assert main([*command, "--minutes", "0.1"]) == 0
    said = capsys.readouterr().err
    assert "going on from" in said and said.count("the student keeps") == 1
    assert not (out / "work").exists()
    assert json.loads((out / "pair.json").read_text())["is_trained"]
