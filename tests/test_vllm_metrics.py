"""The metrics that vLLM's dashboards, gateways and autoscalers read: names, types, labels, buckets, and live data."""

import math
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.tiny import NAME, QUICK, RunningServer, make_pair

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
    *(640, 2560),
)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200)  # 1-2-5 up to the context of 256
MODEL, ALL = frozenset({"model_name", "engine"}), frozenset()
CACHE = {"block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization"}

# name -> type, labels (besides le), buckets; from vllm/v1/metrics/loggers.py as of v0.32 (counters without _total)
EXPECTED = {
    "vllm:num_requests_running": ("gauge", MODEL, None),
    "vllm:num_requests_waiting": ("gauge", MODEL, None),
    "vllm:num_requests_waiting_by_reason": ("gauge", MODEL | {"reason"}, None),
    "vllm:kv_cache_usage_perc": ("gauge", MODEL, None),
    "vllm:engine_sleep_state": ("gauge", MODEL | {"sleep_state"}, None),
    "vllm:cache_config_info": ("gauge", frozenset(CACHE | {"engine"}), None),
    "vllm:prompt_tokens": ("counter", MODEL, None),
    "vllm:generation_tokens": ("counter", MODEL, None),
    "vllm:prompt_tokens_by_source": ("counter", MODEL | {"source"}, None),
    "vllm:prompt_tokens_cached": ("counter", MODEL, None),
    "vllm:request_success": ("counter", MODEL | {"finished_reason"}, None),
    "vllm:num_preemptions": ("counter", MODEL, None),
    "vllm:prefix_cache_queries": ("counter", MODEL, None),
    "vllm:prefix_cache_hits": ("counter", MODEL, None),
    "vllm:corrupted_requests": ("counter", MODEL, None),
    "vllm:admission_rejections": ("counter", frozenset({"reason"}), None),
    "vllm:e2e_request_latency_seconds": ("histogram", MODEL, LATENCY),
    "vllm:request_queue_time_seconds": ("histogram", MODEL, LATENCY),
    "vllm:request_prefill_time_seconds": ("histogram", MODEL, LATENCY),
    "vllm:request_decode_time_seconds": ("histogram", MODEL, LATENCY),
    "vllm:request_inference_time_seconds": ("histogram", MODEL, LATENCY),
    "vllm:time_to_first_token_seconds": ("histogram", MODEL, TTFT),
    "vllm:inter_token_latency_seconds": ("histogram", MODEL, PER_TOKEN),
    "vllm:request_time_per_output_token_seconds": ("histogram", MODEL, PER_TOKEN),
    "vllm:request_prompt_tokens": ("histogram", MODEL, TOKENS),
    "vllm:request_generation_tokens": ("histogram", MODEL, TOKENS),
    "vllm:request_max_num_generation_tokens": ("histogram", MODEL, TOKENS),
    "vllm:request_params_max_tokens": ("histogram", MODEL, TOKENS),
    "vllm:request_prefill_kv_computed_tokens": ("histogram", MODEL, TOKENS),
    "vllm:request_params_n": ("histogram", MODEL, (1, 2, 5, 10, 20)),
    "vllm:iteration_tokens_total": (
        "histogram", MODEL, (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    ),
    "http_requests": ("counter", frozenset({"handler", "method", "status"}), None),
    "http_request_size_bytes": ("summary", frozenset({"handler"}), None),
    "http_response_size_bytes": ("summary", frozenset({"handler"}), None),
    "http_request_duration_highr_seconds": (
        "histogram", ALL, (*(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75), *(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5),
                           *(5, 7.5, 10, 30, 60)),
    ),
    "http_request_duration_seconds": ("histogram", frozenset({"handler", "method"}), (0.1, 0.5, 1)),
    "boomerang:requests": ("counter", frozenset({"model_name", "size", "finished_reason"}), None),
    "boomerang:generation_tokens": ("counter", frozenset({"model_name", "size"}), None),
    "boomerang:requests_running": ("gauge", frozenset({"model_name", "size"}), None),
    "boomerang:time_to_first_token_seconds": ("histogram", frozenset({"model_name", "size"}), TTFT),
    "boomerang:time_per_output_token_seconds": ("histogram", frozenset({"model_name", "size"}), PER_TOKEN),
    "boomerang:e2e_request_latency_seconds": ("histogram", frozenset({"model_name", "size"}), LATENCY),
}  # fmt: skip

_HISTOGRAMS = ("e2e_request_latency", "inter_token_latency", "time_to_first_token")
# The queries of vLLM's own dashboard (examples/observability/prometheus_grafana), [5m] for Grafana's interval; and what
# production-stack, KEDA and the gateway's endpoint picker ask.
QUERIES = [
    *(
        f'histogram_quantile({q}, sum by(le) (rate(vllm:{name}_seconds_bucket{{model_name="tiny"}}[5m])))'
        for name in _HISTOGRAMS
        for q in (0.99, 0.95, 0.9, 0.5)
    ),
    *(
        f'rate(vllm:{name}_seconds_sum{{model_name="tiny"}}[5m])\n/\nrate(vllm:{name}_seconds_count{{model_name="tiny"}}[5m])'
        for name in _HISTOGRAMS
    ),
    'rate(vllm:prompt_tokens_total{model_name="tiny"}[5m])',
    'rate(vllm:generation_tokens_total{model_name="tiny"}[5m])',
    'vllm:num_requests_running{model_name="tiny"}',
    'vllm:num_requests_waiting{model_name="tiny"}',
    'vllm:kv_cache_usage_perc{model_name="tiny"}',
    'sum by(le) (increase(vllm:request_prompt_tokens_bucket{model_name="tiny"}[5m]))',
    'sum by(le) (increase(vllm:request_generation_tokens_bucket{model_name="tiny"}[5m]))',
    'sum by(finished_reason) (increase(vllm:request_success_total{model_name="tiny"}[5m]))',
    *(
        f'rate(vllm:request_{name}_sum{{model_name="tiny"}}[5m])'
        for name in ("queue_time_seconds", "prefill_time_seconds", "decode_time_seconds", "max_num_generation_tokens")
    ),
    "histogram_quantile(0.95, sum by(le) (rate(vllm:request_time_per_output_token_seconds_bucket[5m])))",
    "sum(vllm:num_requests_waiting)",
    'vllm:cache_config_info{block_size="8"}',
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with RunningServer(make_pair(tmp_path_factory.mktemp("metrics")), *QUICK) as server:
        body = {"prompt": "The quick", "max_tokens": 8, "temperature": 0}
        for changes in ({}, {"size": "4L"}, {"n": 2}, {"stop": "e"}):
            assert httpx.post(server.url + "/v1/completions", json=body | changes).status_code == 200
        yield server.url


@pytest.fixture(scope="module")
def families(url):
    return {family.name: family for family in text_string_to_metric_families(httpx.get(url + "/metrics").text)}


def test_the_page_follows_the_text_format(url):
    answer = httpx.get(url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "_created" not in answer.text


@pytest.mark.parametrize("name", EXPECTED)
def test_families_have_vllms_types_labels_and_buckets(families, name):
    kind, labels, buckets = EXPECTED[name]
    family = families[name]
    assert family.type == kind and family.samples
    for sample in family.samples:
        assert set(sample.labels) - {"le"} >= labels, sample
        if name != "vllm:cache_config_info":
            assert set(sample.labels) - {"le"} == labels, sample
        assert sample.labels.get("model_name", NAME) == NAME and sample.labels.get("engine", "0") == "0"
    if buckets:
        bounds = {float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")}
        assert sorted(bounds) == [*map(float, buckets), math.inf]


@pytest.mark.parametrize("name", ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"])
def test_gauges_that_autoscalers_read_have_one_series(families, name):
    assert len(families[f"vllm:{name}"].samples) == 1


@pytest.mark.parametrize("query", QUERIES)
def test_what_dashboards_ask_for_exists(families, query):
    """Every selector of the query matches a sample; histograms have counted something."""
    samples = [sample for family in families.values() for sample in family.samples]
    selectors = re.findall(r"(vllm:\w+)(?:\{([^}]*)\})?", query)
    assert selectors
    for name, inside in selectors:
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', inside))
        found = [s for s in samples if s.name == name and wanted.items() <= s.labels.items()]
        assert found, f"{name}{{{inside}}} finds nothing"
        if name.endswith(("_bucket", "_count")):
            assert max(sample.value for sample in found) > 0


def test_sizes_add_up(families):
    finished = {(s.labels["size"], s.labels["finished_reason"]): s.value for s in families["boomerang:requests"].samples
                if s.name.endswith("_total")}  # fmt: skip
    assert sum(finished.values()) == 5
    assert sum(value for (size, _), value in finished.items() if size == "4") == 1
    by_reason = {s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples}
    assert sum(by_reason.values()) == 5 and by_reason["abort"] == by_reason["error"] == 0


def test_legacy_names_on_request(tmp_path):
    with RunningServer(make_pair(tmp_path), "--metrics-legacy-names", *QUICK) as server:
        text = httpx.get(server.url + "/metrics").text
        assert "vllm:gpu_cache_usage_perc{" in text and "vllm:time_per_output_token_seconds_bucket{" in text
