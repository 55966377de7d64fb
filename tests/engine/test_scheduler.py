import random

import pytest

from server.core.request import Budget, RequestStatus
from server.core.size_policy import Refusal, SizePolicy
from server.engine.queue import WaitingQueue
from tests.engine.harness import make_request, make_scheduler, run_step, run_until_idle


def test_a_request_is_admitted_prefilled_in_chunks_and_finished():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = make_request(prompt=20)
    scheduler.add(request)
    counts = []
    while scheduler.has_work:
        output = run_step(scheduler)
        counts.append(output.scheduled[0][1])
    assert counts == [8, 8, 4, 1, 1, 1, 1]
    assert request.status == RequestStatus.FINISHED_LENGTH and request.output_token_ids == [7] * 5
    assert scheduler.kv_cache.num_free_pages == scheduler.kv_cache.num_pages


def test_the_budget_is_in_layer_tokens_so_small_sizes_get_longer_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    small = make_request(prompt=40, size=4)
    scheduler.add(small)
    assert run_step(scheduler).scheduled == [(small, 12)]  # 8 tokens x 6 layers = 12 tokens x 4 layers


def test_kv_pages_follow_the_size():
    used = {}
    for size in (4, 5, 6):
        scheduler = make_scheduler()
        scheduler.add(make_request(prompt=16, size=size))
        run_step(scheduler)
        used[size] = scheduler.kv_cache.num_pages - scheduler.kv_cache.num_free_pages
    assert used == {4: 16, 5: 20, 6: 24}  # 4 blocks each


def test_prefix_hits_need_the_same_size():
    scheduler = make_scheduler()
    scheduler.add(make_request(prompt=16))
    run_until_idle(scheduler)
    for size, hit in ((5, 0), (6, 12)):  # the last token is always computed, so 12 of 16
        request = make_request(prompt=16, size=size)
        scheduler.add(request)
        run_step(scheduler)
        assert request.num_cached_tokens == hit
    run_until_idle(scheduler)


def test_prefix_blocks_are_shared_while_both_run_and_salt_separates():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    first = make_request(prompt=17)
    scheduler.add(first)
    run_step(scheduler)
    second, salted = make_request(prompt=17), make_request(prompt=17, cache_salt="x")
    scheduler.add(second)
    scheduler.add(salted)
    run_step(scheduler)
    assert second.num_cached_tokens == 16 and salted.num_cached_tokens == 0
    assert [b.ref_count for b in first.blocks[:4]] == [2] * 4
    run_until_idle(scheduler)


def test_preemption_gives_way_to_the_oldest_and_everyone_finishes():
    scheduler = make_scheduler(num_pages=60, enable_prefix_caching=False)
    requests = [make_request(prompt=12, sampling={"max_tokens": 20}) for _ in range(4)]
    for request in requests:
        scheduler.add(request)
    run_until_idle(scheduler)
    assert scheduler.num_preemptions > 0 and requests[0].num_preemptions == 0
    assert all(len(r.output_token_ids) == 20 for r in requests)
    assert scheduler.kv_cache.num_free_pages == 60


def test_priority_orders_admission_and_chooses_the_victim():
    scheduler = make_scheduler(max_num_seqs=1)
    low, high = make_request(priority=5), make_request(priority=-1)
    scheduler.add(low)
    scheduler.add(high)
    assert run_step(scheduler).scheduled[0][0] is high
    run_until_idle(scheduler)


def test_abort_waiting_and_running():
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request(), make_request()
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    outputs = scheduler.abort([running.request_id, waiting.request_id, "unknown"])
    assert [o.finish_reason for o in outputs] == ["abort", "abort"]
    assert not scheduler.has_work
    scheduler.check_integrity()
    assert scheduler.kv_cache.num_free_pages == scheduler.kv_cache.num_pages


def test_stop_conditions():
    cases = [
        ({"eos_token_ids": frozenset({7})}, "stop", 1),
        ({"eos_token_ids": frozenset({7}), "ignore_eos": True}, "length", 5),
        ({"eos_token_ids": frozenset({7}), "min_tokens": 3}, "stop", 3),
        ({"stop_token_ids": frozenset({7})}, "stop", 1),
        ({"max_tokens": 0}, "length", 0),
    ]
    for sampling, reason, length in cases:
        scheduler = make_scheduler()
        request = make_request(sampling=sampling)
        scheduler.add(request)
        last = run_until_idle(scheduler)[-1]
        assert (last.finish_reason, len(request.output_token_ids)) == (reason, length), sampling
        assert last.stop_reason == (7 if "stop_token_ids" in sampling else None)


