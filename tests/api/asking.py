"""Asks a server for one text on every route, whole and streamed, and gives back what a client makes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

MESSAGES = [{"role": "user", "content": "hi"}]


@dataclass
class Got:
    """One answer: `calls` are (name, arguments as text or object)."""

    content: str | None = None
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish: str | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | ({} if parameters is None else {"parameters": parameters})}


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with all of these and nothing else."""
    fields = {"properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "object", **fields}


def post(url: str, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = httpx.post(url + path, json=body, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def events(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(url + path, json=body | {"stream": True}, timeout=60)
    assert response.status_code == 200, response.text
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def chat(url: str, body: dict[str, Any], stream: bool = False) -> Got:
    body = {"messages": MESSAGES, "max_tokens": 200, "temperature": 0, **body}
    if not stream:
        choice = post(url, "/v1/chat/completions", body)["choices"][0]
        message = choice["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        return Got(message["content"], message.get("reasoning_content", ""), calls, choice["finish_reason"])
    got = Got(chunks=events(url, "/v1/chat/completions", body))
    arguments: dict[int, list[str]] = {}
    for chunk in got.chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            got.content = (got.content or "") + (delta.get("content") or "")
            got.reasoning += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    arguments[call["index"]] = [call["function"]["name"], ""]
                arguments[call["index"]][1] += call["function"]["arguments"]
            got.finish = choice["finish_reason"] or got.finish
    got.calls = [tuple(call) for call in arguments.values()]
    got.content = got.content or (None if got.calls else "")
    return got


def responses(url: str, body: dict[str, Any], stream: bool = False) -> Got:
    tools = [{"type": "function", **item["function"]} for item in body.pop("tools", [])]
    body = {"input": "hi", "max_output_tokens": 200, "temperature": 0, "tools": tools, **body}
    answer = events(url, "/v1/responses", body)[-1]["response"] if stream else post(url, "/v1/responses", body)
    got = Got(finish=answer["status"])
    for item in answer["output"]:
        if item["type"] == "message":
            got.content = (got.content or "") + item["content"][0]["text"]
        elif item["type"] == "reasoning":
            got.reasoning += item["content"][0]["text"]
        else:
            got.calls.append((item["name"], item["arguments"]))
    return got


def messages(url: str, body: dict[str, Any], stream: bool = False) -> Got:
    """`body` has chat's words for tools and forced text; the text itself is forced by `output_config`."""
    functions = [item["function"] for item in body.pop("tools", [])]
    tools = [{"name": f["name"], "input_schema": f.get("parameters")} for f in functions]
    body = {"messages": MESSAGES, "max_tokens": 200, "temperature": 0, "tools": tools, **body}
    got = Got()
    if not stream:
        answer = post(url, "/v1/messages", body)
        blocks, got.finish = answer["content"], answer["stop_reason"]
    else:
        blocks = []
        for event in events(url, "/v1/messages", body):
            if event["type"] == "content_block_start":
                blocks.append(event["content_block"] | {"partial": ""})
            elif event["type"] == "content_block_delta":
                delta, block = event["delta"], blocks[event["index"]]
                for name in ("text", "thinking"):
                    if name in delta:
                        block[name] += delta[name]
                block["partial"] += delta.get("partial_json", "")
            elif event["type"] == "message_delta":
                got.finish = event["delta"]["stop_reason"]
        for block in blocks:
            if block["partial"]:
                block["input"] = json.loads(block["partial"])
    for block in blocks:
        if block["type"] == "text":
            got.content = (got.content or "") + block["text"]
        elif block["type"] == "thinking":
            got.reasoning += block["thinking"]
        else:
            got.calls.append((block["name"], block["input"]))
    return got
