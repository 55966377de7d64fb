"""Ollama's own client against its routes: models by tag, answers, lines, options, tools, thinking, errors."""

import json

import httpx
import ollama
import pytest

from tests.api import templates
from tests.api.asking import MESSAGES, closed, post, tool
from tests.api.tiny import NAME, QUICK, RunningServer, make_pair

MODEL = f"{NAME}:5L"
GREEDY = {"temperature": 0, "num_predict": 6}
CALL = {"name": "weather", "parameters": {"city": "Köln", "days": 2}}


@pytest.fixture(scope="module")
def client(plain):
    return ollama.Client(plain.url)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A template whose calls are plain JSON, so that a schema can force one."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "template").write_text(templates.LLAMA3)
    flags = ("--chat-template", str(folder / "template"), *QUICK)
    with RunningServer(make_pair(folder, max_len=1024), *flags) as server:
        yield server


def openai(plain, path, **fields):
    body = {"model": MODEL, "max_tokens": 6, "temperature": 0, **fields}
    return post(plain.url, path, body)["choices"][0]


def test_tags_are_sizes(client):
    models = {model.model: model for model in client.list().models}
    assert list(models) == [f"{NAME}:latest", f"{NAME}:4L", f"{NAME}:5L", f"{NAME}:6L"]
    assert models[f"{NAME}:latest"].size > models[f"{NAME}:6L"].size > models[f"{NAME}:4L"].size > 0
    assert len({model.digest for model in models.values()}) == 4
    for name in (NAME, *models):
        shown = client.show(name)
        assert shown.details.family == "llama" and shown.modelinfo["llama.context_length"] == 256
        assert shown.modelinfo["llama.block_count"] == int(name[-2]) if name.endswith("L") else 6
        assert shown.capabilities == ["completion", "tools"] and "message" in shown.template
    (loaded,) = client.ps().models
    assert loaded.model == f"{NAME}:latest" and loaded.context_length == 256 and loaded.size_vram == 0


def test_chat_is_the_chat_answer_in_another_shape(plain, client):
    expected = openai(plain, "/v1/chat/completions", messages=MESSAGES)["message"]["content"]
    whole = client.chat(MODEL, MESSAGES, options=GREEDY)
    assert whole.message.content == expected and whole.message.role == "assistant" and whole.model == MODEL
    assert whole.done and whole.done_reason == "length" and whole.eval_count == 6 and whole.prompt_eval_count > 3
    assert 0 < whole.prompt_eval_duration + whole.eval_duration <= whole.total_duration < 60e9
    chunks = list(client.chat(MODEL, MESSAGES, options=GREEDY, stream=True))
    assert "".join(chunk.message.content for chunk in chunks) == expected
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 6 and chunks[-1].done_reason == "length"
    # Tokens that nobody took yet are sent together: on a busy machine even a long answer may come whole.
    long = GREEDY | {"num_predict": 200}
    assert any(len(list(client.chat(MODEL, MESSAGES, options=long, stream=True))) > 4 for _ in range(9))


def test_streaming_is_the_default_and_an_answer_says_its_size(plain):
    response = httpx.post(plain.url + "/api/chat", json={"model": f"{NAME}:latest", "messages": MESSAGES, "size": 4})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) > 1 and lines[-1]["done"] and lines[-1]["size"]["layers"] == 4
    assert {line["model"] for line in lines} == {f"{NAME}:4L"} and response.headers["x-boomerang-size"] == "4L"


