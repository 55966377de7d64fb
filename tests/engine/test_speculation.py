"""Speculation changes speed, never text: against the same engine without it."""

import collections
import random

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.engine.extras.payoff import Payoff
from server.kernels.cpu import library
from server.observe.metrics import Metrics
from tests.model.test_oracle import make_engine, make_request, run
from tests.tiny_pairs import VOCAB, make_pair

SIZES = (4, 5, 6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return open_pair(*make_pair(tmp_path_factory.mktemp("llama")), patch_order="last_to_first")


@pytest.fixture(scope="module")
def loaded(pair):
    """Sizes that are alike, as those of a distilled pair are: every layer adds little."""
    loaded = pair.load(WeightForm(torch.float32))
    for layer in loaded.layers.values():
        layer.o_weight *= 0.1
        layer.down_weight *= 0.1
    loaded.ends["student"] = loaded.ends["teacher"]
    return loaded


def engines(pair, loaded, executor="torch", size=4, **changes):
    """One without speculation, one with. (`loaded` None: each loads its own.)"""
    return (
        make_engine(pair, executor, loaded=loaded, **changes),
        make_engine(pair, executor, loaded=loaded, speculative_size=size, **changes),
    )


def texts(engine, requests, **kwargs):
    run(engine, requests, **kwargs)
    return [(r.output_token_ids, r.status) for r in requests]


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 8, 9, 30]))] for _ in range(count)]


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("size", [4, 5])
def test_greedy_text_is_the_same(pair, loaded, executor, size):
    """Mixed sizes, some of which speculate; chunked prompts; prefix hits on both paths; then once more, cached."""
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    plain, fast = engines(pair, loaded if executor == "torch" else None, executor, size)
    for wave in range(2):
        made = [
            [make_request(f"{wave}.{i}", p, SIZES[i % 3], max_tokens=20) for i, p in enumerate(prompts(7))]
            for _ in range(2)
        ]
        assert texts(plain, made[0]) == texts(fast, made[1])
    stats = fast.speculator.stats
    assert stats.drafts[6] and (size == 5 or stats.drafts[5])
    assert sum(stats.accepted[6]) <= stats.draft_tokens[6]
    assert not fast.speculator.pool.drafts and fast.kv_cache.num_free_pages == fast.kv_cache.num_pages


def test_a_perfect_draft_is_always_accepted(tmp_path):
    """A student that is the teacher with other layers left out would not be; one whose sizes agree is."""
    teacher, student = make_pair(tmp_path)
    pair = open_pair(teacher, student, patch_order="last_to_first")
    loaded = pair.load(WeightForm(torch.float32))
    for layer in loaded.layers.values():  # no layer does anything: all sizes are the same model
        layer.o_weight[:] = 0
        layer.down_weight[:] = 0
    loaded.ends["student"] = loaded.ends["teacher"]
    _, fast = engines(pair, loaded)
    request = make_request("r", [1, 2, 3], 6, max_tokens=25)
    steps = 0
    fast.add(request)
    while fast.has_work:
        fast.step()
        fast.check_integrity()
        steps += 1
    stats = fast.speculator.stats
    assert sum(stats.accepted[6]) == stats.draft_tokens[6] and len(request.output_token_ids) == 25
    assert steps == 1 + 24 // 4  # each step after the prompt: three guesses and one more token


def test_stop_tokens_and_limits_end_inside_a_run_of_guesses(pair, loaded):
    plain, fast = engines(pair, loaded)
    for stop in range(0, VOCAB, 26):
        for limit in (1, 2, 3, 5, 40):
            made = [
                make_request("r", [5, 6, 7], 6, max_tokens=limit, stop_token_ids=frozenset(range(stop, stop + 13)))
                for _ in range(2)
            ]
            assert texts(plain, made[:1]) == texts(fast, made[1:])
    long = [make_request("long", [3] * 60, 6, max_tokens=200) for _ in range(2)]  # max_model_len is 96
    assert texts(plain, long[:1]) == texts(fast, long[1:])


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"logprobs": 2}])
def test_a_seed_gives_the_text_without_speculation(pair, loaded, cut):
    plain, fast = engines(pair, loaded)
    made = [
        [make_request(f"r{i}", p, 6, max_tokens=20, temperature=0.9, seed=i, **cut) for i, p in enumerate(prompts(4))]
        for _ in range(2)
    ]
    assert texts(plain, made[0]) == texts(fast, made[1])
    assert sum(fast.speculator.stats.accepted[6]) > 0


