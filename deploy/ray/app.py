"""The Ray Serve application: the same FastAPI application on every replica.

    serve run deploy.ray.app:build                                   the default pair
    serve run deploy.ray.app:build teacher=... num_threads=4 max_replicas=8

Arguments are settings of the server (as in BOOMERANG_*), or of `DeploymentOptions`. Start the cluster with
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.routing:middlewares to route by prompt prefix and size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deploy.ray.policy import DegradationPolicy

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["DeploymentOptions", "build"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentOptions:
    """What concerns the deployment rather than one server. Times in seconds."""

    name: str = "boomerang"
    min_replicas: int = 1
    max_replicas: int = 4
    num_cpus: float = 2.0  # per replica, for Ray's placement
    num_gpus: float = 0.0
    max_ongoing_requests: int = 512  # running and queued on one replica; the server's own limits come first
    max_imbalance: int = 4  # requests by which prefix and size may override the least load
    drain_timeout: float = 300.0
    look_back: float = 10.0
    metrics_interval: float = 5.0
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ScalingPolicy


def build(args: dict[str, Any] | None = None) -> serve.Application:
    """The application for `serve run` and `serve.run`. Arguments from the command line are text and are converted."""
    options, settings = _split(dict(args or {}))

    @serve.deployment(
        name=options.name,
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        graceful_shutdown_timeout_s=options.drain_timeout,
        health_check_period_s=5,
        health_check_timeout_s=30,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            look_back_period_s=options.look_back,
            metrics_interval_s=options.look_back / 3,
            # Stabilisation is part of the decision (deploy/autoscaler/decision.py).
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(policy_function=DegradationPolicy, policy_kwargs=options.policy),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class="deploy.ray.routing:PrefixAndSizeRouter",
            request_router_kwargs={"max_imbalance": options.max_imbalance},
            request_routing_stats_period_s=1.0,
        ),
    )
    @serve.ingress(_app_builder(settings))
    class Boomerang:
        """One replica. Ray calls the methods below; requests go straight to the application."""

        def __init__(self) -> None:
            from deploy.ray.stats import ReplicaStats

            self.stats = ReplicaStats(self, options.metrics_interval)

        async def check_health(self) -> None:
            """Raises when only a restart helps; Serve then replaces the replica."""
            state = self.app.state.server
            if state.is_broken:
                raise RuntimeError(state.problem() or "broken")

        def record_autoscaling_stats(self) -> dict[str, float]:
            return self.stats.autoscaling()

        def record_routing_stats(self) -> dict[str, Any]:
            return self.stats.routing()

    return Boomerang.bind()


def _split(args: dict[str, Any]) -> tuple[DeploymentOptions, dict[str, Any]]:
    """Deployment options and server settings; a name that is neither is an error of the server's settings."""
    fields = {field.name: field for field in dataclasses.fields(DeploymentOptions)}
    chosen: dict[str, Any] = {}
    for name in [name for name in args if name in fields]:
        default = fields[name].default
        value = args.pop(name)
        chosen[name] = type(default)(value) if isinstance(default, int | float | str) else value
    return DeploymentOptions(**chosen), args


def _app_builder(settings: dict[str, Any]):
    def build_app() -> FastAPI:
        """Runs on the replica. The pair is loaded before Serve sends the first request."""
        from server.api.http.app import create_app
        from server.growing import load_growing_model
        from server.options import load_settings

        resolved = load_settings(settings)
        app = create_app(resolved, lambda metrics: load_growing_model(resolved, metrics=metrics))
        inner = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(application: FastAPI):
            import asyncio

            async with inner(application) as state:
                while (problem := application.state.server.problem()) is not None:
                    if application.state.server.load_error is not None:
                        raise RuntimeError(problem)
                    await asyncio.sleep(0.01)
                yield state

        app.router.lifespan_context = lifespan
        return app

    return build_app
