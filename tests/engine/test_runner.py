"""A request whose numbers go wrong in a step fails alone, and so do two of them in one step."""

import numpy as np
import pytest
import torch

from model_store.arrays import to_numpy
from model_store.pair import open_pair
from server.kernels.cpu import library
from tests.model.test_oracle import make_engine, make_request, run
from tests.tiny_pairs import make_pair

POISON = 77


@pytest.mark.parametrize("num_poisoned", [1, 2])
def test_rows_without_numbers_fail_alone(tmp_path, num_poisoned):
    engine = make_engine(open_pair(*make_pair(tmp_path), patch_order="last_to_first"), "torch")
    calm = [make_request(f"calm {i}", [5 + i, 9], 4 + i, max_tokens=4) for i in range(2)]
    run(engine, calm)
    forward = engine.executor.forward

    def poisoned(batch):
        hidden = forward(batch)
        for row in range(batch.num_requests):
            if POISON in batch.input_ids[batch.query_start[row] : batch.query_start[row + 1]]:
                hidden[batch.logits_start[row] : batch.logits_start[row + 1]] = torch.nan
        return hidden

    engine.executor.forward = poisoned
    again = [make_request(f"again {i}", [5 + i, 9], 4 + i, max_tokens=4) for i in range(2)]
    bad = [make_request(f"bad {i}", [8, POISON, i], 5, max_tokens=4) for i in range(num_poisoned)]
    for request in (*again, *bad):
        engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    told = {output.request_id: output.error_status for output in outputs if output.error is not None}
    assert told == {request.request_id: 500 for request in bad}
    assert [r.output_token_ids for r in again] == [r.output_token_ids for r in calm]
    assert engine.kv_cache.num_free_pages == engine.kv_cache.num_pages
    engine.check_integrity()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("executor", ["torch", "native"])
def test_pages_that_may_hold_no_numbers_are_wiped_whole(tmp_path, executor, kv_cache_dtype):
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    pair = open_pair(*make_pair(tmp_path), patch_order="last_to_first")
    engine = make_engine(pair, executor, kv_cache_dtype=kv_cache_dtype)
    tensors = engine.executor.kv_tensors()
    assert sum(tensor.nbytes for tensor in tensors) == engine.kv_cache.num_pages * engine.executor.page_bytes()
    for tensor in map(to_numpy, tensors):  # views
        assert len(tensor) == engine.kv_cache.num_pages
        tensor.view(np.uint8)[:] = 255  # NaN in every float type
    engine.runner.wipe(np.array([1, 3]))
    for tensor in map(to_numpy, tensors):
        kept = [page for page in range(len(tensor)) if page not in (1, 3)]
        values = tensor.view(np.uint8)
        assert not values[[1, 3]].any() and (values[kept] == 255).all()
