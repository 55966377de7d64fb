#!/usr/bin/env bash
# openai-agents 0.24.0: an answer that is cut at max_tokens is an exception over the Responses API and a result over chat
# completions, for the same agent, model and limit.
#
# The Responses API ends a cut answer with status "incomplete" and reason "max_output_tokens"; the text so far is in it,
# and openai-python hands it over. Runner.run asks without streaming, takes the status for a failure and raises
# ModelBehaviorError. With OpenAIChatCompletionsModel finish_reason "length" gives an ordinary result with the text. So a
# limit that ends an answer early elsewhere ends the run of an agent.
#
# Seen on 30 November 2026, Python 3.11, x86-64:
#   chat completions: 'Once upon a'
#   responses: ModelBehaviorError
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai-agents==0.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

TEXT = "Once upon a"


class Cut(BaseHTTPRequestHandler):
    """Every answer is cut at the limit, as the two APIs say it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": TEXT}
            choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
            answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            return self.answer(json.dumps(answer))
        part = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "incomplete", "content": [part]}
        body = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "output": [item], "error": None}
        body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "metadata": {}}
        return self.answer(json.dumps(body | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}))

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


async def main() -> dict[str, str]:
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
    direct = await client.responses.create(model="m", input="Tell a story.", max_output_tokens=3)
    assert direct.status == "incomplete" and direct.output_text == TEXT
    found = {}
    for name, kind in (("chat completions", OpenAIChatCompletionsModel), ("responses", OpenAIResponsesModel)):
        agent = Agent(name="a", model=kind("m", client), model_settings=ModelSettings(max_tokens=3))
        try:
            found[name] = repr((await Runner.run(agent, "Tell a story.")).final_output)
        except Exception as error:
            found[name] = type(error).__name__
        print(f"{name}: {found[name]}")
    return found


set_tracing_disabled(True)
server = ThreadingHTTPServer(("127.0.0.1", 0), Cut)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = asyncio.run(main())
sys.exit(found != {"chat completions": repr(TEXT), "responses": "ModelBehaviorError"})
PYTHON