def test_generate_takes_the_template_unless_raw(plain, client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = openai(plain, "/v1/chat/completions", messages=messages)["message"]["content"]
    assert client.generate(MODEL, "hi", system="be brief", options=GREEDY).response == expected
    expected = openai(plain, "/v1/completions", prompt="The quick")["text"]
    chunks = list(client.generate(MODEL, "The quick", raw=True, options=GREEDY, stream=True))
    assert "".join(chunk.response for chunk in chunks) == expected and chunks[-1].eval_count == 6
    assert (
        client.generate(MODEL, "The quick", raw=True, options=GREEDY | {"stop": [expected[2]]}).response
        == (expected.split(expected[2])[0])
    )


def test_no_text_asks_whether_the_model_is_there(client):
    assert client.generate(MODEL).done_reason == client.chat(MODEL, []).done_reason == "load"
    assert client.generate(MODEL, keep_alive=0).response == ""


def test_options_are_those_of_chat(plain, client):
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3, "num_predict": 9}
    options |= {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "num_ctx": 4096}
    fields = {name: value for name, value in options.items() if name[:3] not in ("num", "rep")}
    fields |= {"max_tokens": 9, "repetition_penalty": 1.3, "messages": MESSAGES}
    expected = openai(plain, "/v1/chat/completions", **fields)["message"]["content"]
    assert client.chat(MODEL, MESSAGES, options=options).message.content == expected
    # Without a limit, or with one of 0 or less, an answer may fill the context.
    for most in (0, -1, -2):
        answer = client.generate(MODEL, "hi", raw=True, options={"temperature": 0, "num_predict": most})
        assert answer.eval_count > 16 or answer.done_reason == "stop"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"mirostat": 2}, "options.mirostat"),
        ({"tfs_z": 0.5}, "options.tfs_z"),
        ({"typical_p": 0.5}, "options.typical_p"),
        ({"repeat_last_n": 64, "repeat_penalty": 1.1}, "options.repeat_last_n"),
        ({"penalize_newline": False}, "options.penalize_newline"),
        ({"num_predict": 1000}, "1000 more"),
        ({"temperature": -1}, "options.temperature"),
    ],
)
def test_options_that_would_change_the_answer_are_refused(client, options, named):
    with pytest.raises(ollama.ResponseError, match=named) as refused:
        client.chat(MODEL, MESSAGES, options=options)
    assert refused.value.status_code == 400
    harmless = {"mirostat": 0, "typical_p": 1.0, "tfs_z": 1.0, "repeat_last_n": 64, "num_gpu": 99, "num_thread": 4}
    assert client.chat(MODEL, MESSAGES, options=GREEDY | harmless).eval_count


def test_format(client):
    schema = closed(on={"type": "boolean"})
    text = client.chat(MODEL, MESSAGES, format=schema, options={"temperature": 0}).message.content
    assert isinstance(json.loads(text)["on"], bool)
    assert client.generate(MODEL, "x", raw=True, format={"const": 7}, options={"temperature": 0}).response == "7"
    begun = "".join(c.message.content for c in client.chat(MODEL, MESSAGES, format="json", options=GREEDY, stream=True))
    assert begun.startswith("{")
    with pytest.raises(ollama.ResponseError, match="format") as refused:
        client.chat(MODEL, MESSAGES, format={"not": {}})
    assert refused.value.status_code == 400


