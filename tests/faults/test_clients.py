"""Clients that stall, flood or send monsters, and a server that is told to stop while it is busy."""

import asyncio
import json
import os
import signal
import socket
import time

import httpx
import psutil
import pytest

from tests.api.tiny import QUICK, RunningServer
from tests.faults.ledger import Ledger, gather

BODY = {"prompt": [5, 9, 20], "temperature": 0, "ignore_eos": True}


def open_socket(url: str, receive_buffer: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    connection.settimeout(60)
    return connection


def http_post(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def until(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def load(url: str) -> dict:
    return httpx.get(url + "/load").json()


def test_a_client_that_does_not_read_holds_up_nobody_and_is_dropped(pair):
    # With every log-probability of many choices the answer is far larger than all buffers on the way.
    huge = BODY | {"max_tokens": 200, "n": 16, "logprobs": 300, "stream": True}
    with RunningServer(pair, "--stalled-client-timeout", "1", "--max-logprobs", "400") as server:
        stalled = open_socket(server.url, receive_buffer=4096)
        stalled.sendall(http_post(huge))
        assert until(lambda: load(server.url)["num_running"] > 0)
        ledger = Ledger()

        async def others(client):
            await asyncio.gather(*(ledger.ask(client, BODY | {"max_tokens": 40, "stream": True}) for _ in range(8)))

        gather(server.url, others)
        assert ledger.answered == 8
        idle = until(lambda: not load(server.url)["num_running"] and not load(server.url)["server_load"])
        assert idle, load(server.url)
        assert load(server.url)["kv_usage"] == 0
        stalled.close()
        assert any("neither sends nor reads" in line for line in server.log)
        ledger.tell("connection dropped (the stalled one)")
        ledger.record("a client stops reading a huge stream", "engine never waits; connection dropped after 1 s")


@pytest.fixture(scope="module")
def plain(pair):
    with RunningServer(pair, *QUICK) as server:
        yield server


def test_half_sent_requests_cost_a_connection_each_and_nothing_else(plain):
    halves = [open_socket(plain.url) for _ in range(40)]
    for i, half in enumerate(halves):
        half.sendall(b"POST /v1/compl" if i % 2 else http_post(BODY | {"max_tokens": 9})[:-5])
    ledger = Ledger()

    async def others(client):
        await asyncio.gather(*(ledger.ask(client, BODY | {"max_tokens": 20}) for _ in range(8)))

    gather(plain.url, others)
    assert ledger.answered == 8
    for half in halves:
        half.close()
    assert until(lambda: load(plain.url)["server_load"] == 0)
    endless = open_socket(plain.url)
    endless.sendall(b"GET /health HTTP/1.1\r\n")
    with pytest.raises(OSError):
        for i in range(5000):
            endless.sendall(b"x-%d: %s\r\n" % (i, b"y" * 100))
            time.sleep(0)
        assert b"400" in endless.recv(100)
        raise OSError
    assert httpx.get(plain.url + "/health").status_code == 200
    ledger.record("40 half-sent requests, one endless head", "healthy")


@pytest.fixture(scope="module")
def two_keys(pair, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    entries = [{"key": "loud", "tenant": "loud"}, {"key": "calm"}, {"key": "few", "tenant": "few", "max_concurrent": 2}]
    keys.write_text(json.dumps(entries))
    flags = ("--max-num-seqs", "4", "--max-num-queued-reqs", "20", "--api-key-file", str(keys))
    with RunningServer(pair, *flags) as server:
        yield server


def bearer(key: str) -> dict:
    return {"authorization": f"Bearer {key}"}


def test_a_flood_from_one_key_is_refused_and_the_other_key_is_served(two_keys):
    loud, calm = Ledger(), Ledger()

    async def flood(client):
        done = asyncio.Event()

        async def shout():
            while not done.is_set():
                await loud.ask(client, BODY | {"max_tokens": 60}, headers=bearer("loud"))
                await asyncio.sleep(0.05)

        shouters = [asyncio.ensure_future(shout()) for _ in range(60)]
        await asyncio.sleep(0.5)
        for _ in range(10):
            await calm.ask(client, BODY | {"max_tokens": 5}, headers=bearer("calm"))
        done.set()
        await asyncio.gather(*shouters)

    gather(two_keys.url, flood)
    assert calm.answered == 10 and not calm.told
    assert set(loud.told) == {"503"} and loud.answered >= 20
    loud.record("60 clients with one key, queue of 20", "all 10 requests of another key were answered meanwhile")


def test_concurrency_limit_of_a_key_answers_429_with_retry_after(two_keys):
    async def burst(client):
        body = BODY | {"max_tokens": 60}
        posts = [client.post("/v1/completions", json=body, headers=bearer("few")) for _ in range(12)]
        return await asyncio.gather(*posts)

    answers = gather(two_keys.url, burst)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert sum(answer.status_code == 200 for answer in answers) == 2 and len(refused) == 10
    assert all("retry-after" in answer.headers for answer in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"


MONSTERS = {
    "exponential regex": {"structured_outputs": {"regex": "(a|b)*a(a|b){22}"}},
    "nested counts": {"structured_outputs": {"regex": "((a{0,50}b){0,50}c){0,50}"}},
    "ambiguous grammar": {"structured_outputs": {"grammar": 'start: s\ns: s s s | s s | "a" | ""\n'}},
    "many properties": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}},
        }
    },
    "intersection of patterns": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"allOf": [{"type": "string", "pattern": f".*{a}.*"} for a in "abcdefghijkl"]}},
        }
    },
    "too large": {"structured_outputs": {"regex": "a" * 100_000}},
}


