"""The cost model: its formula against batches, what it learns, and what is kept of it."""

import dataclasses
import json

import numpy as np
import pytest

from server.core.batch import BatchBuilder, build_batch
from server.cost.calibrate import from_json, load, save
from tests.sizing.machines import ELASTICITY, machine, make_replica, make_request, profile


def test_more_of_anything_costs_more():
    cost = machine()
    tokens = [0, 1, 2, 7, 64, 500, 2048, 9000]
    for curve in (cost.layer, cost.head):
        assert (np.diff([curve(n) for n in tokens]) >= 0).all() and curve(0) == 0
        for largest in (4096, 9000):
            numbers = [n for n in tokens if n <= largest]
            assert [curve.upto(largest)[n] for n in numbers] == pytest.approx([curve(n) for n in numbers], rel=1e-12)
    for seconds in (0.01, 0.5):
        assert cost.layer(cost.layer.inverse(seconds)) == pytest.approx(seconds, rel=1e-6)


def test_the_simulator_sees_a_step_as_the_engine_does():
    replica = make_replica()
    for size, prompt in ((12, 40), (9, 1), (6, 100), (6, 3)):
        replica.scheduler.add(make_request(prompt, sizes=(size,)))
    for _ in range(3):
        planned = replica.scheduler.schedule()
        batch = build_batch(planned.scheduled, ELASTICITY, replica.kv_cache.block_tables)
        plain, exact = replica._shape(planned.scheduled), machine().shape(batch)
        assert plain.kind == exact.kind
        assert plain.features == pytest.approx(exact.features)
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


def test_a_layout_outlives_changes_of_width_that_leave_equal_rows_side_by_side():
    replica = make_replica()
    for _ in range(4):
        replica.scheduler.add(make_request(1, sizes=(12,)))
    for _ in range(2):
        planned = replica.scheduler.schedule()
        replica.now += replica.run_step(replica.now)[0]
    build, layouts = BatchBuilder(ELASTICITY, replica.kv_cache.block_tables, (), 0), []
    for widths in ((16, 8, 8, 4), (6, 8, 8, 4), (4, 8, 8, 5), (8, 8, 8, 8), (8, 6, 6, 8)):
        for (request, _), width in zip(planned.scheduled, widths, strict=True):
            request.width = width
        batch = build(planned.scheduled)
        layouts.append(batch.layout)
        rows = [request.width for request in batch.requests]
        assert batch.widths.tolist() == rows
        assert rows == sorted(rows, key=rows.index), "equal rows lie side by side"
    assert len(set(layouts[:4])) == 1 and layouts[4] != layouts[0]


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


def test_a_loud_neighbour_does_not_poison_the_next_start(tmp_path):
    """Steps that took five times as long for the whole of a run; the next start begins with at most 1.5 of the best."""
    cost, path = machine(), tmp_path / "calibration.json"
    replica, shapes = make_replica(), []
    rng = np.random.default_rng(0)
    for _ in range(400):
        if len(replica.scheduler.requests) < 8:
            replica.scheduler.add(make_request(int(rng.integers(1, 200)), sizes=(int(rng.integers(6, 13)),)))
        planned = replica.scheduler.schedule()
        shapes.append(replica._shape(planned.scheduled))
        cost.observe(shapes[-1], 5.0 * machine().seconds(shapes[-1]) * rng.lognormal(0, 0.03))
        cost.observe_overhead(2e-4 if len(shapes) < 40 else 5e-3, len(planned.scheduled))
        replica.scheduler.update(planned, replica.sample(planned))
    assert cost.seconds(shapes[-1]) > 4 * machine().seconds(shapes[-1])
    cost.settle()
    save(cost, path)
    again = load(None, path)
    for kind in again.correction:
        own = [shape for shape in shapes if shape.kind == kind]
        assert sum(map(again.seconds, own)) <= 1.51 * sum(map(machine().seconds, own)), kind
    assert again.overhead <= 1.51 * 2e-4 and again.best.scale == dict.fromkeys(again.correction, 1.0)


def test_the_best_is_what_was_sustained():
    cost, replica = machine(), make_replica()
    replica.scheduler.add(make_request(64))
    shape = replica._shape(replica.scheduler.schedule().scheduled)
    usual = cost.seconds(shape)
    cost.observe(shape, 0.01 * usual)  # one step that was timed wrongly
    for _ in range(31):
        cost.observe(shape, usual)
    assert cost.best.seconds(shape) > 0.9 * usual
    for factor in (0.8, 3.0):
        for _ in range(64):
            cost.observe(shape, factor * usual)
    assert cost.best.seconds(shape) == pytest.approx(0.8 * usual)
    assert cost.at_best().seconds(shape) == pytest.approx(0.8 * usual)


def test_what_is_kept_comes_back(tmp_path):
    cost, path = machine(), tmp_path / "store" / "calibration.json"
    cost.overhead = 0.003
    save(cost, path)
    again = load(None, path)
    assert (again.coefficients == cost.coefficients).all() and again.overhead == 0.003 and again.path == path
    assert (again.best.coefficients == cost.best.coefficients).all() and again.best.overhead == 0.0
    assert again.profile == profile() or again.profile.elasticity.thresholds == ELASTICITY.thresholds
    content = json.loads(path.read_text())
    for spoilt in (
        {"format": 0},
        {"best": {}},
        {"best": content["best"] | {"coefficients": [1.0]}},
        {"coefficients": [1.0]},
        {"coefficients": [float("nan")] * len(cost.coefficients)},
    ):
        with pytest.raises(ValueError):
            from_json(content | spoilt)
    path.write_text("{")
    assert load(None, path) is None and load(None, tmp_path / "nothing") is None
