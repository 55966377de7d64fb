# /// script
# dependencies = ["openai-agents"]
# ///
"""OpenAI's Agents SDK, over chat completions and over responses."""

from functools import partial
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import MODEL, QUESTION, SAYS_CALL_OR_DONE, URL, closes_a_loop, report
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
CLASSES = (OpenAIChatCompletionsModel, OpenAIResponsesModel)
# An answer that max_tokens cuts is an exception to this SDK where it comes from responses.
DONE = ModelSettings(extra_body={"structured_outputs": {"choice": ["done"]}})


class Place(BaseModel):
    city: Literal["Bern"]


def model(kind):
    return kind(model=MODEL, openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key="none"))


async def text():
    for kind in CLASSES:
        if (await Runner.run(Agent("a", model=model(kind), model_settings=DONE), QUESTION)).final_output != "done":
            return False


async def stream():
    for kind in CLASSES:
        result = Runner.run_streamed(Agent("a", model=model(kind), model_settings=DONE), QUESTION)
        kinds = [event.type async for event in result.stream_events()]
        if kinds.count("raw_response_event") < 3 or result.final_output != "done":
            return False


async def structured():
    for kind in CLASSES:
        settings = ModelSettings(temperature=0)
        answer = await Runner.run(Agent("a", model=model(kind), output_type=Place, model_settings=settings), QUESTION)
        if answer.final_output != Place(city="Bern"):
            return False


def tools():
    def run(kind, cities):
        @function_tool
        def weather(city: str) -> str:
            """Of a city."""
            cities.append(city)
            return "rain"

        settings = ModelSettings(extra_body=SAYS_CALL_OR_DONE)
        Runner.run_sync(Agent("a", model=model(kind), tools=[weather], model_settings=settings), QUESTION)

    return all(closes_a_loop(partial(run, kind)) for kind in CLASSES)


report(text=text, stream=stream, structured=structured, tools=tools)
