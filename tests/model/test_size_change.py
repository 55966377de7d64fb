"""A request that changes size in mid-answer equals the oracle that computes the text so far on the new path."""

import random

import pytest

from tests.model.test_oracle import executor, make_engine, make_request, open_order, run  # noqa: F401
from tests.tiny_pairs import VOCAB, Oracle, make_pair

SCHEDULES = [((4, 5), (6, 0)), ((6, 3), (4, 4), (5, 0)), ((5, 1), (6, 30)), ((6, 0),)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    teacher, student = make_pair(tmp_path_factory.mktemp("change"), "llama")
    return teacher, student, Oracle(teacher, student)


@pytest.mark.parametrize("order", ["last_to_first", "first_to_last", "mixed"])
def test_a_schedule_equals_a_fresh_prompt_at_every_change(family, order, executor):  # noqa: F811
    teacher, student, oracle = family
    pair = open_order(teacher, student, order)
    engine = make_engine(pair, executor)
    rng, total = random.Random(4), 14
    requests = []
    for index, schedule in enumerate(SCHEDULES):
        request = make_request(f"s{index}", [rng.randrange(VOCAB) for _ in range(5 + 9 * index)], 6, max_tokens=total)
        request.size_schedule = schedule
        requests.append(request)
    outputs = run(engine, requests)
    for request, schedule in zip(requests, SCHEDULES, strict=True):
        text, left = list(request.prompt_token_ids), total
        for size, count in schedule:
            count = min(count or left, left)
            text += oracle.greedy(pair.elasticity, size, text, count)
            left -= count
        assert request.output_token_ids == text[request.num_prompt_tokens :][:total]
        decisions = [output.decision for output in outputs[request.request_id] if output.decision is not None]
        told = [(decision.size, decision.after_tokens) for decision in decisions]
        ends = [sum(count for _, count in schedule[:i]) for i in range(len(schedule))]
        assert told == [(size, end) for (size, _), end in zip(schedule, ends, strict=True)]
    assert engine.scheduler.num_resizes == sum(len(schedule) - 1 for schedule in SCHEDULES)
