# /// script
# dependencies = ["llama-index-core", "llama-index-llms-openai-like", "llama-index-embeddings-openai-like"]
# ///
"""LlamaIndex: OpenAILike, its function agent and its embeddings."""

import asyncio
from typing import Literal

from common import MODEL, QUESTION, SAYS_CALL_OR_DONE, URL, closes_a_loop, report
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Place(BaseModel):
    """Where."""

    city: Literal["Bern"]


def model(**fields):
    shared = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 1024, "max_retries": 0}
    return OpenAILike(model=MODEL, api_base=f"{URL}/v1", api_key="none", **shared, **fields)


def text():
    return bool(model(temperature=0, max_tokens=6).complete(QUESTION).text)


def stream():
    return bool("".join(part.delta for part in model(temperature=0, max_tokens=6).stream_complete(QUESTION)))


def structured():
    return model(temperature=0).as_structured_llm(Place).complete(QUESTION).raw == Place(city="Bern")


def tools():
    def run(cities):
        def weather(city: str) -> str:
            """Of a city."""
            cities.append(city)
            return "rain"

        async def loop():
            llm = model(additional_kwargs={"extra_body": SAYS_CALL_OR_DONE})
            await FunctionAgent(tools=[FunctionTool.from_defaults(weather)], llm=llm).run(QUESTION)

        asyncio.run(loop())

    return closes_a_loop(run)


def embeddings():
    embed = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key="none")
    return len(embed.get_text_embedding_batch(["hi", "ho"])[1]) == 64


report(text=text, stream=stream, structured=structured, tools=tools, embeddings=embeddings)
