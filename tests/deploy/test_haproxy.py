"""The load balancer's behaviour with real processes behind it: discovery, draining, retries, a replica that dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import psutil
import pytest

from deploy.autoscaler.drivers import ProcessDriver
from deploy.local.dns import ReplicaDns
from deploy.local.stack import free_port

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy")


class Balancer:
    """HAProxy with deploy/haproxy/haproxy.cfg, found replicas and all."""

    def __init__(self, folder):
        self.dns = ReplicaDns()
        server_port, self.port, self.stats_port = free_port(), free_port(), free_port()
        command = [sys.executable, "-m", "tests.deploy.stub_replica", "{host}", "{port}"]
        self.driver = ProcessDriver(command, port=server_port, on_change=self.dns.set, log_directory=folder)
        environment = {
            "BOOMERANG_RESOLVER": self.dns.address,
            "BOOMERANG_BACKEND": f"server:{server_port}",
            "BOOMERANG_PROBE_PORT": str(server_port),
            "BOOMERANG_SLOTS": "4",
            "BOOMERANG_BIND": f"127.0.0.1:{self.port}",
            "BOOMERANG_STATS_BIND": f"127.0.0.1:{self.stats_port}",
        }
        self.process = subprocess.Popen(
            ["haproxy", "-db", "-f", "deploy/haproxy/haproxy.cfg"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def num_up(self) -> int:
        try:
            text = httpx.get(f"http://127.0.0.1:{self.stats_port}/metrics", trust_env=False).text
        except httpx.TransportError:
            return -1
        lines = [line for line in text.splitlines() if line.startswith("haproxy_server_check_status")]
        return sum('proxy="replicas"' in line and 'state="L7OK"' in line and line.endswith(" 1") for line in lines)

    def wait_up(self, number: int, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while self.num_up() != number:
            assert time.monotonic() < deadline, f"{self.num_up()} up instead of {number}"
            time.sleep(0.05)

    def close(self) -> None:
        self.driver.close(2)
        self.process.terminate()
        self.process.wait(10)
        self.dns.close()


@pytest.fixture
def balancer(tmp_path):
    balancer = Balancer(tmp_path)
    yield balancer
    balancer.close()


async def one(client: httpx.AsyncClient, **query) -> tuple[str, bool]:
    """(host that answered, came to its end)."""
    host, done = "", False
    try:
        async with client.stream("POST", "/", params=query, json={}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                host = line.removeprefix("data: ") if line.startswith("data: 1") else host
    except httpx.RemoteProtocolError:  # the stream was cut: any client sees this as an error, none as an end
        return host, False
    return host, done


def test_before_any_replica_the_answer_is_our_json_error(balancer):
    balancer.wait_up(0)
    response = httpx.post(balancer.url, json={})
    assert response.status_code == 503 and response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "server_error"


def test_replicas_join_and_drain_without_a_failed_request(balancer):
    first = balancer.driver.start()
    balancer.wait_up(1)

    async def scenario():
        async with httpx.AsyncClient(base_url=balancer.url, timeout=30, trust_env=False) as client:
            long = asyncio.create_task(one(client, tokens=80, delay=0.1))
            results: list[tuple[str, bool]] = []
            stop = asyncio.Event()

            async def visitor():
                while not stop.is_set():
                    results.append(await one(client))

            visitors = [asyncio.create_task(visitor()) for _ in range(6)]
            await asyncio.sleep(0.3)
            balancer.driver.start()
            await asyncio.to_thread(balancer.wait_up, 2)
            await asyncio.sleep(0.5)
            balancer.driver.drain(first)  # the one with the long stream
            await asyncio.sleep(2.0)
            statuses = {replica.id: replica.status for replica in balancer.driver.replicas()}
            assert statuses[first] == "draining"  # it stays for its stream
            results.clear()
            await asyncio.sleep(0.3)
            stop.set()
            await asyncio.gather(*visitors)
            host, done = await long
            return host, done, results

    host, done, late = asyncio.run(scenario())
    assert done, "the stream on the draining replica was cut"
    assert late and all(finished for _, finished in late)
    assert {server for server, _ in late} == {"127.0.0.3"} and host == "127.0.0.2"


def test_a_refusal_is_tried_on_another_replica(balancer):
    balancer.driver.start()
    balancer.driver.start()
    balancer.wait_up(2)
    for _ in range(10):
        response = httpx.post(
            balancer.url, params={"plain": 1, "delay": 0, "refused_by": "127.0.0.2"}, content=b"x" * 60_000
        )
        assert response.status_code == 200 and response.json() == {"host": "127.0.0.3", "bytes": 60_000}


def test_a_refusal_by_all_reaches_the_client_with_its_retry_after(balancer):
    balancer.driver.start()
    balancer.wait_up(1)
    response = httpx.post(balancer.url, params={"refused_by": "127.0.0.2"}, json={}, timeout=20)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert response.json() == {"error": {"message": "full"}}


def test_a_killed_replica_cuts_only_its_own_streams(balancer):
    first = balancer.driver.start()
    balancer.driver.start()
    balancer.wait_up(2)

    async def scenario():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=balancer.url, timeout=30, trust_env=False, limits=limits) as client:
            streams = [asyncio.create_task(one(client, tokens=15, delay=0.1)) for _ in range(10)]
            # No byte of these has reached the client yet when the replica dies: they are run again elsewhere.
            plain = [
                asyncio.create_task(client.post("/", params={"plain": 1, "delay": 1.0}, json={})) for _ in range(10)
            ]
            await asyncio.sleep(0.5)
            os.kill(balancer.driver.pid(first), signal.SIGKILL)
            late = [asyncio.create_task(one(client)) for _ in range(20)]
            return await asyncio.gather(*streams), await asyncio.gather(*plain), await asyncio.gather(*late)

    streams, plain, late = asyncio.run(scenario())
    by_host = Counter((host, done) for host, done in streams)
    assert set(by_host) == {("127.0.0.2", False), ("127.0.0.3", True)}
    assert [response.status_code for response in plain] == [200] * 10
    assert {response.json()["host"] for response in plain} == {"127.0.0.3"}
    assert all(done for _, done in late)


def test_a_request_that_ends_its_replica_ends_two_at_most(balancer):
    replicas = [psutil.Process(balancer.driver.pid(balancer.driver.start())) for _ in range(4)]
    balancer.wait_up(4)
    answer = httpx.post(balancer.url, params={"deadly": 1}, json={}, timeout=20)
    assert answer.status_code >= 500
    assert sum(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in replicas) >= 2
    assert httpx.post(balancer.url, params={"plain": 1, "delay": 0}, json={}, timeout=20).status_code == 200


def test_metrics_of_one_arbitrary_replica_are_not_passed_on(balancer):
    balancer.wait_up(0)
    with socket.create_connection(("127.0.0.1", balancer.port)) as connection:
        for path in ("/metrics", "/%6detrics", "/metric%73", "//metrics", "/metrics/", "/./metrics", "/METRICS", "/x"):
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 404 ") and b"not_found_error" in answer, path
