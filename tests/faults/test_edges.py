"""The edge of the server: what a request is, who may send it, how much of it, and what becomes of the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from server.api.http import body as bodies
from server.api.http.auth import KeyRing
from server.cli import main
from server.config import Settings
from server.options import SettingsError, check_environment
from tests.api.tiny import NAME, QUICK, RunningServer
from tests.faults.ledger import gather
from tests.faults.test_clients import BODY, bearer, load, open_socket, until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def keyed(pair, tmp_path_factory):
    """Keys from a file; one request in flight at a time; metrics on a port of their own."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text("alpha\nbeta\n")
    flags = ("--api-key-file", str(folder / "keys"), "--max-concurrent-per-key", "1", "--metrics-port", "0")
    with RunningServer(pair, *flags) as server:
        server.keys = folder / "keys"
        yield server


def raw(server: RunningServer, request: bytes) -> bytes:
    with open_socket(server.url) as connection:
        connection.sendall(request)
        return connection.recv(65536)


def paths_of(server: RunningServer) -> list[tuple[str, str]]:
    document = httpx.get(server.url + "/openapi.json", headers=bearer("alpha")).json()
    return [(m, p) for p, operations in document["paths"].items() for m in operations] + [("post", "/ping")]


def spellings(path: str) -> list[str]:
    """Forms in which a client may write a path."""
    first = "/%" + path[1:2].encode().hex() + path[2:] if len(path) > 1 else path
    last = path[:-1] + "%" + path[-1:].encode().hex()
    slashes = ["/" + path, "/." + path, path + "/", path + "%2f"]
    return [path, *slashes, first, last, path.upper(), path + "?x=1", path + ";"]


def test_whatever_the_router_serves_is_what_the_limits_see(keyed):
    """Every route in every spelling: a POST counts against its key, or is refused before it costs anything."""
    holder = httpx.Client(base_url=keyed.url, headers=bearer("beta"), timeout=60)
    body = BODY | {"max_tokens": 250, "stream": True, "n": 16}
    with holder.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        for method, path in paths_of(keyed):
            for form in spellings(path.replace("{model}", NAME)):
                head = f"{method.upper()} {form} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                answer = raw(keyed, head.encode() + b"authorization: Bearer beta\r\ncontent-length: 2\r\n\r\n{}")
                status = int(answer.split(b" ")[1])
                if method == "post" and path != "/ping":
                    assert status in (429, 307, 404, 405), (form, status)
                nobody = int(raw(keyed, head.encode() + b"content-length: 2\r\n\r\n{}").split(b" ")[1])
                public = ("/health", "/live", "/ping", "/version", "/metrics")
                assert path in public or nobody == 401, (form, nobody)
    holder.close()


@pytest.mark.parametrize("character", ["%0a", "%0d%0a", "%1b[2J", "%00", "%7f", "%e2%80%a8", "%c2%85"])
def test_a_path_with_control_characters_is_refused_and_writes_no_line(keyed, character):
    fake = character + "2026-01-01 00:00:00 ERROR forged"
    answer = raw(keyed, f"GET /v1/models/x{fake.replace(' ', '%20')} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert until(lambda: any("forged" in line for line in keyed.log))
    assert all(line[:4].isdigit() and line.rstrip("\n").isprintable() for line in keyed.log if "forged" in line)
    assert not any(line.startswith("2026-01-01") for line in keyed.log)


def test_metrics_are_on_their_own_port_and_nowhere_else(keyed):
    (port,) = {line.rsplit(" ", 1)[1].strip() for line in keyed.log if "metrics on port" in line}
    own = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert own.status_code == 200 and "boomerang:event_loop_lag_seconds_bucket" in own.text
    for path in ("/health", "/live"):
        assert httpx.get(f"http://127.0.0.1:{port}{path}").json() == {"status": "ok"}
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404
    for path in ("/metrics", "/%6detrics"):
        assert raw(keyed, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()).startswith(b"HTTP/1.1 404 ")
    # Methods and paths are labels: what a client makes up must not become one.
    for word in ("MADEUP", "PROPFIND"):
        raw(keyed, f"{word} /health HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert "MADEUP" not in text and "PROPFIND" not in text


def test_sighup_reads_the_keys_again_and_keeps_the_old_ones_if_the_new_are_bad(keyed):
    def accepts(key: str) -> bool:
        return httpx.get(keyed.url + "/v1/models", headers=bearer(key)).status_code == 200

    def reload(text: str, expected: str) -> None:
        seen = len(keyed.log)
        keyed.keys.write_text(text)
        keyed.process.send_signal(signal.SIGHUP)
        assert until(lambda: any(expected in line for line in keyed.log[seen:]))

    reload("alpha\ngamma\n", "were read again: 2")
    assert accepts("alpha") and accepts("gamma") and not accepts("beta")
    for bad in ("", "alpha\nalpha\n", "# nothing\n"):
        reload(bad, "stay as they were")
        assert accepts("alpha") and accepts("gamma")
    assert not any("gamma" in line for line in keyed.log)  # keys stay out of the log
    reload("alpha\nbeta\n", "were read again: 2")


def test_a_key_cannot_tell_what_another_has_sent(keyed):
    prompt = list(range(10, 74))

    def cached(key: str, **more) -> int:
        body = {"prompt": prompt, "max_tokens": 1, **more}
        answer = httpx.post(keyed.url + "/v1/completions", json=body, headers=bearer(key), timeout=60).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("alpha") == 0 and cached("alpha") > 0
    assert cached("beta") == 0 and cached("beta") > 0
    assert cached("alpha", cache_salt="x") == 0


def test_a_salt_separates_the_answers_of_the_messages_api_too(keyed):
    def cached(salt: str) -> int:
        body = {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "The quick brown fox " * 8}]}
        url = keyed.url + "/v1/messages"
        answer = httpx.post(url, json=body | {"cache_salt": salt}, headers={"x-api-key": "alpha"}, timeout=60).json()
        return answer["usage"]["cache_read_input_tokens"]

    assert cached("one") == 0 and cached("one") > 0 and cached("two") == 0


