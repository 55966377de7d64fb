# /// script
# dependencies = ["ollama"]
# ///
"""ollama-python: the official client of Ollama's API."""

import json

import ollama
from common import CALL, MODEL, QUESTION, URL, report

client = ollama.Client(URL)
SHORT = {"temperature": 0, "num_predict": 6}
MESSAGES = [{"role": "user", "content": QUESTION}]


def text():
    return bool(client.chat(MODEL, MESSAGES, options=SHORT).message.content)


def stream():
    return bool("".join(part.message.content for part in client.chat(MODEL, MESSAGES, options=SHORT, stream=True)))


def structured():
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return json.loads(client.chat(MODEL, MESSAGES, format=schema).message.content) == {"city": "Bern"}


def tools():
    def weather(city: str) -> str:
        """Of a city.

        Args:
          city: where
        """
        return f"{city}: rain"

    message = client.chat(MODEL, MESSAGES, tools=[weather], format={"const": CALL}).message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_name": call.function.name, "content": weather(**call.function.arguments)}
    answer = client.chat(MODEL, [*MESSAGES, message, result], tools=[weather], options=SHORT)
    return result["content"] == "Bern: rain" and bool(answer.message.content)


def embeddings():
    return len(client.embed(MODEL, ["hi", "ho"]).embeddings[1]) == 64


report(text=text, stream=stream, structured=structured, tools=tools, embeddings=embeddings)
