"""More of openai-python: its helpers, asynchronous and raw calls, its classes of errors, and retries."""

import asyncio
import contextlib

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.api.tiny import NAME, QUICK, RunningServer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(pair):
    flags = ["--api-key", "one", "two", "--max-requests-per-minute-per-key", "60"]
    with RunningServer(pair, *flags, *QUICK) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="one", max_retries=0)


def test_stream_helper_and_parsed_answers(client):
    # The helper takes an answer that ends for its length for an error, so this one ends by itself.
    form = {"structured_outputs": {"choice": ["to the left", "to the right"]}}
    arguments = {"model": NAME, "messages": HELLO, "max_tokens": 40, "temperature": 0, "extra_body": form}
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.stream(**arguments) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == whole.choices[0].message.content

    class Light(BaseModel):
        on: bool

    parsed = client.chat.completions.parse(
        model=NAME, messages=HELLO, max_tokens=150, temperature=0, response_format=Light
    )
    assert isinstance(parsed.choices[0].message.parsed.on, bool)


def test_asynchronous_client_runs_requests_side_by_side(server):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="one", max_retries=0) as client:
            arguments = {"model": NAME, "prompt": "The quick", "max_tokens": 8, "temperature": 0}
            stream = await client.completions.create(**arguments, stream=True)
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
            answers = await asyncio.gather(*(client.completions.create(**arguments) for _ in range(8)))
            return [streamed, *(answer.choices[0].text for answer in answers)]

    assert len(set(asyncio.run(run()))) == 1


def test_raw_and_streaming_responses(client):
    raw = client.completions.with_raw_response.create(
        model=NAME, prompt="x", max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse().id == "cmpl-mine"
    assert raw.parse()._request_id == "mine"
    with client.completions.with_streaming_response.create(model=NAME, prompt="x", max_tokens=2) as response:
        assert response.headers["x-boomerang-size"] == "6L" and response.json()["choices"]


def test_leaving_a_stream_early_frees_it(client):
    arguments = {"prompt": "x", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model=NAME, stream=True, **arguments)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model=NAME, prompt="x", max_tokens=1).usage.completion_tokens == 1


def test_shapes_of_token_ids_and_prompt_logprobs(client):
    extra = {"return_token_ids": True, "prompt_logprobs": 1, "return_tokens_as_token_ids": True, "request_id": "mine"}
    answer = client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=3, logprobs=1, extra_body=extra)
    choice = answer.choices[0]
    assert answer.id == "cmpl-mine" and choice.prompt_token_ids == [5, 6, 7] and len(choice.token_ids) == 3
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    assert choice.prompt_logprobs[0] is None
    assert set(choice.prompt_logprobs[1]["6"]) == {"logprob", "rank", "decoded_token"}
    chat = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=3, extra_body=extra)
    assert len(chat.choices[0].token_ids) == 3 and len(chat.prompt_logprobs) == len(chat.prompt_token_ids)


def test_continued_and_echoed_messages(client):
    messages = [*HELLO, {"role": "assistant", "content": "The quick"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    arguments = {"model": NAME, "messages": messages, "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(**arguments, extra_body=extra)
    echoed = client.chat.completions.create(**arguments, extra_body=extra | {"echo": True})
    assert echoed.choices[0].message.content == "The quick" + plain.choices[0].message.content
    chunks = client.chat.completions.create(**arguments, extra_body=extra | {"echo": True}, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == echoed.choices[0].message.content


def test_masks_hold(server, client):
    arguments = {"model": NAME, "prompt": "The", "max_tokens": 30, "temperature": 1.5, "seed": 1}
    headers = {"authorization": "Bearer one"}
    body = httpx.post(server.url + "/tokenize", json={"prompt": "foxq"}, headers=headers).json()
    only = {"allowed_token_ids": body["tokens"], "return_token_ids": True}
    free = client.completions.create(**arguments, extra_body=only).choices[0]
    assert set(free.token_ids) <= set(body["tokens"])
    # Nothing but the pieces of a word, and still not the word.
    assert "fox" not in client.completions.create(**arguments, extra_body=only | {"bad_words": ["fox"]}).choices[0].text


def test_truncation(client):
    extra = {"return_token_ids": True, "truncate_prompt_tokens": 3}
    for side, kept in ((None, [7, 8, 9]), ("left", [7, 8, 9]), ("right", [5, 6, 7])):
        body = extra | ({"truncation_side": side} if side else {})
        answer = client.completions.create(model=NAME, prompt=[5, 6, 7, 8, 9], max_tokens=1, extra_body=body)
        assert answer.choices[0].prompt_token_ids == kept


def test_error_classes(server, client):
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key" and caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model=NAME, prompt="x")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(f"{NAME}:99L")
    assert caught.value.code in ("model_not_found", "404", 404)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=[[10**6]])
    assert caught.value.param == "prompt" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="x", stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_a_rate_limited_key_gets_429_with_a_time_to_wait(server):
    limited = openai.OpenAI(base_url=server.url + "/v1", api_key="two", max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(70):
            with contextlib.suppress(openai.BadRequestError):
                limited.completions.create(model=NAME, prompt="x", max_tokens=-1)
    assert caught.value.code == "rate_limit_exceeded" and int(caught.value.response.headers["retry-after"]) >= 1
