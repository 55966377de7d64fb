"""The decision inside the simulator of the size scheduler: replicas follow the load, and sizes recover."""

from __future__ import annotations

from statistics import mean

from deploy.autoscaler.decision import ScalingPolicy
from deploy.autoscaler.simulated import SimulatedAutoscaler
from server.core.config import EngineConfig
from server.core.request import Budget
from server.cost.devices import DEVICES, PAIRS, roofline_cost_model
from server.simulation.simulator import ReplicaSpec, Simulator
from server.sizing.policy import BudgetPolicy
from studies.autoscale_policies import trace


def test_replicas_follow_the_load_and_sizes_recover():
    profile = PAIRS["qwen3-4b"].profile()
    config = EngineConfig(max_model_len=8192, max_num_seqs=32, max_num_batched_tokens=1024, page_size=32)
    machine = roofline_cost_model(profile, DEVICES["l4"])
    spec = ReplicaSpec(config, machine, 100_000, lambda: BudgetPolicy(roofline_cost_model(profile, DEVICES["l4"])))
    policy = ScalingPolicy(max_replicas=6, down_stabilisation=60, down_interval=10)
    autoscaler = SimulatedAutoscaler(policy, profile.elasticity.sizes[-1], window=15)
    jobs = trace(2.5, 400, Budget(ttft=3.0, tpot=0.06))
    result = Simulator(spec, 1, autoscaler=autoscaler, startup=20).run(jobs)

    def sizes(start: float, end: float) -> float:
        return mean(record.size for record in result.records if start <= record.job.arrival < end)

    replicas = {round(sample.time): sample.replicas for sample in result.samples}
    assert max(replicas.values()) > 1 and replicas[400] < max(replicas.values())
    assert any(decision.reason == "degraded" for _, decision in autoscaler.decisions)
    # One replica is too few from the first; the load doubles at 80 s and falls at 240 s.
    assert sizes(160, 240) > sizes(0, 40) + 1
    assert sizes(320, 400) > 35
    assert all(record.error_status == 0 for record in result.records)
