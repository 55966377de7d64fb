"""Calibration: it fits whatever engine it runs on, and what it learned outlives a start on a busy machine."""

from __future__ import annotations

import itertools

import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.cost.calibrate import cost_model_for, keep, steps_to_time
from server.engine.engine import Engine
from tests.api.tiny import make_pair


def test_no_step_needs_more_places_or_tokens_than_the_engine_has():
    for places, tokens, length in itertools.product((1, 2, 3, 5, 8, 200), (16, 64, 2048), (128, 8192)):
        for step in steps_to_time(places, tokens, length):
            assert sum(count for count, *_ in step) <= places, (places, step)
            for _, chunk, context, _ in step:
                assert chunk >= 1 and chunk + context <= length, (length, step)


@pytest.mark.parametrize("factor", [20.0, 0.05])
def test_a_calibration_that_no_longer_fits_is_made_anew_and_keeps_the_best(tmp_path, factor):
    """Whether the machine has become slower than what was kept (a neighbour) or faster (one has left)."""
    loaded = open_pair(*make_pair(tmp_path)).load(WeightForm(torch.float32))
    engine = Engine(loaded, EngineConfig(max_model_len=256, max_num_seqs=4, kv_cache_bytes=1 << 22, executor="torch"))
    model = cost_model_for(engine.runner, loaded, tmp_path, seconds=0.2)
    assert model.path is not None and model.path.is_file()
    model.set_coefficients(model.coefficients * factor)
    model.best.coefficients = model.coefficients.copy()
    keep(model)
    again = cost_model_for(engine.runner, loaded, tmp_path, seconds=0.2)
    assert not (again.coefficients == model.coefficients).all()
    best, kept, fresh = (x.sum() for x in (again.best.coefficients, model.best.coefficients, again.coefficients))
    assert best == pytest.approx(min(kept, fresh))
