"""A request that changes size in mid-answer equals the oracle that computes the text so far on the new path."""

import itertools
import random

import pytest
import torch

from model_store.weight_form import WeightForm
from server.core.request import SizeDecision
from server.core.size_policy import LargestSize
from tests.model.test_low_rank_lanes import executor  # noqa: F401
from tests.model.test_oracle import all_logprobs, make_engine, make_request, open_order, run
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import VOCAB, Oracle, make_model, make_pair

SCHEDULES = [((4, 5), (6, 0)), ((6, 3), (4, 4), (5, 0)), ((5, 1), (6, 30)), ((6, 0),), ((5, 5), (6, 4), (5, 0))]
ORDERS = ["last_to_first", "first_to_last", "mixed"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    teacher, student = make_pair(tmp_path_factory.mktemp("change"), request.param)
    return teacher, student, Oracle(teacher, student)


def make_scheduled(schedule, length, name="s", total=14, rng=random, **sampling):
    request = make_request(name, [rng.randrange(VOCAB) for _ in range(length)], 6, max_tokens=total, **sampling)
    request.size_schedule = schedule
    return request


def check(oracle, elasticity, requests, outputs=None):
    """Texts, and scores if there are any, equal the oracle's; every change was told."""
    for request in requests:
        text, left = list(request.prompt_token_ids), request.sampling.max_tokens
        scores = []
        for size, count in request.size_schedule:
            count, start = min(count or left, left), len(text)
            said = request.output_token_ids[start - request.num_prompt_tokens :][:count]
            text += oracle.greedy(elasticity, size, text, count, said)
            left -= count
            scores.append(oracle.logits(elasticity, size, text)[start - 1 : -1])
        assert request.output_token_ids == text[request.num_prompt_tokens :]
        if request.sampling.logprobs is not None:
            reference = torch.log_softmax(torch.cat(scores), -1)
            measured = all_logprobs(outputs[request.request_id])
            assert ((measured - reference).abs() <= 1e-4 * reference.abs().clamp(min=1.0)).all()
        if outputs is not None:
            decisions = [output.decision for output in outputs[request.request_id] if output.decision is not None]
            told = [(decision.size, decision.after_tokens) for decision in decisions]
            legs = request.size_schedule
            ends = [sum(count for _, count in legs[:i]) for i in range(len(legs))]
            assert told == [(size, end) for (size, _), end in zip(legs, ends, strict=True)]


def watch(engine):
    """A list that gets, for each step, how many tokens started from a kept state."""
    counts, build = [], engine.build_batch

    def noting(scheduled):
        batch = build(scheduled)
        counts.append(sum(len(copy.tokens) for copy in batch.restores))
        return batch

    engine.build_batch = noting
    return counts


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("states", [0, 1 << 20], ids=["computed again", "resumed"])
def test_a_schedule_equals_a_fresh_prompt_at_every_change(family, order, executor, states):  # noqa: F811
    teacher, student, oracle = family
    pair = open_order(teacher, student, order)
    engine = make_engine(pair, executor, state_bytes=states)
    counts, rng = watch(engine), random.Random(4)
    requests = [
        make_scheduled(schedule, 5 + 9 * index, f"s{index}", rng=rng, logprobs=-1)
        for index, schedule in enumerate(SCHEDULES)
    ]
    outputs = run(engine, requests)
    check(oracle, pair.elasticity, requests, outputs)
    assert engine.scheduler.num_resizes == sum(len(schedule) - 1 for schedule in SCHEDULES)
    shares = any(
        pair.elasticity.path(a).first_difference(pair.elasticity.path(b))
        for schedule in SCHEDULES for (a, _), (b, _) in itertools.pairwise(schedule)
    )  # fmt: skip
    assert any(counts) == bool(shares and states)


@pytest.mark.parametrize("order", ORDERS)
def test_states_beside_prefix_hits_preemption_and_lack_of_memory(family, order, executor):  # noqa: F811
    """Prompts that begin alike, room for about two of six requests, and states for a part of them."""
    teacher, student, oracle = family
    pair = open_order(teacher, student, order)
    page_bytes = make_engine(pair, executor).executor.page_bytes()
    engine = make_engine(pair, executor, kv_cache_bytes=120 * page_bytes, state_bytes=9 * 8 * 64 * 4)
    assert engine.kv_cache.states.num_pages == 9
    counts, rng = watch(engine), random.Random(5)
    shared = [rng.randrange(VOCAB) for _ in range(17)]
    for wave in range(3):
        requests = []
        for index in range(6):
            legs = [(size, rng.randrange(1, 12)) for size in rng.choices((4, 5, 6), k=4)]
            legs = [leg for i, leg in enumerate(legs) if not i or leg[0] != legs[i - 1][0]]
            legs[-1] = (legs[-1][0], 0)
            request = make_scheduled(tuple(legs), 5 + index, f"w{wave}-{index}", 40, rng)
            request.prompt_token_ids[:0] = shared
            requests.append(request)
        run(engine, requests)
        check(oracle, pair.elasticity, requests)
    assert engine.scheduler.num_preemptions and engine.kv_cache.prefix_hits and any(counts)
    engine.kv_cache.reset_prefix_cache()
    assert engine.kv_cache.states.num_free == 9 and engine.kv_cache.num_free_pages == engine.kv_cache.num_pages


def test_pages_below_the_first_difference_stay(family):
    """They belong to the old blocks, which can still be found, and to the new ones: nothing is held twice."""
    teacher, student, _ = family
    engine = make_engine(open_order(teacher, student, "first_to_last"), "torch", state_bytes=1 << 20)
    request = make_scheduled(((5, 4), (6, 0)), 21)  # 24 tokens are computed at the change, three blocks
    engine.add(request)
    while request.decision is None or request.path.size == 5:
        before = [block.pages for block in request.blocks]
        engine.step()
    blocks, cache = request.blocks, engine.kv_cache
    assert [block.resumes for block in blocks] == [True] * 3
    for old, block in zip(before, blocks, strict=False):
        assert block.pages[:2].tolist() == old[:2].tolist() and not set(block.pages[2:]) & set(old[2:])
    engine.check_integrity()
    assert cache.num_pages - cache.num_free_pages == 3 * 6
    engine.abort(["s"])
    again = make_request("again", request.prompt_token_ids, 5, max_tokens=1)
    run(engine, [again])
    assert again.num_cached_tokens == 16


@pytest.mark.parametrize("order", ORDERS)
def test_a_low_rank_student_resumes(tmp_path, order, executor):  # noqa: F811
    """Stations where rows of both sides share products are left out for rows that start above them, like any other."""
    make_model("llama", 6, seed=1, tied=True).save_pretrained(tmp_path / "teacher")
    write_student(tmp_path / "student", tmp_path / "teacher", quantise=True)
    pair = open_order(tmp_path / "teacher", tmp_path / "student", order)
    texts = []
    for low_rank, states in ((False, 0), (True, 1 << 20)):
        loaded = pair.load(WeightForm(torch.float32, low_rank))
        engine = make_engine(pair, executor, loaded=loaded, state_bytes=states)
        counts, rng = watch(engine), random.Random(6)
        requests = [make_scheduled(legs, 20 + 7 * i, f"s{i}", rng=rng) for i, legs in enumerate(SCHEDULES)]
        run(engine, requests)
        texts.append([request.output_token_ids for request in requests])
    assert texts[0] == texts[1] and any(counts)


def test_the_policy_has_states_kept_for_those_it_may_shrink(family):
    teacher, student, oracle = family
    pair = open_order(teacher, student, "first_to_last")
    engine = make_engine(pair, "torch", state_bytes=1 << 20)

    class Shrinks(LargestSize):
        shrinks_running = True

        def resize(self, view, now):
            ready = [r for r in view.running if len(r.output_token_ids) == 9 and r.path.size == 6]
            return [(request, SizeDecision(5, "load")) for request in ready]

    engine.scheduler.policy = Shrinks()
    counts = watch(engine)
    request = make_request("auto", range(30), 6, max_tokens=20)
    request.sizes = (5, 6)
    run(engine, [request])
    assert sum(counts) == 32  # of 38: blocks of 8
    text = list(range(30)) + request.output_token_ids[:9]
    assert request.output_token_ids[9:] == oracle.greedy(pair.elasticity, 5, text, 11)
