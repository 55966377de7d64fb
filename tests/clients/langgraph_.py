# /// script
# dependencies = ["langgraph", "langchain", "langchain-openai"]
# ///
"""LangGraph: the agent of LangChain over ChatOpenAI."""

from typing import Literal

from common import MODEL, QUESTION, SAYS_CALL_OR_DONE, URL, closes_a_loop, report
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Place(BaseModel):
    """Where."""

    city: Literal["Bern"]


def model(**fields):
    return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_retries=0, **fields)


def asked(agent):
    return agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})


def text():
    return bool(asked(create_agent(model(temperature=0, max_tokens=6)))["messages"][-1].content)


def stream():
    agent = create_agent(model(temperature=0, max_tokens=6))
    messages = {"messages": [{"role": "user", "content": QUESTION}]}
    return len([part for part, _ in agent.stream(messages, stream_mode="messages") if part.content]) > 1


def structured():
    ways = ("json_schema", "function_calling")
    return all(model(temperature=0).with_structured_output(Place, method=way).invoke(QUESTION).city for way in ways)


def tools():
    def run(cities):
        @tool
        def weather(city: str) -> str:
            """Of a city."""
            cities.append(city)
            return "rain"

        asked(create_agent(model(extra_body=SAYS_CALL_OR_DONE), [weather]))

    return closes_a_loop(run)


report(text=text, stream=stream, structured=structured, tools=tools)
