"""Ray Serve's autoscaling policy: the decision of deploy.autoscaler, fed by what replicas record about themselves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from deploy.autoscaler.decision import Observation, ScalingPolicy, ScalingState, Signal, decide

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

__all__ = ["STATS", "DegradationPolicy", "signal_of"]

# What `record_autoscaling_stats` of a replica returns; sums over replicas make the signal.
STATS = (
    *("running", "waiting", "degraded", "served_layers", "ceiling_layers", "served_bits", "ceiling_bits"),
    *("kl", "ceiling_kl", "slo_met", "slo_missed", "rejected"),
)


def signal_of(metrics: dict[str, dict[Any, float]] | None) -> Signal | None:
    """Ray's {name: {replica: value over the look-back window}} -> one signal; None before any replica has reported."""
    if not metrics or not metrics.get("running"):
        return None
    total = {name: sum(metrics.get(name, {}).values()) for name in STATS}
    judged = total["slo_met"] + total["slo_missed"]
    return Signal(
        request_rate=judged,
        degraded_share=total["degraded"] / total["running"] if total["running"] else None,
        kl_loss=(total["kl"] - total["ceiling_kl"]) / total["running"] if total["running"] and total["kl"] else None,
        size_fraction=total["served_bits"] / total["ceiling_bits"] if total["ceiling_bits"] else None,
        slo_attainment=total["slo_met"] / judged if judged else None,
        running=total["running"],
        waiting=total["waiting"],
        rejected_rate=total["rejected"],
    )


class DegradationPolicy:
    """`AutoscalingPolicy(policy_function=DegradationPolicy, policy_kwargs={...})`.

    Keyword arguments are the fields of ScalingPolicy; the limits come from Ray. Set Ray's own `upscale_delay_s` and
    `downscale_delay_s` to 0: stabilisation is part of the decision.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        policy = ScalingPolicy(
            **self.settings,
            min_replicas=max(1, context.capacity_adjusted_min_replicas),
            max_replicas=max(1, context.capacity_adjusted_max_replicas),
        )
        state = context.policy_state.get("scaling") or ScalingState(target=context.target_num_replicas)
        ready = len(context.running_replicas)
        observation = Observation(
            now=context.current_time or time.time(),
            ready=ready,
            starting=max(0, context.target_num_replicas - ready),
            signal=signal_of(context.aggregated_metrics),
        )
        state, decision = decide(policy, state, observation)
        return decision.target, {"scaling": state, "reason": decision.reason}
