#!/usr/bin/env bash
# openai-python 3.54.0: a Retry-After of up to 120 s is slept whole, whatever the client's timeout; above 120 s the client
# does not retry at all, though max_retries allows it.
#
# A server that answers 503 with an honest estimate therefore blocks a caller for two minutes inside one call whose
# timeout is five seconds, and with a slightly longer estimate turns retries off. Neither is an error on the wire.
#
# Seen on 29 November 2026, Python 3.11, x86-64 (sleeps are recorded, not slept):
#   Retry-After 3: answered after 2 requests, slept [3.0]
#   Retry-After 119: answered after 2 requests, slept [119.0]
#   Retry-After 121: InternalServerError after 1 requests, slept []
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.54.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

ANSWER = {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
ANSWER["choices"] = [{"index": 0, "text": "ok", "finish_reason": "stop"}]


class Overloaded(BaseHTTPRequestHandler):
    """503 with Retry-After to the first request, an answer to the next."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.requests += 1
        first = self.server.requests == 1
        body = b"{}" if first else json.dumps(ANSWER).encode()
        self.send_response(503 if first else 200)
        if first:
            self.send_header("retry-after", self.server.retry_after)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def outcome(retry_after: str) -> tuple[str, int, list[float]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Overloaded)
    server.requests, server.retry_after = 0, retry_after
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=2, timeout=5)
    slept: list[float] = []
    real, time.sleep = time.sleep, slept.append
    try:
        client.completions.create(model="m", prompt="x")
        result = "answered"
    except openai.APIStatusError as error:
        result = type(error).__name__
    finally:
        time.sleep = real
    return result, server.requests, slept


found = {value: outcome(value) for value in ("3", "119", "121")}
for value, (result, requests, slept) in found.items():
    print(f"Retry-After {value}: {result} after {requests} requests, slept {slept}")
assert found["3"] == ("answered", 2, [3.0])
assert found["119"] == ("answered", 2, [119.0]), "changed: a long Retry-After below two minutes"
assert found["121"] == ("InternalServerError", 1, []), "changed: a Retry-After above two minutes"
PYTHON