@pytest.mark.parametrize("cut", [{}, {"min_p": 0.1}, {"top_k": 8}])
def test_sampling_follows_the_distribution(pair, loaded, cut):
    """Chi-square of tokens by position, most of which guesses decided, against the engine without speculation."""
    counts = []
    for engine in engines(pair, loaded, max_num_seqs=64, max_num_batched_tokens=512):
        found = collections.Counter()
        for wave in range(16):
            requests = [make_request(f"{wave}.{i}", [9, 4], 6, max_tokens=5, temperature=0.8, **cut) for i in range(64)]
            run(engine, requests, check=False)
            found.update((i, token) for r in requests for i, token in enumerate(r.output_token_ids))
        counts.append(found)
    stats = engine.speculator.stats
    assert 300 < sum(stats.accepted[6]) < 0.9 * stats.draft_tokens[6]
    statistic, degrees = 0.0, 0
    for key in counts[0].keys() | counts[1].keys():
        one, two = counts[0][key], counts[1][key]
        if one + two >= 10:
            statistic += (one - two) ** 2 / (one + two)
            degrees += 1
    # Mean `degrees`, variance 2 x `degrees`: five sigmas.
    assert degrees > 20 and statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_preemption_and_aborts_leave_nothing_behind(pair, loaded):
    page_bytes = make_engine(pair, "torch", loaded=loaded).executor.page_bytes()
    plain, fast = engines(pair, loaded, kv_cache_bytes=100 * page_bytes)
    made = [[make_request(f"p{i}", p, SIZES[i % 3], max_tokens=40) for i, p in enumerate(prompts(8))] for _ in range(2)]
    assert texts(plain, made[0]) == texts(fast, made[1])
    assert fast.scheduler.num_preemptions > 0 and fast.speculator.stats.drafts[6] > 0
    rng = random.Random(3)
    for i, p in enumerate(prompts(12, seed=1)):
        fast.add(make_request(f"a{i}", p, SIZES[i % 3], max_tokens=30))
    while fast.has_work:
        fast.step()
        if fast.scheduler.running and rng.random() < 0.2:
            fast.abort([rng.choice(fast.scheduler.running).request_id])
        fast.check_integrity()
    assert fast.kv_cache.num_free_pages == fast.kv_cache.num_pages


def test_requests_whose_next_logits_depend_on_their_tokens_are_left_alone(pair, loaded):
    plain, fast = engines(pair, loaded)
    made = [
        [
            make_request("penalty", [1, 2], 6, max_tokens=12, repetition_penalty=1.3),
            make_request("bias", [1, 2], 6, max_tokens=12, logit_bias={3: 5.0}),
            make_request("prompt", [1, 2, 3, 4], 6, max_tokens=12, prompt_logprobs=1),
        ]
        for _ in range(2)
    ]
    assert texts(plain, made[0]) == texts(fast, made[1])
    assert fast.speculator.stats.drafts[6] > 0  # of "prompt", once its prompt is through


def test_failures_do_not_spread(pair, loaded, monkeypatch):
    """Guessing that fails costs the guesses; a step with guesses that fails is computed again, in parts."""
    plain, fast = engines(pair, loaded)
    made = [[make_request(f"r{i}", p, 6, max_tokens=20) for i, p in enumerate(prompts(3))] for _ in range(2)]
    expected = texts(plain, made[0])
    for request in made[1]:
        fast.add(request)
    guess, forward, calls = fast.speculator._guess, fast.executor.forward, iter(range(1000))
    monkeypatch.setattr(fast.speculator, "_guess", lambda ready: 1 / 0 if next(calls) % 3 == 2 else guess(ready))

    def fails_on_several(batch):
        if len(set(batch.slots.tolist())) > 1 and any(request.draft_token_ids for request in batch.requests):
            raise RuntimeError("too much at once")
        return forward(batch)

    monkeypatch.setattr(fast.executor, "forward", fails_on_several)
    while fast.has_work:
        fast.step()
        fast.check_integrity()
    assert [(r.output_token_ids, r.status) for r in made[1]] == expected
    assert fast.num_step_failures > 0 and sum(fast.speculator.stats.accepted[6]) > 0


def test_metrics_by_pair_of_sizes(pair, loaded):
    metrics = Metrics()
    fast = make_engine(pair, "torch", loaded=loaded, metrics=metrics, speculative_size=4)
    metrics.attach(fast, "m", 96)
    run(fast, [make_request("r", [1, 2, 3], 6, max_tokens=20), make_request("s", [1, 2], 5, max_tokens=20)])
    values = {
        (sample.name, sample.labels.get("size"), sample.labels.get("draft_size")): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }
    guessed = values["boomerang:spec_decode_draft_tokens_total", "6", "4"]
    assert guessed == fast.speculator.stats.draft_tokens[6] > 0
    by_size = sum(values["boomerang:spec_decode_accepted_tokens_total", size, "4"] for size in "56")
    assert values["vllm:spec_decode_num_accepted_tokens_total", None, None] == by_size
    assert values["vllm:generation_tokens_total", None, None] == 40


def test_depth_follows_cost_and_acceptance():
    """Guesses cost c of a step of the large size; more rows cost little when few and all of it when many."""
    path = type("Path", (), {"size": 6})()
    requests = [type("Request", (), {"path": path})() for _ in range(40)]

    def depth(draft_cost, acceptance, rows):
        payoff = Payoff(6, 4)
        payoff.acceptance[6] = acceptance
        scheduled = [(request, 1) for request in requests[:rows]]
        return payoff.depth(scheduled, requests[:rows], lambda counts: max(1.0, counts[6] / 16), draft_cost)

    assert depth(0.1, 0.9, 1) == 4  # cheap and good: as far as allowed
    assert depth(0.5, 0.7, 1) == 1
    assert depth(0.6, 0.4, 1) == 0
    assert depth(0.1, 0.9, 16) == 0  # the batch is full: every row verified in vain costs its whole share
    payoff = Payoff(6, 1)
    scheduled = [(requests[0], 1)]
    assert payoff.depth(scheduled, requests[:1], lambda counts: 1.0, 0.5) == 1  # hope
    for i in range(30):
        payoff.observe(6, 1, int(i % 3 == 0))
    assert 0.33 < payoff.acceptance[6] < 0.5
    tried = [payoff.depth(scheduled, requests[:1], lambda counts: 1.0, 0.5) for _ in range(600)]
    assert sum(tried) == 2  # now and then one guess, to see whether it would pay again
    assert Payoff(6, 4).depth([(requests[0], 1)], requests[:1], lambda counts: None, None) == 4
