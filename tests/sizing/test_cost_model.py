"""The cost model: its formula against batches, what it learns, and what is kept of it."""

import dataclasses
import json

import numpy as np
import pytest

from server.core.batch import BatchBuilder, build_batch
from server.cost.calibrate import from_json, load, save
from server.cost.model import CostModel
from tests.sizing.machines import ELASTICITY, machine, make_replica, make_request, profile


def test_more_of_anything_costs_more():
    cost = machine()
    tokens = np.array([0, 1, 2, 7, 64, 500, 2048, 9000])
    assert (np.diff(cost.layer_seconds(tokens)) >= 0).all() and cost.layer_seconds(0) == 0
    assert (np.diff(cost.head_seconds(tokens)) >= 0).all()
    for seconds in (0.01, 0.5):
        assert cost.layer_seconds(cost.tokens_within(seconds)) == pytest.approx(seconds, rel=1e-6)


def test_the_simulator_sees_a_step_as_the_engine_does():
    replica = make_replica()
    for size, prompt in ((12, 40), (9, 1), (6, 100), (6, 3)):
        replica.scheduler.add(make_request(prompt, sizes=(size,)))
    for _ in range(3):
        planned = replica.scheduler.schedule()
        batch = build_batch(planned.scheduled, ELASTICITY, replica.kv_cache.block_tables)
        plain, exact = replica._shape(planned.scheduled), machine().shape(batch)
        assert plain.kind == exact.kind
        assert plain.features[:-8] == pytest.approx(exact.features[:-8])  # but for the head: one tensor there
        assert plain.features[-3:] == pytest.approx(exact.features[-3:])
        replica.now += replica.run_step(replica.now)[0]


def test_a_layout_that_is_taken_over_is_what_would_be_built_anew():
    replica, cost = make_replica(), machine()
    tables = replica.kv_cache.block_tables
    build, layouts = BatchBuilder(ELASTICITY, tables, (), 0), []
    for size, prompt in ((12, 40), (9, 1), (6, 100), (6, 3)):
        replica.scheduler.add(make_request(prompt, sizes=(size,)))
    for _ in range(6):
        planned = replica.scheduler.schedule()
        kept, anew = build(planned.scheduled), build_batch(planned.scheduled, ELASTICITY, tables)
        layouts.append(kept.layout)
        for field in dataclasses.fields(anew):
            if field.name != "layout":
                assert np.array_equal(getattr(kept, field.name), getattr(anew, field.name)), field.name
        shape = cost.shape(kept)
        assert shape.kind == machine().shape(anew).kind
        assert shape.features == pytest.approx(machine().shape(anew).features)
        kept.context_lens = np.full_like(kept.context_lens, 2**30)  # no sum of contexts is too large
        assert (cost.shape(kept).features >= 0).all()
        replica.now += replica.run_step(replica.now)[0]
    assert layouts[0] == 0 and len(set(layouts)) < len(layouts) - 1  # prompts first; then one layout for several steps


def test_a_wrong_model_learns_from_steps():
    """Steps take 1.6 times what was calibrated, and the error goes away within the steps of a few seconds."""
    cost, replica = machine(), make_replica()
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(400):
        if len(replica.scheduler.requests) < 8:
            replica.scheduler.add(make_request(int(rng.integers(1, 200)), sizes=(int(rng.integers(6, 13)),)))
        planned = replica.scheduler.schedule()
        shape = replica._shape(planned.scheduled)
        seconds = 1.6 * float(shape.features @ machine().coefficients) * rng.lognormal(0, 0.03)
        errors.append(abs(cost.observe(shape, seconds) / seconds - 1))
        replica.scheduler.update(planned, replica.sample(planned))
    assert np.median(errors[:10]) > 0.2 and np.median(errors[-200:]) < 0.05
    assert cost.errors["all"].count == 400 and cost.errors["all"].quantile(0.5) < 0.1
    assert cost.errors["all"].measured == pytest.approx(cost.errors["all"].predicted, rel=0.1)


def test_an_outlier_moves_little():
    cost, replica = machine(), make_replica()
    replica.scheduler.add(make_request(64))
    shape = replica._shape(replica.scheduler.schedule().scheduled)
    usual = cost.seconds(shape)
    cost.observe(shape, 50 * usual)
    assert cost.seconds(shape) < 1.1 * usual


def test_what_is_kept_comes_back(tmp_path):
    cost, path = machine(), tmp_path / "store" / "calibration.json"
    cost.overhead = 0.003
    save(cost, path)
    again = load(None, path)
    assert (again.coefficients == cost.coefficients).all() and again.overhead == 0.003 and again.path == path
    assert again.profile == profile() or again.profile.elasticity.thresholds == ELASTICITY.thresholds
    content = json.loads(path.read_text())
    for spoilt in ({"format": 0}, {"coefficients": [1.0]}, {"coefficients": [float("nan")] * len(cost.coefficients)}):
        with pytest.raises(ValueError):
            from_json(content | spoilt)
    path.write_text("{")
    assert load(None, path) is None and load(None, tmp_path / "nothing") is None


def test_kv_bytes_are_whole_pages_of_the_size():
    assert profile().kv_bytes_for(17, 6, 16) == 32 * 6 * 1024
    assert CostModel(profile(), machine().coefficients).profile.kv_bytes_for(1, 12) == 12 * 1024
