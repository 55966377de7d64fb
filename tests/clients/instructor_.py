# /// script
# dependencies = ["instructor"]
# ///
"""instructor over openai-python: a model's answer as an object, by tool and by schema."""

from typing import Literal

import instructor
import openai
from common import MODEL, QUESTION, URL, report
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": QUESTION}]


class Place(BaseModel):
    city: Literal["Bern"]


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=mode)


def structured():
    ask = {"model": MODEL, "messages": MESSAGES, "response_model": Place, "temperature": 0}
    modes = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)
    return all(client(mode).create(**ask).city == "Bern" for mode in modes)


def stream():
    ask = {"model": MODEL, "messages": MESSAGES, "response_model": Place, "temperature": 0}
    return list(client(instructor.Mode.TOOLS).create_partial(**ask))[-1].city == "Bern"


report(stream=stream, structured=structured)
