"""Everything together, as real processes: HAProxy, Prometheus, autoscaler, replicas, load that rises and falls.

Nothing here depends on how fast the machine is. Pressure comes from places, not from speed: a replica runs `SLOTS`
requests at once, `CROWD` visitors are more than that, and each sends its next request when the last one is answered.
The limit on the first token is a share of what a whole answer takes when all places are taken: who finds a place is far
below it, who waits for one is above it. Phases end when what they wait for has happened. What this cannot show is that
sizes recover under the same load once the second replica is there: here both may share one core, so it adds places but
no speed. `benchmarks/autoscale.py` shows that, on a quiet machine.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.autoscale import server_command
from benchmarks.autoscale_load import Record, send
from deploy.autoscaler.decision import ScalingPolicy
from deploy.autoscaler.drivers import Replica
from deploy.grafana.panels import draw
from deploy.local.stack import LocalStack
from tests.api.tiny import make_tokenizer, noted

pytestmark = [
    pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy"),
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus"),
    pytest.mark.timeout(500),
]
TEACHER_LAYERS, KEPT = 12, (0, 2, 4, 6, 8, 10)
SLOTS, CROWD = 8, 12
TOKENS = 64  # of an answer: long enough that a wait for a place is longer than any hiccup of a busy machine
PATIENCE = 120.0  # seconds for what takes ten on an idle machine


def make_pair(folder: Path) -> tuple[Path, Path]:
    teacher, student = folder / "teacher", folder / "student"
    for path, layers in ((teacher, TEACHER_LAYERS), (student, len(KEPT))):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=400,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(teacher)
    pruned = [layer for layer in range(TEACHER_LAYERS) if layer not in KEPT]
    config = {"copied_teacher_layers": list(KEPT), "pruned_teacher_layers": pruned}
    (student / "student_config.json").write_text(json.dumps(config))
    return teacher, student


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    teacher, student = make_pair(folder := tmp_path_factory.mktemp("pair"))
    noted(teacher, student, folder / "store")
    return server_command(
        *("--teacher", str(teacher), "--student", str(student), "--served-model-name", "pair", "--num-threads", "1"),
        *("--kv-cache-memory", "256MiB", "--max-model-len", "512", "--max-num-seqs", str(SLOTS)),
        *("--shutdown-timeout", "60"),
        *("--device", "cpu", "--dtype", "bfloat16", "--store", str(folder / "store")),
    )


def body(number: int, tokens: int = TOKENS, **fields) -> dict:
    return {
        "model": "pair",
        "prompt": f"Visitor {number} says: the quick brown fox jumps over the lazy dog. ",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        # Printable characters only: what a random model says is otherwise mostly halves of UTF-8 characters, which are
        # held back, and the first token would seem to come with the last.
        "allowed_token_ids": list(range(10, 60)),
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


class Visitors:
    """`number` clients, each sending its next request when the last one is answered."""

    def __init__(self, stack: LocalStack, tokens: int = TOKENS) -> None:
        self.tokens = tokens  # of an answer
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=stack.api_url, timeout=120, limits=limits, trust_env=False)
        self.started = time.monotonic()
        self.records: list[Record] = []
        self.number = 0
        self._tasks: list[asyncio.Task] = []
        self.slo: dict = {}

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    async def _visit(self, index: int) -> None:
        turn = 0
        while index < self.number:
            turn += 1
            record = Record(0.0)
            self.records.append(record)
            await send(self.client, record, body(1000 * index + turn, self.tokens, slo=self.slo), self.started)

    def set(self, number: int) -> None:
        before, self.number = self.number, number
        self._tasks += [asyncio.create_task(self._visit(index)) for index in range(before, number)]

    async def close(self) -> None:
        self.set(0)
        await asyncio.gather(*self._tasks)
        await self.client.aclose()


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.2)


async def limits_of_this_machine(visitors: Visitors) -> dict:
    """A limit on the first token that everybody keeps who finds a place, and nobody who waits for one."""
    seen = [Record(0.0) for _ in range(SLOTS)]
    await asyncio.gather(
        *(send(visitors.client, record, body(i, size="teacher"), visitors.started) for i, record in enumerate(seen))
    )
    assert all(record.is_complete for record in seen), seen
    return {"ttft_ms": round(1000 * 0.3 * median(record.e2e for record in seen))}


def num_running(replica: Replica) -> int:
    return httpx.get(f"http://{replica.address}/load", trust_env=False).json()["num_running"]


# What vLLM's own Grafana dashboard and the usual scalers read.
VLLM_FAMILIES = (
    "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_count",
    "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "prompt_tokens_total",
    "generation_tokens_total", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_success_total",
    "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum", "request_time_per_output_token_seconds_bucket", "cache_config_info",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "iteration_tokens_total_bucket",
)  # fmt: skip

VLLM_HISTOGRAMS = (
    "e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_max_num_generation_tokens", "iteration_tokens_total",
)  # fmt: skip


def check_dashboards(stack: LocalStack, begin: float, picture: Path) -> None:
    """Every panel's query, every rule and every family of vLLM's dashboard, against the Prometheus of this run."""
    found = draw(stack.prometheus_url, picture, begin, time.time())
    assert not [name for name, count in found.items() if count == 0]
    assert picture.stat().st_size > 10_000
    get = httpx.Client(base_url=stack.prometheus_url, trust_env=False).get
    for group in get("/api/v1/rules").json()["data"]["groups"]:
        for rule in group["rules"]:
            assert rule["health"] == "ok", rule
    for family in VLLM_FAMILIES:
        query = {"query": f'count by (__name__) ({{__name__="vllm:{family}",model_name=~".+"}})'}
        if family == "cache_config_info":
            query = {"query": "vllm:cache_config_info{block_size!='',num_gpu_blocks!=''}"}
        assert get("/api/v1/query", params=query).json()["data"]["result"], family
    # The shapes in which that dashboard asks: quantiles over buckets, means as sum over count, counts by reason.
    chosen = f'{{model_name="pair"}}[{PATIENCE:.0f}s]'
    for family in VLLM_HISTOGRAMS:
        rates = {part: f"rate(vllm:{family}_{part}{chosen})" for part in ("bucket", "sum", "count")}
        for query in (
            f"histogram_quantile(0.95, sum by(le) ({rates['bucket']}))", f"sum({rates['sum']}) / sum({rates['count']})"
        ):  # fmt: skip
            (result,) = get("/api/v1/query", params={"query": query}).json()["data"]["result"]
            assert math.isfinite(float(result["value"][1])), query
    query = {"query": f"sum by (finished_reason) (increase(vllm:request_success_total{chosen}))"}
    assert {r["metric"]["finished_reason"] for r in get("/api/v1/query", params=query).json()["data"]["result"]}


def test_sizes_give_way_a_replica_joins_sizes_recover_the_replica_leaves(command, tmp_path):
    policy = ScalingPolicy(
        min_replicas=1, max_replicas=2, down_stabilisation=8, down_interval=2, capacity_doubling=120,
        # Other tests and people use this machine too: a late answer or two is no reason for a replica here.
        slo_target=0.5, degraded_low=0.2, degraded_high=0.3,
    )  # fmt: skip

    async def scenario(stack: LocalStack) -> tuple[Visitors, dict[str, float]]:
        visitors, at = Visitors(stack), {}

        def all_whole(number: int) -> bool:
            """The last `number` answers had the full size."""
            last = [record.size for record in visitors.records if record.size][-number:]
            return len(last) == number and min(last) == TEACHER_LAYERS

        try:
            visitors.slo = await limits_of_this_machine(visitors)
            visitors.set(1)
            await until(lambda: all_whole(2), "a lone visitor does not get the full size")
            at["busy"] = visitors.now
            visitors.set(CROWD)
            await until(lambda: stack.num_ready() == 2, "no second replica joined")
            at["joined"] = visitors.now
            await until(
                lambda: all(num_running(replica) for replica in stack.driver.replicas()), "the second one gets no work"
            )
            visitors.set(1)
            await until(lambda: len(stack.driver.replicas()) == 1, "the second replica stayed")
            at["left"] = visitors.now
            await until(lambda: all_whole(2), "a lone visitor does not get the full size any more")
        finally:
            await visitors.close()
        return visitors, at

    with LocalStack(command, tmp_path, policy, window="5s") as stack:
        stack.wait_ready(timeout=PATIENCE)
        begin = time.time()
        visitors, at = asyncio.run(scenario(stack))
        check_dashboards(stack, begin, tmp_path / "panels.png")

    failed = [record for record in visitors.records if not record.is_complete]
    assert not failed, failed[:3]
    # Sizes gave way at once, in the first request of one who came with the crowd, and for that a replica was added.
    first_wave = [record for record in visitors.records if record.at >= at["busy"]][: CROWD - 1]
    assert min(record.size for record in first_wave) < TEACHER_LAYERS, [record.size for record in first_wave]
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    up = next(entry for entry in decisions if entry["target"] == 2)
    assert up["reason"] == "degraded" and up["signal"]["degraded_share"] > policy.degraded_high, up
    assert decisions[-1]["target"] == 1


def test_a_replica_that_is_killed_takes_only_its_own_streams_along(command, tmp_path):
    policy = ScalingPolicy(min_replicas=2, max_replicas=2)

    async def scenario(stack: LocalStack) -> tuple[list[Record], float, int]:
        visitors = Visitors(stack, tokens=400)  # many are on their way for long, so that the kill meets some

        def all_stream() -> bool:
            current = [record for record in visitors.records if record.e2e is None]
            is_busy = len(current) == 8 and all(record.ttft for record in current)
            return is_busy and all(num_running(replica) for replica in stack.driver.replicas())

        try:
            visitors.set(8)
            num_hit = 0
            for _ in range(3):  # until a kill meets a stream: those that run at the count may have ended at the signal
                await until(all_stream, "not everybody streams, or only from one replica")
                victim = stack.driver.replicas()[0]
                num_hit += num_running(victim)
                os.kill(stack.driver.pid(victim.id), signal.SIGKILL)
                at = visitors.now
                await until(
                    lambda killed=victim.id: (
                        killed not in {r.id for r in stack.driver.replicas()} and stack.num_ready() == 2
                    ),
                    "the killed replica was not replaced",
                )
                if any(record.error for record in visitors.records):
                    break
        finally:
            await visitors.close()
        return visitors.records, at, num_hit

    with LocalStack(command, tmp_path, policy, window="5s") as stack:
        stack.wait_ready(replicas=2, timeout=PATIENCE)
        records, at, num_hit = asyncio.run(scenario(stack))

    failed = [record for record in records if not record.is_complete]
    assert 1 <= len(failed) <= num_hit  # fewer: a stream may have ended between the count and the signal
    for record in failed:
        # Each had begun to stream before the kill, and its client was told: by an error event or by a cut stream,
        # which every HTTP client reports as an error.
        assert record.at < at and record.status == 200 and record.error, record
    assert [record for record in records if record.at >= at], "nothing was asked after the kill"
    assert all(record.is_complete for record in records if record.at >= at)
