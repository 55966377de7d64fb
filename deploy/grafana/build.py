"""Writes the dashboards: `python -m deploy.grafana.build`. The JSON is committed; a test checks that it is current.

A panel is one line here, so that what is shown can be read and reviewed; Grafana's JSON is what comes out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
# Chosen in the dashboard: which job, and which replicas of it.
S = 'job="$job",instance=~"$instance"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries` maps legends to PromQL; `width` is in Grafana's 24 columns."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    description: str = ""
    stacked: bool = False
    maximum: float | None = None
    thresholds: tuple[tuple[float | None, str], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    height: int = 8


def quantiles(metric: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate({metric}_bucket{{{S}}}[$__rate_interval]))"
    return {f"p{q}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}


GREEN_IF_HIGH = ((None, "red"), (0.95, "orange"), (0.99, "green"))
GREEN_IF_LOW = ((None, "green"), (0.05, "orange"), (0.2, "red"))


OPERATIONS = (
    Row(
        "Now",
        (
            Panel("Replicas up", {"": f"sum(up{{{S}}})"}, kind="stat", width=4),
            Panel("Requests / s", {"": f"sum(rate(boomerang:requests_total{{{S}}}[1m]))"}, "reqps", "stat", 4),
            Panel(
                "Limits met", {"": 'boomerang:slo:attainment5m{slo="all"}'}, "percentunit", "stat", 4,
                "Share of requests that met all their latency limits, last 5 minutes.", thresholds=GREEN_IF_HIGH,
            ),
            Panel(
                "Degraded", {"": "boomerang:degraded:share1m"}, "percentunit", "stat", 4,
                "Share of requests served below the size they could have had on an idle server.",
                thresholds=GREEN_IF_LOW,
            ),
            Panel(
                "Size served", {"": "boomerang:size:fraction1m"}, "percentunit", "stat", 4,
                "Layers served, relative to those an idle server would have used.", thresholds=GREEN_IF_HIGH,
            ),
            Panel(
                "Refused / s", {"": f"sum(rate(vllm:admission_rejections_total{{{S}}}[1m]))"}, "reqps", "stat", 4,
                "Requests answered with 503.", thresholds=((None, "green"), (0.001, "red")),
            ),
        ),
        4,
    ),
    Row(
        "Latency against limits",
        (
            Panel("Time to first token", quantiles("vllm:time_to_first_token_seconds"), "s"),
            Panel("Time between tokens", quantiles("vllm:inter_token_latency_seconds"), "s"),
            Panel("Whole request", quantiles("vllm:e2e_request_latency_seconds"), "s"),
            Panel(
                "Limits met, by limit", {"{{slo}}": "boomerang:slo:attainment5m"}, "percentunit", width=12, maximum=1,
                description="Requests that brought (or were given) the limit and met it.",
            ),
            Panel(
                "Where the time goes", {
                    what: f"sum(rate(vllm:request_{what}_time_seconds_sum{{{S}}}[$__rate_interval]))"
                    f" / sum(rate(vllm:request_{what}_time_seconds_count{{{S}}}[$__rate_interval]))"
                    for what in ("queue", "prefill", "decode")
                }, "s", width=12, stacked=True,
            ),
        ),
    ),
    Row(
        "Sizes",
        (
            Panel(
                "Tokens / s, by size",
                {"{{size}}": f"sum by (size) (rate(boomerang:generation_tokens_total{{{S}}}[$__rate_interval]))"},
                stacked=True, width=12, description="The size mix: what was generated with how many layers.",
            ),
            Panel(
                "Running, by size", {"{{size}}": f"sum by (size) (boomerang:requests_running{{{S}}})"}, stacked=True,
                width=12,
            ),
            Panel(
                "Degraded requests and size served",
                {"degraded": "boomerang:degraded:share1m", "size served": "boomerang:size:fraction1m"},
                "percentunit", width=12, maximum=1,
            ),
            Panel(
                "Tokens / s, by precision",
                {"{{precision}}": f"sum by (precision) (rate(boomerang:generation_tokens_at_total{{{S}}}"
                                  "[$__rate_interval]))"},
                stacked=True, width=12, description="What was generated at how many bits of a weight.",
            ),
            Panel(
                "Expected KL", {
                    "running": f"sum(boomerang:running_expected_kl{{{S}}})"
                               f" / (sum(vllm:num_requests_running{{{S}}}) > 0)",
                    "at the best they allow": f"sum(boomerang:running_ceiling_expected_kl{{{S}}})"
                                              f" / (sum(vllm:num_requests_running{{{S}}}) > 0)",
                }, width=12, description="Nats per token from the teacher as loaded, over running requests.",
            ),
            Panel(
                "Decisions, by reason",
                {"{{reason}}": f"sum by (reason) (rate(boomerang:size_decisions_total{{{S}}}[$__rate_interval]))"},
                "reqps", stacked=True, width=12,
            ),
        ),
    ),
    Row(
        "Engine",
        (
            Panel(
                "Running and waiting",
                {
                    "running": f"sum(vllm:num_requests_running{{{S}}})",
                    "waiting": f"sum(vllm:num_requests_waiting{{{S}}})",
                },
            ),
            Panel("KV cache used", {"{{instance}}": f"vllm:kv_cache_usage_perc{{{S}}}"}, "percentunit", maximum=1),
            Panel(
                "Tokens / s",
                {
                    "prompt": f"sum(rate(vllm:prompt_tokens_total{{{S}}}[$__rate_interval]))",
                    "generated": f"sum(rate(vllm:generation_tokens_total{{{S}}}[$__rate_interval]))",
                },
            ),
            Panel(
                "Prefix cache hits",
                {
                    "hit rate": f"sum(rate(vllm:prefix_cache_hits_total{{{S}}}[$__rate_interval]))"
                    f" / sum(rate(vllm:prefix_cache_queries_total{{{S}}}[$__rate_interval]))"
                },
                "percentunit", maximum=1,
            ),
            Panel("Preemptions / s", {"{{instance}}": f"rate(vllm:num_preemptions_total{{{S}}}[$__rate_interval])"}),
            Panel(
                "Finished, by reason",
                {
                    "{{finished_reason}}": "sum by (finished_reason) "
                    f"(rate(vllm:request_success_total{{{S}}}[$__rate_interval]))"
                },
                "reqps", stacked=True,
            ),
        ),
    ),
    Row(
        "Replicas and load balancer",
        (
            Panel(
                "Replicas",
                {
                    "target": "boomerang_autoscaler_target_replicas",
                    "wanted": "boomerang_autoscaler_wanted_replicas",
                    "{{status}}": "boomerang_autoscaler_replicas",
                },
                description="Wanted is what the signal asks for at this moment; target is after stabilisation.",
            ),
            Panel(
                "Autoscaler: actions and errors",
                {
                    "{{action}}": "increase(boomerang_autoscaler_actions_total[1m])",
                    "error: {{source}}": "increase(boomerang_autoscaler_errors_total[1m])",
                },
            ),
            Panel(
                "Sessions, by replica",
                {"{{server}}": 'haproxy_server_current_sessions{proxy="replicas"} > 0'}, stacked=True,
            ),
            Panel(
                "Answers of the load balancer",
                {"{{code}}": 'sum by (code) (rate(haproxy_frontend_http_responses_total{proxy="api"}[1m]))'},
                "reqps", stacked=True,
            ),
            Panel(
                "Retries and redispatches / s",
                {
                    "retries": 'sum(rate(haproxy_backend_retry_warnings_total{proxy="replicas"}[1m]))',
                    "redispatches": 'sum(rate(haproxy_backend_redispatch_warnings_total{proxy="replicas"}[1m]))',
                },
                description="Requests tried again on another replica: it was draining, full, or gone.",
            ),
            Panel("Memory", {"{{instance}}": f"process_resident_memory_bytes{{{S}}}"}, "bytes"),
        ),
    ),
)  # fmt: skip


def build(title: str, uid: str, rows: tuple[Row, ...]) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {"type": "row", "id": len(panels) + 1, "title": row.title, "collapsed": False, "panels": [],
             "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}}
        )  # fmt: skip
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > 24:
                x, y = 0, y + row.height
            panels.append(_panel(len(panels) + 1, panel, {"h": row.height, "w": panel.width, "x": x, "y": y}))
            x += panel.width
        y += row.height
    return {
        "uid": uid,
        "title": title,
        "tags": ["boomerang"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "annotations": {"list": [_scaling_annotation()]},
        "templating": {"list": [_variable("job", "label_values(up, job)", "boomerang"), _instances()]},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    steps = [{"value": value, "color": color} for value, color in panel.thresholds or ((None, "blue"),)]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options: dict[str, Any]
    if panel.kind == "stat":
        defaults |= {"color": {"mode": "thresholds"}, "noValue": "–"}
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    else:
        defaults["custom"] = {
            "lineWidth": 1 if panel.stacked else 2,
            "fillOpacity": 60 if panel.stacked else 8,
            "showPoints": "never",
            "spanNulls": True,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    targets = [
        {"refId": chr(65 + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend or "__auto"}
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _variable(name: str, query: str, current: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "current": {"text": current, "value": current},
        "refresh": 2,
    }


def _instances() -> dict[str, Any]:
    variable = _variable("instance", 'label_values(up{job="$job"}, instance)', "All")
    return variable | {
        "current": {"text": ["All"], "value": ["$__all"]},
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }


def _scaling_annotation() -> dict[str, Any]:
    return {
        "name": "scaling",
        "enable": True,
        "datasource": DATASOURCE,
        "expr": "changes(boomerang_autoscaler_target_replicas[30s]) > 0",
        "titleFormat": "replicas changed",
        "iconColor": "purple",
    }


def render() -> dict[str, str]:
    """File name -> JSON text of every dashboard."""
    boards = {"operations.json": build("Boomerang: operations", "boomerang-operations", OPERATIONS)}
    return {name: json.dumps(board, indent=1, ensure_ascii=False) + "\n" for name, board in boards.items()}


def main() -> None:
    for name, text in render().items():
        (DASHBOARDS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
