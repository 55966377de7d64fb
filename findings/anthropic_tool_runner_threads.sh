#!/usr/bin/env bash
# anthropic-python 2.13.0: tool_runner takes the Messages API to be stateful. A server that ignores a field it does not
# know loses the conversation after the first tool call.
#
# `client.beta.messages.tool_runner` adds `thread: {"type": "create"}` to its first request unasked. If the answer is an
# ordinary message, its second request says `thread: {"type": "continue", "previous_message_id": ...}` and holds the tool
# result alone: neither the question nor the tools. Ignoring `thread`, which the stateless API of other versions invites,
# gives an answer to a tool result that belongs to nothing.
#
# Seen on 30 November 2026, Python 3.11, x86-64:
#   request 1: thread {'type': 'create'}, 1 message (text), tools: True
#   request 2: thread {'type': 'continue', 'previous_message_id': 'msg_1'}, 1 message (tool_result), tools: False
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check anthropic==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
from anthropic import beta_tool

bodies: list[dict] = []


class Stateless(BaseHTTPRequestHandler):
    """Answers as the Messages API does: first with a call of the tool, then with text."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": 2}}
        is_first = len(bodies) == 1
        message = {"id": f"msg_{len(bodies)}", "type": "message", "role": "assistant", "model": "m"}
        message |= {"content": [call if is_first else {"type": "text", "text": "3"}], "stop_sequence": None}
        message |= {"stop_reason": "tool_use" if is_first else "end_turn"}
        message |= {"usage": {"input_tokens": 1, "output_tokens": 1}}
        body = json.dumps(message).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@beta_tool
def add(a: int, b: int) -> str:
    """The sum of two numbers.

    Args:
        a: one
        b: the other
    """
    return str(a + b)


server = ThreadingHTTPServer(("127.0.0.1", 0), Stateless)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none", max_retries=0)
question = [{"role": "user", "content": "1 + 2?"}]
for _ in client.beta.messages.tool_runner(model="m", max_tokens=16, tools=[add], messages=question, max_iterations=3):
    pass
for number, body in enumerate(bodies, 1):
    last = body["messages"][-1]["content"]
    kind = "text" if isinstance(last, str) else last[0]["type"]
    count = len(body["messages"])
    print(f"request {number}: thread {body.get('thread')}, {count} message ({kind}), tools: {'tools' in body}")
assert len(bodies) == 2
assert bodies[0]["thread"] == {"type": "create"} and "tools" in bodies[0], "changed: the first request"
assert bodies[1]["thread"]["type"] == "continue" and "tools" not in bodies[1], "changed: the second request"
assert [part["type"] for part in bodies[1]["messages"][0]["content"]] == ["tool_result"] and len(bodies[1]["messages"]) == 1
PYTHON
