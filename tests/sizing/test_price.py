"""One price: every copy of the step-time formula agrees with `StepPrice`, and that with what steps are."""

import dataclasses
import math
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.assembly import Elasticity
from server.core.batch import build_batch
from server.core.config import EngineConfig
from server.core.size_policy import LargestSize
from server.core.width import EXACT
from server.cost.features import NUM_FEATURES, layout
from server.cost.model import CostModel
from server.cost.price import HEADROOM, Step, StepPrice
from server.cost.profile import CostProfile
from server.simulation.replica import Replica, ReplicaSpec
from server.sizing.outlook import MOST_BUSY
from server.sizing.policy import BudgetPolicy
from server.sizing.tenants import Tenant, Tenants
from tests.sizing.machines import make_request

CLOSE = {"rel": 1e-9, "abs": 1e-15}
WIDTHS = [(EXACT,), (4, 6, 8, EXACT), (4, 8)]
positive = st.floats(1e-6, 1e-2, allow_subnormal=False)


@st.composite
def cost_models(draw) -> CostModel:
    """Any pair in any nested order, with or without shared stations and head; any coefficients and corrections."""
    num_layers = draw(st.integers(3, 10))
    kept = sorted({0, *draw(st.sets(st.integers(1, num_layers - 1), max_size=num_layers - 2))})
    stops = (*kept[1:], num_layers)
    blocks = [i for i, (a, b) in enumerate(zip(kept, stops, strict=True)) if b - a > 1]
    elasticity = Elasticity.from_order(num_layers, kept, draw(st.permutations(blocks)))
    num_global = elasticity.num_global_layers
    profile = CostProfile(
        elasticity,
        layer_bytes=tuple(draw(st.lists(st.integers(10**5, 10**7), min_size=num_global, max_size=num_global))),
        head_bytes=10**6,
        kv_bytes=1024,
        attention_flops=4096,
        shared_head=draw(st.booleans()),
        shared_stations=frozenset(draw(st.sets(st.sampled_from(range(len(kept)))))),
        widths=(widths := draw(st.sampled_from(WIDTHS))),
        width_bytes=(1.0,) * len(widths),
    )
    size = layout(widths).size
    cost = CostModel(profile, np.array(draw(st.lists(positive, min_size=size, max_size=size))))
    cost.correction.update({kind: draw(st.floats(0.25, 4.0)) for kind in cost.correction})
    cost.overhead, cost.overhead_per_request = draw(positive), draw(positive)
    return cost


@st.composite
def replicas(draw, policy=BudgetPolicy, tenants: int = 1) -> Replica:
    """A replica of any such pair with running requests of all sizes, some in the middle of their prompts."""
    cost = draw(cost_models())
    config = EngineConfig(max_model_len=2048, max_num_seqs=24, max_num_batched_tokens=draw(st.integers(16, 600)))
    weights = Tenants([Tenant(name=f"t{i}", weight=1.0 + i) for i in range(tenants)])
    make = (lambda: BudgetPolicy(cost, tenants=weights)) if policy is BudgetPolicy else policy
    replica = Replica(0, ReplicaSpec(config, cost, 20_000, make))
    sizes = cost.profile.elasticity.sizes
    widths = cost.profile.widths
    for prompt, size, limit, tenant, width in draw(
        st.lists(
            st.tuples(
                st.integers(1, 400),
                st.sampled_from(sizes),
                st.none() | st.floats(0.01, 1.0),
                st.integers(0, tenants - 1),
                st.sampled_from([(0, EXACT), *((width, width) for width in widths)]),
            ),
            max_size=20,
        )
    ):
        low, high = width
        request = make_request(
            prompt, 1000, sizes=(size,), budget={"tpot": limit}, tenant=f"t{tenant}", min_width=low, max_width=high
        )
        replica.scheduler.prepare(request)
        replica.scheduler.add(request)
    now = 0.0
    corrections = dict(cost.correction)
    for _ in range(draw(st.integers(0, 8))):
        now, _ = replica.run_step(now)
    cost.correction.update(corrections)  # steps were learned from
    return replica


