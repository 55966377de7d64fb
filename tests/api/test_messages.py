"""Anthropic's own client against `/v1/messages`: answers, streams, tools, token counts and errors."""

import json

import anthropic
import httpx
import pytest

from tests.api.tiny import NAME, QUICK, RunningServer

# The newest clients have no argument for it; the API still knows it.
GREEDY = {"extra_body": {"temperature": 0}}
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "light",
    "input_schema": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
}
TOOL["input_schema"]["additionalProperties"] = False


@pytest.fixture(scope="module")
def client(plain):
    return anthropic.Anthropic(base_url=plain.url, api_key="none", max_retries=0)


def greedy(server, messages, **fields) -> str:
    body = {"model": f"{NAME}:5L", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(server.url + "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_a_message_is_the_chat_answer_in_another_shape(plain, client):
    answer = client.messages.create(model=f"{NAME}:5L", max_tokens=8, messages=HELLO, **GREEDY)
    assert answer.role == "assistant" and answer.type == "message" and answer.id.startswith("msg_")
    assert answer.model == f"{NAME}:5L" and answer.size["layers"] == 5
    assert answer.content[0].text == greedy(plain, HELLO)
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 8


def test_system_blocks_and_prefill(plain, client):
    blocks = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(
        model=f"{NAME}:5L", max_tokens=8, system="Be brief.",
        messages=[{"role": "user", "content": blocks}, {"role": "assistant", "content": "The quick"}],
        extra_body={"min_size": "4L", "temperature": 0},
    )  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "The quick"},
    ]
    assert answer.content[0].text == greedy(plain, messages, continue_final_message=True, add_generation_prompt=False)


def test_streamed_events_add_up_to_the_message(client):
    arguments = {"model": NAME, "max_tokens": 12, "messages": HELLO, **GREEDY}
    whole = client.messages.create(**arguments)
    with client.messages.stream(**arguments) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "content_block_delta" in kinds
    assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens == 12
    counted = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_stop_sequences(client):
    free = client.messages.create(model=NAME, max_tokens=12, messages=HELLO, **GREEDY).content[0].text
    stop = free[4:6]
    cut = client.messages.create(model=NAME, max_tokens=12, messages=HELLO, **GREEDY, stop_sequences=[stop])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == stop
    assert cut.content[0].text == free[: free.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "light"}])
def test_forced_tools_streamed_and_not(client, choice):
    arguments = {"model": NAME, "max_tokens": 80, "messages": HELLO, "tools": [TOOL], "tool_choice": choice}
    answer = client.messages.create(**arguments, **GREEDY)
    call = answer.content[-1]
    assert answer.stop_reason == "tool_use" and call.type == "tool_use" and call.name == "light"
    assert isinstance(call.input["on"], bool)
    with client.messages.stream(**arguments, **GREEDY) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == call.input and final.stop_reason == "tool_use"
    # The call and its result go back into the conversation.
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "done"}]}
    messages = [
        *HELLO,
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "thanks"}]},
    ]
    assert client.messages.create(model=NAME, max_tokens=4, messages=messages, tools=[TOOL]).usage.output_tokens > 0


def test_schema_of_the_text(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = client.messages.create(
        model=NAME, max_tokens=60, messages=HELLO, **GREEDY,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    assert json.loads(answer.content[0].text)["a"] in (1, 2)


def test_count_tokens_is_what_the_answer_reports(client):
    counted = client.messages.count_tokens(model=NAME, messages=HELLO, system="Be brief.")
    answer = client.messages.create(model=NAME, messages=HELLO, system="Be brief.", max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"model": "nope"}, anthropic.NotFoundError, "nope"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"extra_body": {"size": "99L"}}, anthropic.BadRequestError, "size"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError, "image"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, anthropic.BadRequestError, "web_search"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_shape(client, changes, error, word):
    with pytest.raises(error) as caught:
        client.messages.create(**({"model": NAME, "max_tokens": 4, "messages": HELLO} | changes))
    assert caught.value.body["type"] == "error" and word in caught.value.body["error"]["message"]


def test_keys_come_in_anthropics_header(pair):
    with RunningServer(pair, "--api-key", "one", *QUICK) as server:
        arguments = {"model": NAME, "max_tokens": 1, "messages": HELLO}
        assert anthropic.Anthropic(base_url=server.url, api_key="one").messages.create(**arguments).content
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=server.url, api_key="two").messages.create(**arguments)


def test_models_in_its_form(plain, client):
    pages = client.models.list(limit=3)
    listed = list(pages)  # goes on to the next page by itself
    assert [model.id for model in listed] == [NAME, f"{NAME}:4L", f"{NAME}:5L", f"{NAME}:6L"]
    assert pages.has_more and (pages.first_id, pages.last_id) == (NAME, f"{NAME}:5L")
    assert not client.models.list().has_more
    before = client.models.list(before_id=f"{NAME}:6L", limit=2)
    assert [model.id for model in before.data] == [f"{NAME}:4L", f"{NAME}:5L"] and before.has_more
    one = client.models.retrieve(f"{NAME}:5L")
    assert one == listed[2] and one.type == "model" and one.lifecycle == "active" and one.max_input_tokens == 256
    with pytest.raises(anthropic.NotFoundError) as error:
        client.models.retrieve("nope")
    assert error.value.body["type"] == "error" and error.value.body["error"]["type"] == "not_found_error"
    for query in ({"limit": 0}, {"limit": "x"}, {"after_id": "nope"}, {"after_id": NAME, "before_id": NAME}):
        with pytest.raises(anthropic.BadRequestError):
            client.models.list(extra_query=query)
    assert httpx.get(plain.url + "/v1/models").json()["object"] == "list"
    assert httpx.head(plain.url + "/v1/models").status_code == 200
