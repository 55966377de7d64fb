"""What the proxy of Ray Serve learns of a request, and how little of it a stranger can make it read. Needs no Ray."""

import asyncio
import json

from deploy.ray import headers
from deploy.ray.headers import LOOK_AT, PREFIX_HEADER, SIZE_HEADER, RoutingHeaders, routing_keys


def test_routing_keys_tell_prompts_and_sizes_apart():
    def keys(**request) -> tuple[str, str]:
        return routing_keys(json.dumps(request).encode())

    system = {"role": "system", "content": "You are terse."}
    first = keys(messages=[system, {"role": "user", "content": "a"}])
    later = keys(messages=[system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    other = keys(messages=[system, {"role": "user", "content": "z"}])
    assert first == later != other
    assert keys(prompt="x", model="tiny:5L")[1] == "5L" and keys(prompt="x", size="auto")[1] == ""
    assert routing_keys(b"{nonsense") == ("", "") and routing_keys(b'{"prompt": 5}') != ("", "")
    assert keys(input="x") == keys(prompt="x")
    # The beginning of a body is enough, wherever it is cut.
    body = json.dumps({"model": "tiny:5L", "prompt": "word " * 400}).encode()
    assert {routing_keys(body[:cut]) for cut in range(1100, len(body))} == {routing_keys(body)}


def through_the_proxy(body: list[bytes], path: str = "/v1/completions", stalls: bool = False):
    """(headers the replica sees, its body, how much had been read when it was asked)."""
    sent, seen = iter(body), {}
    num_read = 0

    async def receive():
        nonlocal num_read
        if (chunk := next(sent, None)) is None:
            assert stalls
            await asyncio.sleep(60)
        num_read += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": stalls or num_read < sum(map(len, body))}

    async def replica(scope, receive, send):
        seen["headers"], seen["read"] = dict(scope["headers"]), num_read
        got = b""
        while len(got) < sum(map(len, body)):
            got += (await receive())["body"]
        seen["body"] = got

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"x")]}
    asyncio.run(RoutingHeaders(replica)(scope, receive, None))
    return seen["headers"], seen["body"], seen["read"]


def test_a_proxy_reads_no_more_than_it_needs_before_a_key_is_checked():
    whole = json.dumps({"model": "tiny:5L", "prompt": "a" * (8 << 20)}).encode()
    chunks = [whole[at : at + 50_000] for at in range(0, len(whole), 50_000)]
    found, body, num_read = through_the_proxy(chunks)
    assert body == whole and num_read < LOOK_AT + 50_000
    assert found[PREFIX_HEADER] and found[SIZE_HEADER] == b"5L"


def test_a_client_that_sends_half_a_body_does_not_hold_the_proxy(monkeypatch):
    monkeypatch.setattr(headers, "PATIENCE", 0.05)
    found, body, _ = through_the_proxy([b'{"model": "tiny:5L", "prompt": "ab'], stalls=True)
    assert found[SIZE_HEADER] == b"5L" and body.endswith(b"ab")


def test_other_routes_are_not_looked_at():
    found, _, num_read = through_the_proxy([b"{}"], "/tokenize")
    assert PREFIX_HEADER not in found and num_read == 0