def test_model_length_ends_a_request():
    scheduler = make_scheduler(max_model_len=16)
    request = make_request(prompt=10, sampling={"max_tokens": 50})
    scheduler.add(request)
    assert run_until_idle(scheduler)[-1].finish_reason == "length" and request.num_tokens == 16


def test_sizes_that_could_never_fit_are_dropped_or_refused():
    scheduler = make_scheduler(num_pages=20)  # 5 blocks of the smallest size, 3 of the largest
    request = make_request(prompt=12, size=(4, 5, 6), sampling={"max_tokens": 4})
    assert scheduler.limit_sizes(request) is None
    assert request.sizes == (4,) and request.size_reason == "kv_capacity"
    assert "KV-cache pages" in scheduler.limit_sizes(make_request(prompt=12, size=6))


def test_a_policy_may_refuse_or_hold_back():
    class Policy(SizePolicy):
        answer = None

        def choose(self, request, view, now):
            return self.answer

    policy = Policy()
    scheduler = make_scheduler(policy=policy)
    scheduler.add(make_request())
    assert not run_step(scheduler).scheduled
    policy.answer = Refusal("busy", 503, retry_after=2.0)
    (output,) = run_step(scheduler).outputs
    assert (output.error, output.error_status, output.retry_after) == ("busy", 503, 2.0)
    assert not scheduler.has_work


@pytest.mark.parametrize("seed", range(6))
def test_random_life_leaves_nothing_behind(seed):
    draw = random.Random(seed)
    scheduler = make_scheduler(num_pages=draw.choice([80, 200, 1000]), max_num_seqs=draw.choice([2, 8]))
    alive = []
    for _ in range(400):
        if draw.random() < 0.4:
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
            request = make_request(
                prompt, size=draw.choice([4, 5, 6, (4, 5, 6)]), priority=draw.randrange(2),
                sampling={"max_tokens": draw.randrange(12), "eos_token_ids": frozenset({3})},
            )  # fmt: skip
            if scheduler.limit_sizes(request) is None:
                scheduler.add(request)
                alive.append(request)
        if draw.random() < 0.1 and alive:
            scheduler.abort([draw.choice(alive).request_id])
        run_step(scheduler, draw)
    run_until_idle(scheduler)
    assert scheduler.kv_cache.num_free_pages == scheduler.kv_cache.num_pages
    assert all(request.is_finished for request in alive)
    scheduler.kv_cache.reset_prefix_cache()
    scheduler.check_integrity()


def test_a_request_past_its_ttft_limit_goes_behind_those_that_can_still_be_on_time_but_not_for_ever():
    queue = WaitingQueue()
    late, fresh, free = (make_request(budget=Budget(ttft=ttft)) for ttft in (1.0, 1.0, None))
    for request, arrival in ((late, 0.0), (fresh, 1.0), (free, 1.1)):
        request.arrival_time = arrival
        queue.push(request)
    assert queue.peek(0.5) is late
    assert queue.peek(0.9, first_token_after=lambda request: 0.2) is fresh  # would come too late, though it is not yet
    assert queue.peek(1.5) is fresh
    queue.remove(fresh)
    assert queue.peek(1.6) is free and queue.peek(8.5) is late
    queue.remove(free)
    assert queue.peek(1.7) is late
    queue.remove(late)
    assert queue.peek(1.8) is None and not len(queue)


# (TTFT limit, strict) of requests in turn; the first gets the only slot, and keeps it
STRICT = ((9.0, True), (1.0, True), (1.0, False), (2.0, True))


def test_a_strict_request_is_refused_as_soon_as_its_limit_has_passed_wherever_it_waits():
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [make_request(budget=Budget(ttft=limit, strict=strict)) for limit, strict in STRICT]
    clock = [0.0]
    scheduler.clock = lambda: clock[0]
    for request in requests:
        request.arrival_time = 0.0
        scheduler.add(request)
    refused = []
    for clock[0] in (0.0, 0.5, 1.5, 2.5):
        output = scheduler.schedule()
        refused.append([r.request_id for r in output.outputs if r.error])
        assert all(r.error_status == 503 and r.retry_after >= 1 for r in output.outputs if r.error)
    assert refused == [[], [], [requests[1].request_id], [requests[3].request_id]]
    assert [request.is_finished for request in requests] == [False, True, False, True]
