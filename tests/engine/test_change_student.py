"""A student comes, and another one after it, while requests run: every token is what the pair of its moment says."""

import dataclasses
import random

import pytest
import torch

from model_store import nested_store
from model_store.arrays import BFLOAT16
from model_store.beside import load_beside
from model_store.pair import PairError, open_pair
from model_store.store import StoreError, store_root
from model_store.weight_form import Storage, WeightForm
from server.core.size_policy import LargestSize
from server.core.width import EXACT
from server.kernels.cpu import library
from tests.model.test_oracle import executor, make_engine, make_request  # noqa: F401
from tests.tiny_pairs import KEPT, VOCAB, Oracle, make_model, make_pair


def change(engine, pair, served, form):
    loaded = load_beside(pair, served, form)
    new = engine.executor.beside(loaded, engine.config)
    engine.change_student(loaded, new, LargestSize())
    engine.check_integrity()
    return loaded


def finish(engine, steps=None):
    while engine.has_work and steps != 0:
        engine.step()
        engine.check_integrity()
        steps = None if steps is None else steps - 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_requests_go_on_and_new_sizes_are_right(tmp_path, family, executor):  # noqa: F811
    teacher, first = make_pair(tmp_path / "a", family)
    _, second = make_pair(tmp_path / "b", family)
    make_model(family, len(KEPT), seed=3, tied=True).save_pretrained(second)
    alone = open_pair(teacher, "none", store=tmp_path)
    pairs = [open_pair(teacher, first, patch_order="last_to_first", store=tmp_path),
             open_pair(teacher, second, patch_order="first_to_last", store=tmp_path)]  # fmt: skip
    oracles = [Oracle(teacher, first), Oracle(teacher, second)]
    form = WeightForm(torch.float32)
    served = alone.load(form)
    engine, rng = make_engine(alone, executor, loaded=served, state_bytes=1 << 16), random.Random(0)
    prompt = lambda: [rng.randrange(VOCAB) for _ in range(20)]  # noqa: E731
    whole = [make_request(f"w{i}", prompt(), 6, max_tokens=40) for i in range(2)]
    for request in whole:
        engine.add(request)
    finish(engine, 5)
    pages = [block.pages.tolist() for block in whole[0].blocks]
    served = change(engine, pairs[0], served, form)
    assert [block.pages.tolist() for block in whole[0].blocks] == pages and whole[0].num_preemptions == 0
    assert engine.sizes == (4, 5, 6)
    small = [make_request(f"s{size}", prompt(), size, max_tokens=12) for size in (4, 5, 6)]
    for request in small:
        engine.add(request)
    finish(engine)
    for request in [*whole, *small]:
        size, text, count = request.sizes[0], request.prompt_token_ids, len(request.output_token_ids)
        expected = oracles[0].greedy(pairs[0].elasticity, size, text, count, request.output_token_ids)
        assert request.output_token_ids == expected, request.request_id

    # Another student: what ran on the first one goes on with the second, its text so far being the prompt.
    running = [make_request(f"r{size}", prompt(), size, max_tokens=20) for size in (4, 6)]
    for request in running:
        engine.add(request)
    finish(engine, 8)
    before = {request.request_id: list(request.output_token_ids) for request in running}
    assert all(before.values())
    change(engine, pairs[1], served, form)
    assert [request.num_preemptions for request in running] == [1, 0]
    again = make_request("again", small[0].prompt_token_ids, 4, max_tokens=12)  # its prefix was cached with the first
    engine.add(again)
    finish(engine)
    for request in [*running, again]:
        so_far = before.get(request.request_id, [])
        said = request.output_token_ids
        text, rest = request.prompt_token_ids + so_far, said[len(so_far) :]
        expected = oracles[1].greedy(pairs[1].elasticity, request.sizes[0], text, len(rest), rest)
        assert said == so_far + expected, request.request_id
    assert engine.kv_cache.num_free_pages == engine.kv_cache.num_pages


def test_a_student_of_another_teacher_is_none(tmp_path):
    teacher, _ = make_pair(tmp_path / "a")
    other, student = make_pair(tmp_path / "b", "qwen3")
    form = WeightForm(torch.float32, storage=Storage.AS_LOADED)
    served = open_pair(teacher, "none", store=tmp_path).load(form)
    with pytest.raises(PairError, match="no student of the teacher"):
        load_beside(open_pair(other, student, patch_order="last_to_first", store=tmp_path), served, form)


@pytest.mark.parametrize("kind", ["codes", "compressed", "widths"])
def test_the_default_pair_is_what_it_is_when_loaded_whole(kind):
    """Differences beside the teacher's codes, matrices in twelve bits, nested codes beside them."""
    if isinstance(library.choose(), list):
        pytest.skip("no native kernels here")
    try:
        pair, alone = open_pair(), open_pair(None, "none")
    except StoreError as error:
        pytest.skip(f"the default teacher cannot be had here: {error}")
    form = WeightForm(BFLOAT16)
    if kind == "codes":
        form = WeightForm(BFLOAT16, low_rank=True, storage=Storage.CODES)
    loaded, whole = alone.load(dataclasses.replace(form, low_rank=False)), pair.load(form)
    if kind == "widths":
        file = nested_store.nested_file(pair, store_root(None))
        if not nested_store.is_current(file):
            pytest.skip("the store has no nested codes of the default pair")
        form = dataclasses.replace(form, widths=(4, 6, 8, EXACT))
        for one in (loaded, whole):
            nested_store.put(one, file, form)
    width = 6 if kind == "widths" else EXACT
    changes = {"compress_weights": kind == "compressed", "kv_cache_bytes": 32 << 20}
    engine = make_engine(alone, "native", loaded=loaded, **changes)
    first = make_request("first", range(5, 20), 30, max_tokens=4)
    engine.add(first)
    finish(engine, 2)
    change(engine, pair, loaded, form)
    answers = []
    for one in (engine, make_engine(pair, "native", loaded=whole, **changes)):
        requests = [make_request(f"r{size}", range(40 + size, 60 + size), size, max_tokens=6) for size in (16, 22, 30)]
        for request in requests:
            request.min_width = request.max_width = width
            one.add(request)
        finish(one)
        answers.append([request.output_token_ids for request in requests])
        assert one.executor.bytes_per_weight == pytest.approx(engine.executor.bytes_per_weight, rel=1e-3)
        assert one.executor.bytes_per_weight_at(width) == pytest.approx(
            engine.executor.bytes_per_weight_at(width), 1e-3
        )
    assert answers[0] == answers[1] and first.is_finished
