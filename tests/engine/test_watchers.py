"""What only watches an engine cannot stop it."""

import pytest
import torch

from server.engine.stats import MetricsSink
from tests.kernels.steps import make_pair
from tests.model.test_oracle import make_engine, make_request, run

HEARD = ("on_step", "on_first_token", "on_request_finished", "on_size_decision")


@pytest.mark.parametrize("name", HEARD)
def test_metrics_that_raise_are_logged_and_everybody_is_answered(name, caplog):
    class Broken(MetricsSink):
        pass

    def fail(self, subject):
        raise ValueError("a broken gauge")

    setattr(Broken, name, fail)
    engine = make_engine(None, "torch", loaded=make_pair("llama", torch.float32), metrics=Broken())
    requests = [make_request(f"{size}", [5, 6, 7], size, max_tokens=3) for size in (4, 6)]
    outputs = run(engine, requests)
    assert all(len(request.output_token_ids) == 3 for request in requests)
    assert all(found[-1].is_finished for found in outputs.values())
    assert "a broken gauge" in caplog.text