def test_exploding_grammars_cost_their_senders_only(plain):
    ledger = Ledger()
    alone = httpx.post(plain.url + "/v1/completions", json=BODY | {"max_tokens": 100}).json()["choices"][0]["text"]

    async def together(client):
        undisturbed = asyncio.ensure_future(ledger.ask(client, BODY | {"max_tokens": 100, "stream": True}, "plain"))
        asks = [ledger.ask(client, BODY | {"max_tokens": 40} | monster, name) for name, monster in MONSTERS.items()]
        statuses = await asyncio.gather(*asks)
        await undisturbed
        return statuses

    statuses = gather(plain.url, together)
    assert set(statuses) <= {200, 400} and statuses[-1] == 400
    assert ledger.texts["plain"] == alone
    ledger.record("six exploding grammars beside a plain stream", "healthy, the plain answer unchanged")


def test_constraints_that_contradict_each_other_are_the_callers_mistake(two_keys):
    body = BODY | {"max_tokens": 4, "allowed_token_ids": [7], "structured_outputs": {"regex": "[0-9]+"}}
    for _ in range(2):  # not put into quarantine either
        answer = httpx.post(two_keys.url + "/v1/completions", json=body, headers=bearer("calm"))
        assert answer.status_code == 400 and "leave no token" in answer.json()["error"]["message"]
    assert not any("ERROR" in line for line in two_keys.log)


@pytest.mark.parametrize(("timeout", "row"), [("30", "all finish"), ("0.5", "time runs out")])
def test_sigterm_under_load_loses_nothing_silently(pair, timeout, row):
    server = RunningServer(pair, "--shutdown-timeout", timeout, "--max-num-seqs", "4")
    server.wait_ready()
    ledger = Ledger()

    async def stop_in_the_middle(client):
        body = BODY | {"max_tokens": 230}
        early = [asyncio.ensure_future(ledger.ask(client, body | {"stream": i % 2 == 0}, i)) for i in range(24)]
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        health = await client.get("/health")
        assert health.status_code == 503 and "shutting down" in health.text
        assert (await client.get("/live")).status_code == 200
        late = await client.post("/v1/completions", json=body)
        assert late.status_code == 503 and "retry-after" in late.headers
        await asyncio.gather(*early)

    gather(server.url, stop_in_the_middle)
    assert server.process.wait(30) == 0
    assert "pages are free" in "".join(server.log)
    if timeout == "30":
        assert ledger.answered == 24 and len(set(ledger.texts.values())) == 1
    else:
        assert ledger.answered + sum(ledger.told.values()) == 24 and ledger.told
        assert "connection broken" not in ledger.told
    ledger.record(f"SIGTERM with 24 requests under way, {row}", "exits with status 0, all pages free")


def test_a_grammar_that_ends_its_trial_process_is_refused(pair):
    """A stand-in for grammars that overflow the native parser's stack: the trial process is told to end itself."""
    ledger = Ledger()
    with RunningServer(pair, *QUICK, module="tests.faults.fragile") as server:

        async def together(client):
            undisturbed = asyncio.ensure_future(ledger.ask(client, BODY | {"max_tokens": 100, "stream": True}))
            deadly = [BODY | {"structured_outputs": {"choice": [f"end yourself {i}"]}} for i in (1, 2, 1)]
            statuses = [await ledger.ask(client, body) for body in deadly]
            statuses.append(await ledger.ask(client, BODY | {"structured_outputs": {"choice": ["yes"]}}))
            await undisturbed
            return statuses

        assert gather(server.url, together) == [400, 400, 400, 200]
        # The third was known: it ended no process.
        assert sum("crashed the parser" in line for line in server.log) == 2
    ledger.record("two grammars that end the process they are tried in", "healthy")


def test_trial_processes_inherit_no_socket_and_no_secret(pair):
    secrets = {"BOOMERANG_API_KEY": "secret", "HF_TOKEN": "secret"}
    with RunningServer(pair, *QUICK, env=secrets) as server:
        body = BODY | {"max_tokens": 2, "structured_outputs": {"choice": ["yes"]}}
        answer = httpx.post(server.url + "/v1/completions", json=body, headers=bearer("secret"), timeout=60)
        assert answer.status_code == 200
        children = psutil.Process(server.process.pid).children()
        trials = [child for child in children if "server.engine.extras.grammar_trial" in child.cmdline()]
        assert len(trials) == 2
        for trial in trials:
            assert "secret" not in trial.environ().values()
            assert not trial.net_connections()
            opened = {os.readlink(f"/proc/{trial.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{trial.pid}/fd")}
            assert sum(name.startswith("socket:") for name in opened) <= 2, opened  # its own ends of stdin and stdout