def test_logprobs(plain, client):
    content = openai(plain, "/v1/chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2)["logprobs"]
    whole = client.chat(MODEL, MESSAGES, logprobs=True, top_logprobs=2, options=GREEDY)
    assert [one.logprob for one in whole.logprobs] == [one["logprob"] for one in content["content"]]
    assert [[top.token for top in one.top_logprobs] for one in whole.logprobs] == [
        [top["token"] for top in one["top_logprobs"]] for one in content["content"]
    ]
    chunks = client.chat(MODEL, MESSAGES, logprobs=True, options=GREEDY, stream=True)
    assert sum(len(chunk.logprobs or ()) for chunk in chunks) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop(llama, stream):
    """The model is forced; what the client makes of the call and of its result is real."""
    client = ollama.Client(llama.url)

    def weather(city: str, days: int) -> str:
        """Of a city.

        Args:
          city: where
          days: how many
        """
        return f"{city}: rain for {days} days"

    messages = [{"role": "user", "content": "Weather?"}]
    for _ in range(2):
        fields = {"tools": [weather], "format": {"const": CALL}, "options": {"temperature": 0}}
        if stream:
            chunks = list(client.chat(MODEL, messages, stream=True, **fields))
            said = [chunk.message for chunk in chunks if chunk.message.tool_calls]
            assert len(said) == 1 and not any(chunk.message.content for chunk in chunks)
            message = said[0]
        else:
            message = client.chat(MODEL, messages, **fields).message
        (call,) = message.tool_calls
        assert call.function.name == "weather" and not message.content
        messages += [message, {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}]
    assert messages[-1]["content"] == "Köln: rain for 2 days"
    answer = client.chat(MODEL, messages, tools=[weather], options=GREEDY)
    assert answer.done_reason == "length"
    history = [message if isinstance(message, dict) else message.model_dump() for message in messages]
    bare = post(llama.url, "/api/chat", {"model": MODEL, "messages": history, "stream": False, "options": GREEDY})
    assert bare["prompt_eval_count"] < answer.prompt_eval_count  # tools are in the prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_cut_is_no_call(llama, stream):
    fields = {"model": MODEL, "messages": MESSAGES, "tools": [tool("weather")], "format": {"const": CALL}}
    raw = httpx.post(llama.url + "/api/chat", json=fields | {"stream": stream, "options": {"num_predict": 24}}).text
    lines = [json.loads(line) for line in raw.splitlines()]
    assert lines[-1]["done_reason"] == "length" and not any("tool_calls" in line["message"] for line in lines)


def test_numbers_of_a_history_stay_as_they_were_written(llama):
    """Counted against the same conversation in OpenAI's words, where arguments come as text."""
    for number in ("1e5", "1.10", "-0.0", "123456789012345678901"):
        call = f'{{"function": {{"name": "f", "arguments": {{"x": {number}}}}}}}'
        history = f'[{{"role": "user", "content": "hi"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'
        raw = f'{{"model": "{MODEL}", "messages": {history}, "stream": false, "options": {{"num_predict": 1}}}}'
        answer = httpx.post(llama.url + "/api/chat", content=raw)
        assert answer.status_code == 200, answer.text
        function = {"name": "f", "arguments": f'{{"x": {number}}}'}
        said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        assert (
            answer.json()["prompt_eval_count"] == post(llama.url, "/tokenize", {"messages": [*MESSAGES, said]})["count"]
        )


def test_thinking(pair, tmp_path):
    (tmp_path / "template").write_text(templates.OPENED)
    with RunningServer(pair, "--chat-template", str(tmp_path / "template"), *QUICK) as server:
        client = ollama.Client(server.url)
        whole = client.chat(MODEL, MESSAGES, think=True, options=GREEDY)
        assert whole.message.thinking and not whole.message.content
        chunks = list(client.generate(MODEL, "hi", think="high", options=GREEDY, stream=True))
        assert (
            "".join(chunk.thinking or "" for chunk in chunks) == client.generate(MODEL, "hi", options=GREEDY).thinking
        )
        assert "thinking" in client.show(MODEL).capabilities


@pytest.mark.parametrize(
    "path, fields, status, message",
    [
        ("chat", {"model": "nope", "messages": MESSAGES}, 404, "model 'nope' not found"),
        ("chat", {"model": f"{NAME}:9L", "messages": MESSAGES}, 404, f"model '{NAME}:9L' not found"),
        ("show", {"model": "nope"}, 404, "model 'nope' not found"),
        ("show", {}, 400, "model is required"),
        ("chat", {"messages": MESSAGES}, 400, "model: Field required"),
        ("chat", {"model": MODEL, "messages": MESSAGES, "think": True}, 400, "does not support thinking"),
        ("chat", {"model": MODEL, "messages": [MESSAGES[0] | {"images": ["aGk="]}]}, 400, "images"),
        ("generate", {"model": MODEL, "prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("generate", {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"model": MODEL, "prompt": "x", "template": "{{ .Prompt }}"}, 400, "template"),
        ("generate", {"model": MODEL, "prompt": "x", "context": [1]}, 400, "context"),
        ("generate", {"model": MODEL, "prompt": "x", "raw": True, "system": "y"}, 400, "raw mode"),
        ("generate", {"model": MODEL, "prompt": "hi " * 600}, 400, "the prompt has"),
        ("pull", {"model": MODEL}, 404, "Not Found"),
    ],
)
def test_errors_are_in_its_form(plain, path, fields, status, message):
    response = httpx.post(plain.url + f"/api/{path}", json=fields)
    assert response.status_code == status and list(response.json()) == ["error"], response.text
    assert message in response.json()["error"]


def test_keys_as_its_client_sends_them(pair):
    with RunningServer(pair, "--api-key", "secret", "--echo-requested-model", *QUICK) as server:
        with pytest.raises(ollama.ResponseError, match="API key") as refused:
            ollama.Client(server.url).list()
        assert refused.value.status_code == 401
        client = ollama.Client(server.url, headers={"authorization": "Bearer secret"})
        assert client.list().models and client.chat(NAME, MESSAGES, options=GREEDY).model == NAME
        assert httpx.head(server.url + "/api/tags", headers={"authorization": "Bearer secret"}).status_code == 200
