"""A made-up machine for the size policy, and the real scheduler on it with a clock that tests turn."""

from __future__ import annotations

import itertools

from model_store.assembly import Elasticity
from server.core.config import EngineConfig
from server.core.request import Budget, LiveRequest, Request, SamplingParams
from server.core.width import EXACT
from server.cost.devices import Device, roofline_cost_model
from server.cost.frontier import QualityTable
from server.cost.model import CostModel
from server.cost.profile import CostProfile
from server.engine.queue import WaitingQueue
from server.simulation.jobs import Job
from server.simulation.replica import Replica, ReplicaSpec
from server.simulation.simulator import Result, Simulator
from server.sizing.policy import BudgetPolicy, PolicyConfig
from server.sizing.tenants import Tenants

# 12 layers of 10 MB, a student of 6: sizes 6 .. 12. A full decode step of one row takes about 13 ms.
ELASTICITY = Elasticity.last_to_first(12, list(range(0, 12, 2)))
DEVICE = Device(
    "test", bandwidth=1e10, flops=4e11, memory=1e9, bandwidth_efficiency=1.0, flops_efficiency=1.0, launch=0.0,
    fixed=5e-4, overhead=2e-4,
)  # fmt: skip
CONFIG = EngineConfig(max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=256, page_size=16)
_ids = itertools.count()


def profile(widths: tuple[int, ...] = (EXACT,)) -> CostProfile:
    """With widths, a step reads their share of 16 bits."""
    return CostProfile(
        elasticity=ELASTICITY,
        layer_bytes=(10_000_000,) * 18,
        head_bytes=5_000_000,
        kv_bytes=1024,
        attention_flops=4096,
        shared_head=True,
        widths=widths,
        width_bytes=tuple(width / widths[-1] for width in widths),
    )


def machine(widths: tuple[int, ...] = (EXACT,)) -> CostModel:
    return roofline_cost_model(profile(widths), DEVICE)


def make_policy(
    tenants: Tenants | None = None, quality: QualityTable | None = None, widths: tuple[int, ...] = (EXACT,), **config
) -> BudgetPolicy:
    return BudgetPolicy(machine(widths), tenants=tenants, quality=quality, config=PolicyConfig(**config))


def make_spec(tenants: Tenants | None = None, make=None, widths: tuple[int, ...] = (EXACT,), **changes) -> ReplicaSpec:
    tenants = tenants or Tenants()
    make = make or (lambda: make_policy(tenants, widths=widths))
    values = {"num_pages": 20_000, "make_queue": lambda: WaitingQueue(tenants.weight, tenants.rank)} | changes
    config = values.pop("config", CONFIG)
    return ReplicaSpec(config, machine(widths), values.pop("num_pages"), make, **values)


def make_replica(tenants: Tenants | None = None, **changes) -> Replica:
    return Replica(0, make_spec(tenants, **changes))


def make_request(prompt: int = 64, output: int = 32, **fields) -> LiveRequest:
    budget = Budget(**fields.pop("budget", {}))
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    values = {"sizes": ELASTICITY.sizes, "size_reason": "auto", "arrival_time": 0.0} | fields
    return LiveRequest(Request(f"r{next(_ids)}", [0] * prompt, sampling, budget=budget, **values))


def steady(rate: float, seconds: float, tenant: str = "", start: float = 0.0, prompt: int = 64, **limits) -> list[Job]:
    """Arrivals at equal distances."""
    count = int(rate * seconds)
    return [
        Job(start + i / rate, prompt, 32, tenant, budget=Budget(**limits), sizes=ELASTICITY.sizes) for i in range(count)
    ]


def play(jobs: list[Job], spec: ReplicaSpec | None = None) -> Result:
    return Simulator(spec or make_spec(), 1).run(sorted(jobs, key=lambda job: job.arrival))
