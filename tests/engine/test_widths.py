"""The scheduler's part in precision: what each row of a step reads, which cached prefixes are good enough."""

import pytest

from server.core.request import RequestOutput
from server.core.size_policy import LargestSize
from server.core.width import EXACT, offered_width
from server.engine.async_engine import merge
from server.engine.scheduler import Scheduler
from tests.engine.harness import make_request, make_scheduler, run_step, run_until_idle

WIDTHS = (4, 5, 6, 8, EXACT)


class Dial(LargestSize):
    """A policy that a test turns by hand."""

    def __init__(self, now: int = EXACT, raises: bool = True) -> None:
        self.now, self.raises = now, raises

    def width(self, view, now):
        return self.now

    def raises_rows(self, scheduled, width):
        return self.raises


def scheduler_at(width: int, raises: bool = True, widths=WIDTHS, **changes) -> Scheduler:
    return make_scheduler(policy=Dial(width, raises), widths=widths, **changes)


@pytest.mark.parametrize(("asked", "offered", "expected"), [(16, WIDTHS, 16), (7, WIDTHS, 6), (3, WIDTHS, 4),
                                                            (16, (4, 8), 8), (0, (EXACT,), 16)])  # fmt: skip
def test_the_nearest_width_that_is_offered(asked, offered, expected):
    assert offered_width(asked, offered) == expected


def test_without_a_policy_rows_read_the_widest():
    for widths in (WIDTHS, (4, 8), (EXACT,)):
        scheduler, request = make_scheduler(widths=widths), make_request()
        scheduler.prepare(request)
        scheduler.add(request)
        outputs = run_until_idle(scheduler)
        assert request.widths == [(widths[-1], 0)]
        assert {output.width for output in outputs if output.new_token_ids} == {widths[-1]}


def test_the_width_follows_the_policy_at_every_step_within_the_limits_of_the_request():
    scheduler = scheduler_at(6)
    free, floor, ceiling = make_request(), make_request(min_width=8), make_request(max_width=5)
    for request in (free, floor, ceiling):
        scheduler.prepare(request)
        scheduler.add(request)
    scheduler.policy.raises = False
    run_step(scheduler)
    assert [request.width for request in (free, floor, ceiling)] == [6, 8, 5]
    run_step(scheduler)
    scheduler.policy.now = 4
    run_until_idle(scheduler)
    assert free.widths == [(6, 0), (4, 2)] and ceiling.widths == [(5, 0), (4, 2)] and floor.widths == [(8, 0)]


def test_what_one_row_demands_serves_all_up_to_their_own_limits():
    scheduler = scheduler_at(4)
    free, pinned, ceiling = make_request(), make_request(min_width=EXACT), make_request(max_width=6)
    for request in (free, pinned, ceiling):
        scheduler.prepare(request)
        scheduler.add(request)
    run_step(scheduler)
    assert [request.width for request in (free, pinned, ceiling)] == [EXACT, EXACT, 6]
    scheduler.policy.raises = False  # arithmetic is the bound
    run_step(scheduler)
    assert [request.width for request in (free, pinned, ceiling)] == [4, EXACT, 4]


@pytest.mark.parametrize("sampling", [{"seed": 1}, {"logprobs": 0}, {"prompt_logprobs": 0}, {}])
def test_answers_that_must_be_repeatable_keep_one_width(sampling):
    scheduler = scheduler_at(8)
    limits = {} if sampling else {"min_width": 8, "max_width": 8}
    request = make_request(sampling=sampling, **limits)
    scheduler.prepare(request)
    scheduler.add(request)
    run_step(scheduler)
    scheduler.policy.now = 4
    run_until_idle(scheduler)
    assert request.widths == [(8 if limits else EXACT, 0)]


def test_who_alone_demands_more_is_charged_for_it():
    def charged(width: int, **limits) -> float:
        scheduler, request, sums = scheduler_at(width), make_request(**limits), []
        scheduler.waiting.charge = lambda tenant, amount: sums.append(amount)
        scheduler.prepare(request)
        scheduler.add(request)
        run_until_idle(scheduler)
        return sum(sums)

    assert charged(8, min_width=EXACT) == 1.5 * charged(8) == 1.5 * charged(EXACT, min_width=EXACT)


def test_a_policy_that_fails_costs_no_answer():
    scheduler = scheduler_at(8)
    scheduler.policy.width = lambda view, now: 1 // 0
    request = make_request()
    scheduler.prepare(request)
    scheduler.add(request)
    run_until_idle(scheduler)
    assert request.widths == [(EXACT, 0)]


def ask(scheduler: Scheduler, width: int, **kwargs) -> int:
    """Tokens that a request with the same prompt finds in the cache."""
    scheduler.policy.now = width
    request = make_request(list(range(20)), **kwargs)
    scheduler.prepare(request)
    scheduler.add(request)
    run_until_idle(scheduler)
    return request.num_cached_tokens


def test_prefixes_made_at_an_equal_or_better_width_are_accepted():
    scheduler = scheduler_at(6)
    assert [ask(scheduler, width) for width in (6, 4, 6, 8, 6, 8, EXACT)] == [0, 16, 16, 0, 16, 16, 0]
    scheduler.check_integrity()


def test_a_prefix_is_as_good_as_the_worst_before_it():
    """Ten tokens computed at four bits spoil what comes after them at eight."""
    scheduler = scheduler_at(4, max_num_batched_tokens=10)
    request = make_request(list(range(20)))
    scheduler.prepare(request)
    scheduler.add(request)
    run_step(scheduler)
    scheduler.policy.now = 8
    run_until_idle(scheduler)
    assert ask(scheduler, 8) == 0 and ask(scheduler, 8) == 16


def test_repeatable_answers_take_no_better_prefix():
    scheduler = scheduler_at(EXACT)
    pinned = {"min_width": 5, "max_width": 5}
    assert ask(scheduler, EXACT) == 0
    assert [ask(scheduler, EXACT, **pinned) for _ in "ab"] == [0, 16]
    assert ask(scheduler, EXACT, sampling={"seed": 3}) == 16  # the widest: nothing is better


def test_preempted_requests_come_back_at_the_width_of_the_moment():
    scheduler = scheduler_at(8, num_pages=60, max_num_batched_tokens=64)
    requests = [make_request(list(range(i, 16 + i)), sampling={"max_tokens": 20}) for i in range(3)]
    for request in requests:
        scheduler.prepare(request)
        scheduler.add(request)
    for step in range(200):
        if not scheduler.has_work:
            break
        scheduler.policy.now = 4 if step % 3 else 8
        run_step(scheduler)
    assert scheduler.num_preemptions and all(len(request.output_token_ids) == 20 for request in requests)


def test_outputs_that_are_merged_say_what_each_token_was_made_at():
    exact, narrow, last = RequestOutput("r", [1]), RequestOutput("r", [2, 6], width=4), RequestOutput("r", [3], width=8)
    left = merge(merge(merge(RequestOutput("r"), exact), narrow), last)
    assert (left.width, left.earlier_widths) == (8, ((EXACT, 1), (4, 2)))
    exact, narrow, last = RequestOutput("r", [1]), RequestOutput("r", [2, 6], width=4), RequestOutput("r", [3], width=8)
    right = merge(exact, merge(narrow, last))
    assert (right.width, right.earlier_widths) == (8, ((EXACT, 1), (4, 2)))
    ended = merge(RequestOutput("r", [2], width=5), RequestOutput("r", finish_reason="stop"))
    assert (ended.width, ended.earlier_widths) == (5, ())
