"""Reads the scaling signal from Prometheus; tolerates its absence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import httpx

from deploy.autoscaler.decision import Signal

__all__ = ["PrometheusSource", "SourceUnavailable", "queries"]


class SourceUnavailable(Exception):
    """Prometheus is away, answers nonsense, or sees no replica."""


def queries(window: str, selector: str = 'job="boomerang"') -> dict[str, str]:
    """PromQL per field of the signal, over `window` (at least four scrape intervals). Sums run over all replicas."""

    def mean(gauge: str) -> str:
        return f"sum(avg_over_time({gauge}{{{selector}}}[{window}]))"

    def rate(counter: str) -> str:
        return f"sum(rate({counter}{{{selector}}}[{window}]))"

    slo = f'rate(boomerang:slo_requests_total{{{selector},slo="all"%s}}[{window}])'
    met, all_ = slo % ',met="true"', slo % ""
    return {
        "up": f"count(up{{{selector}}} == 1)",
        "request_rate": rate("boomerang:requests_total"),
        # Of those running, not of those finished: long answers must not delay the news that they were shrunk.
        "degraded_share": f"{mean('boomerang:requests_running_degraded')} / {mean('vllm:num_requests_running')}",
        "size_fraction": f"{mean('boomerang:running_layer_bits')} / {mean('boomerang:running_ceiling_layer_bits')}",
        # Of a server that knows no figures, and of earlier ones, nothing: then the share of requests decides.
        "kl_loss": f"({mean('boomerang:running_expected_kl')} - {mean('boomerang:running_ceiling_expected_kl')})"
        f" / ({mean('vllm:num_requests_running')} > 0)",
        "slo_attainment": f"sum({met}) / sum({all_})",
        "running": mean("vllm:num_requests_running"),
        "waiting": mean("vllm:num_requests_waiting"),
        "rejected_rate": rate("vllm:admission_rejections_total"),
    }


@dataclass(slots=True)
class PrometheusSource:
    """Instant queries against one Prometheus (or anything that speaks its HTTP API)."""

    url: str
    window: str = "30s"
    selector: str = 'job="boomerang"'
    timeout: float = 2.0  # seconds for each query

    def read(self) -> Signal:
        """The signal of this moment.

        Raises:
            SourceUnavailable: no answer, a malformed one, or no replica is being scraped.
        """
        values: dict[str, float | None] = {}
        with httpx.Client(base_url=self.url, timeout=self.timeout, trust_env=False) as client:
            for name, query in queries(self.window, self.selector).items():
                values[name] = _scalar(client, query)
                if name == "up" and not values[name]:
                    raise SourceUnavailable("Prometheus scrapes no replica successfully")
        # A rate over counters that did not move is 0/0 = NaN: nobody was served, so there is nothing to say.
        return Signal(
            request_rate=values["request_rate"] or 0.0,
            degraded_share=_share(values["degraded_share"]),
            size_fraction=_share(values["size_fraction"]),
            kl_loss=None if values["kl_loss"] is None else max(values["kl_loss"], 0.0),
            slo_attainment=_share(values["slo_attainment"]),
            running=values["running"] or 0.0,
            waiting=values["waiting"] or 0.0,
            rejected_rate=values["rejected_rate"] or 0.0,
        )


def _share(value: float | None) -> float | None:
    return None if value is None else min(max(value, 0.0), 1.0)


def _scalar(client: httpx.Client, query: str) -> float | None:
    """The single value of an instant query; None for an empty result or NaN."""
    try:
        response = client.get("/api/v1/query", params={"query": query})
        response.raise_for_status()
        body = response.json()
        result = body["data"]["result"]
        value = float(result[0]["value"][1]) if result else math.nan
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise SourceUnavailable(f"{type(error).__name__}: {error}") from error
    return value if math.isfinite(value) else None
