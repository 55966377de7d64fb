# /// script
# dependencies = ["litellm==1.*"]
# ///
"""LiteLLM, provider hosted_vllm."""

import json
import os

from common import MODEL, QUESTION, URL, report

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

ASK = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def text():
    return litellm.completion(messages=MESSAGES, max_tokens=6, **ASK).usage.completion_tokens == 6


def stream():
    return bool("".join(c.choices[0].delta.content or "" for c in litellm.completion(
        messages=MESSAGES, max_tokens=6, stream=True, **ASK)))  # fmt: skip


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}}
    answer = litellm.completion(messages=MESSAGES, response_format=form, **ASK)
    return json.loads(answer.choices[0].message.content) == {"city": "Bern"}


def tools():
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    message = litellm.completion(messages=MESSAGES, tools=[tool], tool_choice="required", **ASK).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*MESSAGES, message.model_dump(exclude_none=True), result]
    answer = litellm.completion(messages=history, tools=[tool], tool_choice="none", max_tokens=6, **ASK)
    return json.loads(call.function.arguments) == {"city": "Bern"} and bool(answer.choices[0].message.content)


report(text=text, stream=stream, structured=structured, tools=tools)
