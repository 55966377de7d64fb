# /// script
# dependencies = ["smolagents[openai]"]
# ///
"""smolagents: its OpenAI model, and an agent that calls tools until it answers."""

import json

from common import MODEL, QUESTION, URL, closes_a_loop, report
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def model(**fields):
    return OpenAIServerModel(MODEL, api_base=f"{URL}/v1", api_key="none", **fields)


def text():
    return bool(model(temperature=0, max_tokens=6)(MESSAGES).content)


def stream():
    return bool("".join(d.content or "" for d in model(temperature=0, max_tokens=6).generate_stream(MESSAGES)))


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}}
    return json.loads(model(temperature=0)(MESSAGES, response_format=form).content) == {"city": "Bern"}


def tools():
    def run(cities):
        @tool
        def weather() -> str:
            """Of Bern."""
            cities.append("Bern")
            return "rain"

        agent = ToolCallingAgent([weather], model(max_tokens=100), max_steps=8, verbosity_level=0)
        agent.prompt_templates["system_prompt"] = "Call tools."
        assert agent.run(QUESTION, return_full_result=True).state == "success" or not cities

    return closes_a_loop(run, tries=10)


report(text=text, stream=stream, structured=structured, tools=tools)
