# /// script
# dependencies = ["pydantic-ai-slim[openai]"]
# ///
"""pydantic-ai with its OpenAI chat model."""

from typing import Literal

from common import MODEL, QUESTION, SAYS_CALL_OR_DONE, URL, closes_a_loop, report
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
SHORT = {"temperature": 0, "max_tokens": 6}


class Place(BaseModel):
    city: Literal["Bern"]


def text():
    return bool(Agent(model).run_sync(QUESTION, model_settings=SHORT).output)


async def stream():
    async with Agent(model).run_stream(QUESTION, model_settings=SHORT) as result:
        return bool("".join([part async for part in result.stream_text(delta=True)]))


def structured():
    by_tool = Agent(model, output_type=Place).run_sync(QUESTION).output
    by_schema = Agent(model, output_type=NativeOutput(Place)).run_sync(QUESTION).output
    return by_tool == by_schema == Place(city="Bern")


def tools():
    def run(cities):
        agent = Agent(model)

        @agent.tool_plain
        def weather(city: str) -> str:
            cities.append(city)
            return "rain"

        agent.run_sync(QUESTION, model_settings={"extra_body": SAYS_CALL_OR_DONE})

    return closes_a_loop(run)


report(text=text, stream=stream, structured=structured, tools=tools)
