"""openai-python's `responses` against `/v1/responses`: answers, typed events, functions, formats and errors."""

import json

import openai
import pytest
from pydantic import BaseModel

from tests.api.tiny import NAME

FUNCTION = {
    "type": "function",
    "name": "set_light",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(plain):
    return openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)


def test_a_response_is_the_chat_answer_in_another_shape(client):
    answer = client.responses.create(
        model=f"{NAME}:5L", input="hello", instructions="Be brief.", max_output_tokens=8, temperature=0,
        metadata={"who": "me"},
    )  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model=f"{NAME}:5L", messages=messages, max_tokens=8, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.model == f"{NAME}:5L" and answer.size["layers"] == 5 and answer.metadata == {"who": "me"}
    assert answer.usage.input_tokens == chat.usage.prompt_tokens and answer.usage.output_tokens == 8


def test_typed_events_add_up(client):
    arguments = {"model": NAME, "input": [{"role": "user", "content": "hello"}], "max_output_tokens": 10}
    whole = client.responses.create(**arguments, temperature=0)
    events = list(client.responses.create(**arguments, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    # The client's own accumulator is strict about order and indices.
    with client.responses.stream(**arguments, temperature=0) as stream:
        for _ in stream:
            pass


def test_logprobs_are_included_on_request(client):
    answer = client.responses.create(
        model=NAME, input="hello", max_output_tokens=3, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    logprobs = answer.output[0].content[0].logprobs
    assert len(logprobs) == 3 and len(logprobs[0].top_logprobs) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "set_light"}])
def test_functions_streamed_and_not(client, choice):
    arguments = {"model": NAME, "input": "hello", "tools": [FUNCTION], "tool_choice": choice, "temperature": 0}
    answer = client.responses.create(**arguments, max_output_tokens=80)
    call = answer.output[-1]
    assert answer.status == "completed" and call.type == "function_call" and call.name == "set_light"
    assert isinstance(json.loads(call.arguments)["on"], bool)
    events = list(client.responses.create(**arguments, max_output_tokens=80, stream=True))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    follow_up = client.responses.create(
        model=NAME, max_output_tokens=3, tools=[FUNCTION],
        input=[{"role": "user", "content": "hello"}, call.model_dump(exclude_none=True), result],
    )  # fmt: skip
    assert follow_up.usage.output_tokens > 0


def test_text_format(client):
    class Switch(BaseModel):
        on: bool

    answer = client.responses.parse(model=NAME, input="hello", text_format=Switch, temperature=0, max_output_tokens=80)
    assert isinstance(answer.output_parsed.on, bool)


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id"),
        ({"background": True}, openai.BadRequestError, "background"),
        ({"truncation": "auto"}, openai.BadRequestError, "truncation"),
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, openai.BadRequestError, "input.0"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools.0"),
        ({"extra_body": {"size": "99L"}}, openai.BadRequestError, "size"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs"),
    ],
)
def test_errors_name_the_parameter(client, changes, error, param):
    with pytest.raises(error) as caught:
        client.responses.create(**({"model": NAME, "input": "x", "max_output_tokens": 2} | changes))
    assert caught.value.body["param"] == param