def test_the_same_keys_can_share_the_cache_if_the_operator_says_so(pair, tmp_path):
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    with RunningServer(pair, "--api-key-file", str(tmp_path / "keys"), "--share-prefix-cache", *QUICK) as server:
        for key, expected in (("alpha", False), ("beta", True)):
            body = {"prompt": list(range(10, 74)), "max_tokens": 1}
            answer = httpx.post(server.url + "/v1/completions", json=body, headers=bearer(key), timeout=60).json()
            assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) is expected


def test_a_minute_of_a_key_is_counted_in_sequences_and_tokens(pair, tmp_path):
    entries = [
        {"key": "few", "max_sequences_per_minute": 10},
        {"key": "short", "max_tokens_per_minute": 100},
    ]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    with RunningServer(pair, "--api-key-file", str(tmp_path / "keys.json"), *QUICK) as server:

        def ask(key: str, **more) -> httpx.Response:
            body = BODY | {"max_tokens": 2} | more
            return httpx.post(server.url + "/v1/completions", json=body, headers=bearer(key), timeout=60)

        assert ask("few", n=6).status_code == 200
        refused = ask("few", n=5)
        assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 60
        assert ask("few", n=4).status_code == 200
        assert ask("few", prompt=[[5]] * 11).status_code == 400  # could never be served
        assert ask("short", max_tokens=60).status_code == 200
        assert ask("short", max_tokens=60).status_code == 429
        assert ask("short", max_tokens=20).status_code == 200


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--api-key", ""], {}),
        (["--api-key", " , "], {}),
        (["--api-key-file", ""], {}),
        ([], {"BOOMERANG_API_KEY": ""}),
        ([], {"BOOMERANG_API_KEY_FILE": ""}),
        ([], {"BOOMERANG_API_KEYS": "a"}),
        ([], {"BOOMERANG_PORT": "tcp://10.0.0.1:80"}),
    ],
)
def test_keys_that_are_given_but_empty_end_the_start(flags, environment, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("BOOMERANG_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", *flags]) == 2
    expected = {"BOOMERANG_API_KEYS": "did you mean BOOMERANG_API_KEY?", "BOOMERANG_PORT": "enableServiceLinks"}
    (name,) = environment or ("",)
    said = capsys.readouterr().err
    assert expected.get(name, "given, but empty") in said and "Traceback" not in said


def test_a_key_that_is_given_twice_ends_the_start():
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BOOMERANG_")}
    command = [sys.executable, "-m", "server", "serve", "--api-key", "a", "a"]
    result = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "twice" in result.stderr and "Traceback" not in result.stderr


def test_every_variable_of_the_compose_file_is_known_to_the_server():
    names = [line.lstrip("#").partition("=")[0] for line in (ROOT / ".env.example").read_text().splitlines()]
    check_environment({name: "" for name in names if name.startswith("BOOMERANG_")})
    with pytest.raises(SettingsError, match="did you mean BOOMERANG_MAX_NUM_SEQS"):
        check_environment({"BOOMERANG_MAX_NUM_SEQ": "4"})