@settings(max_examples=60, deadline=None)
@given(replica=replicas(policy=LargestSize), raises=st.booleans())
def test_a_price_is_what_the_cost_model_says_of_the_batch(replica, raises):
    """`StepPrice` from sums by size, and the simulator's features, against the features of the batch that would run."""
    replica.policy.width = lambda view, now: view.widths[0]
    replica.policy.raises_rows = lambda scheduled, width: raises
    cost, elasticity = replica.spec.machine, replica.scheduler.elasticity
    planned = replica.scheduler.schedule().scheduled
    if not planned:
        return
    profile = cost.profile
    batch = build_batch(planned, elasticity, replica.kv_cache.block_tables, profile.shared_stations)
    shape, simulated = cost.shape(batch), replica._shape(planned)
    assert simulated.kind == shape.kind and simulated.features == pytest.approx(shape.features, rel=1e-9)
    tokens, heads = [0] * (elasticity.sizes[-1] + 1), [0] * (elasticity.sizes[-1] + 1)
    widths = {request.width for request, _ in planned}
    step = Step(tokens=tokens, head_rows=heads, num_requests=len(planned), width=min(widths))
    for request, count in planned:
        size, after = request.path.size, request.num_computed_tokens + count
        tokens[size] += count
        heads[size] += after == request.num_tokens
        step.request_layers += size
        if count == 1:
            step.decode_context += size * after
        else:
            step.prefill_context += size * count * (after - count / 2)
    if len(widths) > 1:
        return
    price = StepPrice(cost)
    assert price.model_seconds(step) * cost.correction[shape.kind] == pytest.approx(cost.seconds(shape), **CLOSE)
    between = cost.overhead + cost.overhead_per_request * len(planned)
    assert price.seconds(step, shape.kind) == pytest.approx(cost.seconds(shape) + between, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(
    replica=replicas(tenants=3),
    prompt=st.integers(1, 500),
    waiting=st.integers(0, 4),
    now=st.floats(0.0, 2.0),
    data=st.data(),
)
def test_what_a_decision_predicts_is_the_price_of_the_steps(replica, prompt, waiting, now, data):
    policy, view = replica.policy, replica.scheduler
    for _ in range(waiting):
        view.waiting.push(make_request(50, 100, tenant="t0"))
    request = make_request(prompt, 100, tenant="t0", arrival_time=replica.now)
    view.waiting.push(request)
    policy.demand.arrived("t0", prompt, replica.now)
    now += replica.now
    width = data.draw(st.sampled_from(view.widths))
    moment = policy.outlook.moment(request, view, now)

    price, cost, load = policy.price, policy.cost, view.load
    guard = load.tightest_tpot()
    visible = policy.outlook.shares.visible_to(request, view, guard)
    low = policy.table.sizes[0]
    at_least = [math.ceil(count) for count in accumulate(reversed(visible.rows))]
    at_least[-1] = max(at_least[-1], math.ceil(visible.num_rows))
    rows = [0] * low + np.diff(at_least, prepend=0)[::-1].tolist()
    prompt_rows = max(prompt - 1, 1)
    backlog = load.layer_pending - load.layer_rows
    full = price.path_weights[price.top]
    budget = view.config.max_num_batched_tokens
    rate = price.token_rate(sum(rows), min(max(prompt_rows + backlog / full, 1.0), budget), width)
    scale = cost.prompt_scale(sum(rows))
    arrivals, mean_prompt = policy.demand.rate("t0", now)
    joining = max(view.waiting.waiting_of("t0")[0] - 1, 0)
    joining = min(joining, max(view.config.max_num_seqs - load.num_rows - 1, 0))
    for size in policy.table.sizes:
        predicted = moment.predict(policy.table.candidate(size, width), width)

        def joined(more: int, size: int = size) -> Step:
            step = price.decode_step([n + more * (s == size) for s, n in enumerate(rows)], width=width)
            step.decode_context = load.layer_context * visible.fraction
            step.decode_context += more * size * (prompt + 0.5 * moment.num_output)
            step.request_layers = load.layer_rows * visible.fraction + more * size
            return step

        with_it = joined(1)
        assert predicted.step == pytest.approx(price.seconds(with_it, "decode"), **CLOSE)
        weight = price.path_weights[size]
        busy = min(arrivals * mean_prompt * rate * weight, MOST_BUSY)
        everybody = price.seconds(joined(1 + joining), "decode")
        assert predicted.tpot == pytest.approx(everybody / (1 - busy), **CLOSE)
        if sum(rows):
            beside = price.seconds(with_it, "mixed")
        else:
            nobody = [0] * (price.top + 1)
            alone = Step(tokens=nobody, head_rows=nobody, request_layers=size, num_requests=1, width=width)
            beside = price.seconds(alone, "prefill")
        per_step = budget * full
        if guard is not None and sum(rows):
            left = (HEADROOM * guard - beside) / max(rate, 1e-12)
            per_step = min(max(left, policy.config.min_chunk * size), per_step)
        work = prompt_rows * weight + backlog
        attention = cost.prefill_context * size * prompt_rows**2 / 2 * scale
        seconds = work * rate + attention + math.ceil(work / per_step) * beside + cost.heads[width](1) * scale
        assert predicted.ttft == pytest.approx(now - replica.now + seconds, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(
    cost=cost_models(),
    rate=st.floats(0.01, 20.0),
    prompt=st.floats(1.0, 4000.0),
    output=st.floats(1.0, 500.0),
    limit=st.none() | st.floats(0.01, 1.0),
    budget=st.integers(16, 8192),
    data=st.data(),
)
def test_where_a_forecast_settles_is_the_price_of_steps(cost, rate, prompt, output, limit, budget, data):
    policy = BudgetPolicy(cost)
    width = data.draw(st.sampled_from(cost.profile.widths))
    layer = cost.layers[width]
    price, sizes = policy.price, policy.table.sizes
    fixed = {"limit": limit, "max_num_seqs": 32, "max_tokens": budget, "tokens_of_kv": 10**6}
    forecast = policy.forecaster.settle(rate, prompt, output, **fixed, width=width)
    rows = [1.0] * len(sizes)
    piece = min(prompt, budget)
    for _ in range(16):
        new = []
        for n, size in zip(rows, sizes, strict=True):
            mix = [n * (s == size) for s in range(price.top + 1)]
            step = price.decode_step(mix, n * size * (prompt + 0.5 * output), width)
            seconds = price.seconds(step, "decode")
            prefill = prompt * price.path_weights[size] * (layer(n + piece) - layer(n)) / piece
            prefill += cost.prefill_context * size * prompt**2 / 2 + cost.heads[width](1)
            prefill *= cost.correction["mixed"]
            tpot = seconds / (1 - min(rate * prefill, MOST_BUSY))
            new.append((min(max(rate * output * tpot, 1.0), 128.0), tpot, seconds, step, prefill))
        moved = max(abs(found[0] - n) for found, n in zip(new, rows, strict=True))
        rows = [found[0] for found in new]
        if moved < 0.05:
            break
    for i, (_, tpot, seconds, step, prefill) in enumerate(new):
        assert forecast.tpot[i] == pytest.approx(tpot, **CLOSE)
        beside, per_step = price.seconds(step, "mixed"), budget
        if limit is not None:
            per_step = min(per_step, max(HEADROOM * limit - beside, 0.1 * beside) * prompt / prefill)
        service = prefill + prompt / per_step * beside
        if rate * service < 0.999:
            waiting = rate * service / (1 - rate * service) * service
            assert forecast.ttft[i] == pytest.approx(waiting + service + seconds, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(cost=cost_models(), prompt=st.integers(1, 1500), budget=st.integers(16, 2000), overhead=positive, data=st.data())
def test_alone_is_what_the_scheduler_makes_of_an_idle_server(cost, prompt, budget, overhead, data):
    """Chunks as they are cut under this server's --max-num-batched-tokens, whatever it is."""
    size = data.draw(st.sampled_from(cost.profile.elasticity.sizes))
    config = EngineConfig(max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=budget)
    replica = Replica(0, ReplicaSpec(config, cost, 100_000, LargestSize))
    request = make_request(prompt, 4, sizes=(size,))
    replica.scheduler.add(request)
    now, ends = 0.0, []
    while not request.is_finished:
        now, _ = replica.run_step(now)
        ends.append(request.last_token_time)
    ttft, tpot = StepPrice(cost).alone(size, prompt, budget)
    between = StepPrice(cost).between(1)
    assert request.first_token_time + between == pytest.approx(ttft, rel=1e-9)
    first = next(i for i, end in enumerate(ends) if end is not None)
    assert ends[first + 1] - ends[first] == pytest.approx(tpot, rel=1e-9)


@given(cost=cost_models(), seconds=st.floats(1e-3, 10.0))
def test_rows_within_are_those_that_fit(cost, seconds):
    price = StepPrice(cost)
    rows = price.rows_within(seconds)
    if rows > 1.0:
        assert price.full_size_seconds(rows) == pytest.approx(seconds, rel=1e-5)
    else:
        assert price.full_size_seconds(1.0) >= seconds * (1 - 1e-9)


def test_a_slow_neighbour_is_charged_once():
    """What lies between steps has a learner of its own: the correction of steps does not touch it, anywhere."""
    rng = np.random.default_rng(0)
    base = np.full(NUM_FEATURES, 1e-4)
    profile = CostProfile(Elasticity.last_to_first(6, [0, 2, 4]), (10**6,) * 9, 10**6, 1024, 4096, shared_head=True)
    plain, slow = CostModel(profile, base), CostModel(profile, base)
    slow.correction.update(dict.fromkeys(slow.correction, 2.0))
    for cost in (plain, slow):
        cost.overhead, cost.overhead_per_request = 0.01, 0.001
    rows = rng.integers(0, 5, 7).tolist()
    between = 0.01 + 0.001 * sum(rows)
    a, b = (StepPrice(cost).decode_seconds(rows) for cost in (plain, slow))
    assert b - between == pytest.approx(2 * (a - between))
    a, b = (StepPrice(cost).alone(6, 100, 64) for cost in (plain, slow))
    assert b[1] - 0.011 == pytest.approx(2 * (a[1] - 0.011)) and b[0] - 0.022 == pytest.approx(2 * (a[0] - 0.022))
    assert StepPrice(slow).rows_within(1.0) < StepPrice(plain).rows_within(1.0)


def test_one_head_costs_less_than_two():
    profile = CostProfile(Elasticity.last_to_first(6, [0, 2, 4]), (10**6,) * 9, 10**6, 1024, 4096)
    rows = [0, 0, 0, 3, 0, 0, 3]
    own, shared = (
        StepPrice(CostModel(dataclasses.replace(profile, shared_head=is_shared), np.full(NUM_FEATURES, 1e-4)))
        for is_shared in (False, True)
    )
    assert own.heads(rows) == (3, 3) and shared.heads(rows) == (6, 0)
    assert own.head(rows) > shared.head(rows)
