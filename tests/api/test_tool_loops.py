"""Agents' tool loops end to end with the clients' own helpers: the model is forced, the loop is real."""

import json
from typing import Literal

import anthropic
import httpx
import openai
import pytest

from tests.api import templates
from tests.api.asking import MESSAGES, closed, post
from tests.api.tiny import NAME, QUICK, RunningServer, make_pair
from tests.clients import javascript

DONE = {"structured_outputs": {"choice": ["done"]}}
WEATHER = closed(city={"enum": ["Bern", "Köln"]})


@pytest.fixture(scope="module", params=["hermes", "llama3", "mistral", "none"])
def server(request, tmp_path_factory):
    """A template in each form, and one that knows no tools."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "template").write_text(templates.FORMS.get(request.param, templates.NO_TOOLS))
    flags = ("--chat-template", str(folder / "template"), *QUICK)
    with RunningServer(make_pair(folder, max_len=1024), *flags) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_openai_loop(server, stream):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    tool = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}}
    messages = [{"role": "user", "content": "Weather?"}]
    for turn in range(3):
        choice = "required" if turn < 2 else "none"
        arguments = {"model": NAME, "messages": messages, "tools": [tool], "tool_choice": choice, "temperature": 0}
        arguments |= {"max_tokens": 250} | ({"extra_body": DONE} if turn == 2 else {})
        if stream:
            with client.chat.completions.stream(**arguments) as events:
                for _ in events:
                    pass
                answer = events.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**arguments).choices[0]
        if turn == 2:
            break
        assert answer.finish_reason == "tool_calls"
        messages.append(answer.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
        for call in answer.message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{city}: rain"})
    assert answer.message.content is not None and not answer.message.tool_calls and len(messages) == 5


def test_openai_responses_loop(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    tool = {"type": "function", "name": "weather", "parameters": WEATHER}
    items = [{"role": "user", "content": "Weather?"}]
    for choice in ("required", "required", "none"):
        with client.responses.stream(
            model=NAME,
            input=items,
            tools=[tool],
            tool_choice=choice,
            temperature=0,
            max_output_tokens=250,
            extra_body=DONE if choice == "none" else None,
        ) as events:
            for _ in events:
                pass
            answer = events.get_final_response()
        for call in [item for item in answer.output if item.type == "function_call"]:
            items.append(call.model_dump(exclude_none=True, include={"type", "call_id", "name", "arguments"}))
            output = f"{json.loads(call.arguments)['city']}: rain"
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    assert len(items) == 5 and answer.output[-1].type == "message"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_loop(server, stream):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    arguments = {"model": NAME, "max_tokens": 250, "extra_body": {"temperature": 0}}
    arguments["tools"] = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
    messages = [{"role": "user", "content": "Weather?"}]
    for _ in range(2):
        fields = arguments | {"messages": messages, "tool_choice": {"type": "any"}}
        if stream:
            with client.messages.stream(**fields) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**fields)
        call = message.content[-1]
        assert call.type == "tool_use" and call.input["city"] in ("Bern", "Köln") and message.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": f"{call.input['city']}: rain"}
        messages += [{"role": "assistant", "content": [call.model_dump()]}, {"role": "user", "content": [result]}]
    assert client.messages.create(**arguments | {"messages": messages, "max_tokens": 4}).usage.output_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_tool_runner(server, stream):
    """It would have the server keep the conversation, and sends it whole once it is told that this one does not."""
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    cities = []

    @anthropic.beta_tool
    def weather(city: Literal["Bern", "Köln"]) -> str:
        """Of a city."""
        cities.append(city)
        return "rain"

    shared = {
        "model": NAME,
        "max_tokens": 250,
        "tools": [weather],
        "messages": [{"role": "user", "content": "Weather?"}],
    }
    runner = client.beta.messages.tool_runner(
        **shared, tool_choice={"type": "any"}, max_iterations=2, stream=stream, extra_body={"temperature": 0}
    )
    turns = [turn.get_final_message() if stream else turn for turn in runner]
    assert [turn.stop_reason for turn in turns] == ["tool_use"] * 2
    assert cities and set(cities) <= {"Bern", "Köln"}
    with pytest.raises(anthropic.BadRequestError, match="nothing is stored"):
        client.messages.create(**shared | {"tools": []}, extra_body={"thread": {"type": "create"}})


@pytest.mark.parametrize("number", ["1e5", "1.10", "-0.0", "123456789012345678901", "2"])
def test_numbers_in_anthropics_history_are_what_they_were(server, number):
    """Counted against the same conversation in OpenAI's words, where arguments come as text."""
    given = f'{{"x": {number}}}'
    block = f'{{"type": "tool_use", "id": "c", "name": "f", "input": {given}}}'
    raw = f'{{"messages": [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": [{block}]}}]}}'
    answer = httpx.post(server.url + "/v1/messages/count_tokens", content=raw)
    assert answer.status_code == 200, answer.text
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": given}}
    history = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = post(server.url, "/tokenize", {"messages": history})["tokens"]
    assert given in post(server.url, "/detokenize", {"tokens": ids})["prompt"] and answer.json()["input_tokens"] == len(
        ids
    )


AI_SDK = """
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText, tool, stepCountIs, jsonSchema } from 'ai';
const model = createOpenAICompatible({ name: 'boomerang', baseURL: process.argv[2] + '/v1' })('tiny');
const schema = jsonSchema({ type: 'object', properties: { city: { enum: ['Bern'] } }, required: ['city'],
  additionalProperties: false });
const cities = [];
const tools = { weather: tool({ description: 'of a city', inputSchema: schema,
  execute: async ({ city }) => { cities.push(city); return 'rain'; } }) };
const shared = { model, tools, prompt: 'Weather?', toolChoice: 'required', maxOutputTokens: 250, temperature: 0,
  stopWhen: stepCountIs(2), maxRetries: 0 };
const whole = await generateText(shared);
const streamed = streamText(shared);
await streamed.consumeStream();
console.log(JSON.stringify({ cities, steps: [whole.steps.length, (await streamed.steps).length],
  reasons: [whole.finishReason, await streamed.finishReason] }));
"""


@javascript.needs_npm
def test_vercels_ai_sdk_loop(server, tmp_path):
    done = javascript.run(AI_SDK, ["ai@7", "@ai-sdk/openai-compatible@3"], server.url, tmp_path)
    assert done.returncode == 0, done.stderr
    # A choice is forced in the first step only: the second answers.
    got = json.loads(done.stdout)
    assert got["cities"] == ["Bern"] * 2 and got["steps"] == [2, 2]
    assert set(got["reasons"]) <= {"stop", "length"}