def test_a_tenant_keeps_its_name_when_another_key_is_revoked(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    before = KeyRing.from_settings(Settings(api_key_file=str(path))).find("two").name
    path.write_text("two\n")
    assert KeyRing.from_settings(Settings(api_key_file=str(path))).find("two").name == before


def test_an_open_server_warns_unless_only_this_machine_can_reach_it(pair):
    for host, warns in (("0.0.0.0", True), ("127.0.0.1", False)):
        server = RunningServer(pair, "--host", host, *QUICK)
        try:
            server.wait_listening()
            log = server.log
            assert until(lambda log=log: any("no API keys" in line for line in log), 10 if warns else 1) is warns
        finally:
            server.process.kill()
            server.process.wait()


def test_an_ordinary_file_is_not_removed_for_a_socket(tmp_path):
    (tmp_path / "precious").write_text("mine")
    command = [sys.executable, "-m", "server", "serve", "--uds", str(tmp_path / "precious")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0 and "is no socket" in result.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


CLASHES = {
    "template variables": {"chat_template_kwargs": {"self": 1, "context": 2, "args": 3, "kwargs": 4, "template": 5}},
    "continue_final_message": {"chat_template_kwargs": {"continue_final_message": True, "variables": 3}},
    "deep schema": {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(200)}}]},
    "deep variable": {"chat_template_kwargs": {"x": nested(500)}},
    "as deep as is allowed": {"chat_template_kwargs": {"x": nested(61)}},
    "undefined arithmetic": {"chat_template_kwargs": {"tools_in_user_message": [[]]}},
}


@pytest.mark.parametrize("name", CLASHES)
def test_what_clashes_with_the_renderer_is_the_callers_mistake(keyed, name):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | CLASHES[name]
    answer = httpx.post(keyed.url + "/v1/chat/completions", json=body, headers=bearer("alpha"), timeout=60)
    assert answer.status_code == (400 if name.startswith("deep") else 200), answer.text
    assert not any("Traceback" in line for line in keyed.log)


def test_a_deeply_nested_tool_call_of_the_messages_api(keyed):
    use = {"type": "tool_use", "id": "t", "name": "f", "input": nested(300)}
    body = {"model": NAME, "max_tokens": 1, "messages": [{"role": "assistant", "content": [use]}]}
    answer = httpx.post(keyed.url + "/v1/messages", json=body, headers=bearer("alpha"), timeout=60)
    assert answer.status_code == 400 and "nested" in answer.json()["error"]["message"]


def test_a_body_that_never_ends_is_closed_on_a_route_that_does_not_read_it(keyed):
    with open_socket(keyed.url) as connection:
        connection.sendall(b"POST /ping HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < started + 60:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.2)
            raise AssertionError("still open")
    assert load_with_key(keyed)["server_load"] == 0


def load_with_key(server: RunningServer) -> dict:
    return httpx.get(server.url + "/load", headers=bearer("alpha")).json()


def test_a_step_that_hangs_ends_the_process_and_says_where(faulty):
    server = faulty("--step-timeout", "1")
    server.inject(sleep=600)
    with pytest.raises(httpx.HTTPError):
        answer = httpx.post(server.url + "/v1/completions", json=BODY | {"max_tokens": 2}, timeout=60)
        assert answer.status_code >= 500
        raise httpx.HTTPError("told")
    assert server.process.wait(60) == 1
    log = "".join(server.log)
    assert "has not returned" in log and "faulty.py" in log


def test_a_native_crash_says_where(faulty):
    server = faulty()
    server.process.send_signal(signal.SIGSEGV)
    server.process.wait(30)
    server.reader.join(10)
    assert "Fatal Python error: Segmentation fault" in "".join(server.log)


def test_sighup_before_the_model_is_there_does_not_end_the_server(pair):
    server = RunningServer(pair)
    try:
        server.wait_listening()
        server.process.send_signal(signal.SIGHUP)
        server.wait_ready()
        assert load(server.url)["is_draining"] is False
    finally:
        assert server.stop() == 0


def test_the_listening_socket_is_not_inheritable():
    from server.process import bind

    with bind(Settings(host="127.0.0.1", port=0)) as listener:
        assert not listener.get_inheritable() and isinstance(listener, socket.socket)


def test_the_queue_counts_every_sequence_of_a_request(pair):
    """Lists of prompts, sent at once: however many sequences they hold, no more wait than are allowed."""
    with RunningServer(pair, "--max-num-seqs", "2", "--max-num-queued-reqs", "20", "--size-policy", "auto") as server:
        body = BODY | {"prompt": [[5, 9, 20]] * 15, "max_tokens": 100}

        async def flood(client: httpx.AsyncClient) -> tuple[list[int], int]:
            posts = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(20)]
            most = 0
            while not all(post.done() for post in posts):
                most = max(most, (await client.get("/load")).json()["num_waiting"])
                await asyncio.sleep(0.02)
            return [post.result().status_code for post in posts], most

        statuses, most = gather(server.url, flood)
        assert set(statuses) == {200, 503} and most <= 20


def test_names_of_unknown_fields_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(bodies, "_seen_unknown", seen := set())
    for number in range(3000):
        bodies.check_extra({f"made_up_{number}_" + "x" * 10_000: 1})
    assert len(seen) <= 1000 and max(map(len, seen)) <= 100
