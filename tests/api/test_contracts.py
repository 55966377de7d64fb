"""Schemas, counters, streams and HTTP manners: what clients of other servers take for granted."""

import gzip
import json
import shutil

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api import asking, templates
from tests.api.asking import closed, events, post
from tests.api.tiny import QUICK, RunningServer, make_pair, noted


def completion(url, status=200, **fields):
    return post(url, "/v1/completions", {"prompt": "x", "max_tokens": 40, "temperature": 0, **fields}, status)


# --- schemas


@pytest.mark.parametrize("low, high", [(2**53 + 1, 2**53 + 1), (2**63 - 5, 2**63 - 3), (2**64, 2**64 + 5)])
def test_bounds_that_cannot_be_kept_exactly_are_refused(plain, low, high):
    schema = {"type": "integer", "minimum": low, "maximum": high}
    for fields in (
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": closed(a=schema)}}},
        {"structured_outputs": {"json": {"const": low}}} if low != 2**64 else {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": {"anyOf": [{"enum": [{"a": [2**53 + 1]}]}]}}},
    ):
        assert "exactly" in completion(plain.url, 400, **fields)["error"]["message"]


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"minimum": 0, "maximum": 2**64 - 1},
        {"minimum": 2**53 + 1},
        {"exclusiveMinimum": 2**53, "exclusiveMaximum": 2**60},
    ],
)
def test_large_integers_lie_within_their_bounds(plain, bounds):
    for seed in range(6):
        form = {"structured_outputs": {"json": {"type": "integer", **bounds}}, "temperature": 2, "seed": seed}
        choice = completion(plain.url, **form)["choices"][0]
        if choice["finish_reason"] == "stop":
            value = int(choice["text"])
            assert bounds.get("minimum", value) <= value <= bounds.get("maximum", value)
            assert bounds.get("exclusiveMinimum", value - 1) < value < bounds.get("exclusiveMaximum", value + 1)


@pytest.mark.parametrize("schema", [r'{"const": "\ud800"}', r'{"enum": [{"\udfff": 1}]}', '{"const": NaN}', "{"])
def test_a_schema_as_text_must_be_json_that_text_can_hold(plain, schema):
    error = completion(plain.url, 400, structured_outputs={"json": schema})["error"]
    assert error["param"] == "structured_outputs.json" and "not valid JSON" in error["message"]


def test_a_prompt_that_is_too_long_is_called_what_the_route_calls_it(plain):
    for long in ("hi " * 600, "hi " * 100_000):  # the second is not even tokenised
        for path, body, param in (
            ("/v1/completions", {"prompt": long}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
            ("/v1/responses", {"input": long}, "input"),
        ):
            error = post(plain.url, path, body, 400)["error"]
            assert error["code"] == "context_length_exceeded" and error["param"] == param, error


def test_a_schema_that_cannot_be_kept_is_called_what_the_route_calls_it(plain):
    hello, form = {"messages": [{"role": "user", "content": "hi"}]}, {"type": "json_schema"}
    for schema in ({"const": 2**53 + 1}, {"not": {}}):
        for path, body, param in (
            ("/v1/chat/completions", hello | {"response_format": form | {"json_schema": {"schema": schema}}},
             "response_format"),
            ("/v1/responses", {"input": "hi", "text": {"format": form | {"schema": schema}}}, "text.format"),
            ("/v1/messages", hello | {"max_tokens": 2, "output_config": {"format": form | {"schema": schema}}},
             "output_config.format"),
        ):  # fmt: skip
            error = post(plain.url, path, body, 400)["error"]
            assert error["message"].startswith(param) and error.get("param", param).startswith(param)


def test_boolean_schemas_and_json_objects_with_a_schema(plain):
    wanted = closed(a={"const": 5})
    for form in (
        {"response_format": {"type": "json_object", "schema": wanted}},
        {"response_format": {"type": "json_schema", "schema": wanted}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}},
    ):
        assert json.loads(completion(plain.url, **form)["choices"][0]["text"]) == {"a": 5}
    text = {"format": {"type": "json_object", "schema": wanted}}
    got = asking.responses(plain.url, {"text": text, "max_output_tokens": 40})
    assert json.loads(got.content) == {"a": 5}
    for form in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
        {"structured_outputs": {"json": True}},
    ):
        completion(plain.url, **form)
    for form, param in (
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"response_format": {"type": "regex", "regex": "a", "schema": wanted}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "scheme": wanted}}, "response_format.scheme"),
        ({"response_format": {"type": "text", "schema": wanted}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": wanted}}},
            "response_format.json_schema",
        ),
    ):
        assert completion(plain.url, 400, **form)["error"]["param"] == param


# --- counters


def metric(url, name, **labels):
    total = 0.0
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


@pytest.fixture(scope="module")
def counting(pair):
    with RunningServer(pair, *QUICK) as server:
        yield server.url


def test_prompt_tokens_are_the_sum_of_their_sources(counting):
    prompt = list(range(3, 103))
    for _ in range(2):
        completion(counting, prompt=prompt, max_tokens=3)
    completion(counting, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
    total = metric(counting, "vllm:prompt_tokens_total")
    assert total == metric(counting, "vllm:prompt_tokens_by_source_total") == 300
    assert metric(counting, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") >= 96


def test_n_choices_are_one_request_for_the_longest(counting):
    before = metric(counting, "vllm:request_max_num_generation_tokens_count")
    completion(counting, n=4, max_tokens=5, ignore_eos=True, temperature=1)
    assert metric(counting, "vllm:request_max_num_generation_tokens_count") == before + 1
    assert metric(counting, "vllm:request_max_num_generation_tokens_sum") >= 5


def test_tokens_and_first_tokens_belong_to_the_size_that_made_them(counting):
    def counts():
        names = ("boomerang:generation_tokens_total", "boomerang:time_to_first_token_seconds_count")
        return {(name, size): metric(counting, name, size=size) for name in names for size in ("4", "5", "6")}

    before, prompts = counts(), metric(counting, "vllm:prompt_tokens_total")
    legs = [{"size": "4L", "tokens": 3}, {"size": "5L", "tokens": 3}, {"size": "6L"}]
    completion(counting, size_schedule=legs, max_tokens=9, ignore_eos=True, prompt="The quick brown fox")
    got = {key: value - before[key] for key, value in counts().items()}
    assert [got["boomerang:generation_tokens_total", size] for size in "456"] == [3, 3, 3]
    assert [got["boomerang:time_to_first_token_seconds_count", size] for size in "456"] == [1, 0, 0]
    asked = len(post(counting, "/tokenize", {"prompt": "The quick brown fox"})["tokens"])
    assert metric(counting, "vllm:prompt_tokens_total") == prompts + asked


def test_cached_tokens_add_up_over_prompts(plain):
    body = {"prompt": [list(range(7, 107)), list(range(9, 209))], "max_tokens": 1}
    post(plain.url, "/v1/completions", body)
    usage = post(plain.url, "/v1/completions", body)["usage"]
    assert usage["prompt_tokens"] == 300 and usage["prompt_tokens_details"]["cached_tokens"] == 96 + 192


def test_prompt_logprobs_are_as_many_as_were_asked_for(plain):
    body = {"prompt": "The capital of France is", "max_tokens": 1, "echo": True, "logprobs": 5, "prompt_logprobs": 0}
    choice = post(plain.url, "/v1/completions", body)["choices"][0]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [1] * (len(choice["prompt_logprobs"]) - 1)
    assert max(len(entry) for entry in choice["logprobs"]["top_logprobs"][1:]) >= 5
    assert completion(plain.url, max_tokens=1, prompt_logprobs=0)["choices"][0]["prompt_logprobs"] == [None]


# --- streams

LEGS = {"size_schedule": [{"size": "4L", "tokens": 2}, {"size": "6L"}]}


def test_streams_show_a_change_of_size_on_every_route(plain):
    changes = [
        {"layers": 4, "precision": "exact", "after_tokens": 0},
        {"layers": 6, "precision": "exact", "after_tokens": 2},
    ]
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": asking.MESSAGES}),
    ):
        body |= LEGS | {"max_tokens": 6, "ignore_eos": True, "stream_options": {"include_usage": True}}
        chunks = events(plain.url, path, body)
        before = [chunk for chunk in chunks if "changes" not in chunk["size"]]  # outputs that nobody took are merged
        assert before == chunks[: len(before)] and all(chunk["model"] == "tiny:4L" for chunk in before)
        assert chunks[-1]["model"] == "tiny:6L" and chunks[-1]["size"]["changes"] == changes
        assert len(before) <= 3
        assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["usage"]["completion_tokens"] == 6
    long = LEGS | {"temperature": 0}
    last = events(plain.url, "/v1/responses", {"input": "x", "max_output_tokens": 9} | long)
    assert last[-1]["response"]["size"].get("changes", changes) == changes
    message = events(plain.url, "/v1/messages", {"messages": asking.MESSAGES, "max_tokens": 9} | long)
    delta = next(event for event in message if event["type"] == "message_delta")
    if delta["usage"]["output_tokens"] > 3:
        assert delta["model"] == "tiny:6L" and delta["size"]["changes"] == changes


# --- manners


def test_wrong_methods_say_which_are_right(plain):
    for path, method, allowed in (
        ("/v1/completions", "GET", {"POST"}),
        ("/v1/models", "DELETE", {"GET", "HEAD"}),
        ("/health", "PUT", {"GET", "HEAD"}),
    ):
        response = httpx.request(method, plain.url + path)
        assert response.status_code == 405 and set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/v1/models/tiny:4L", "/version", "/metrics", "/load", "/", "/docs"]
)
def test_head_is_answered_where_get_is(plain, path):
    response = httpx.head(plain.url + path)
    assert response.status_code == 200 and not response.content


def test_a_trailing_slash_is_not_sent_elsewhere(plain):
    for path in ("/v1/completions/", "/v1/models/", "/health/"):
        assert httpx.post(plain.url + path, json={}).status_code in (404, 405)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"]
)
def test_compressed_bodies_are_refused_by_name(plain, path):
    body = gzip.compress(json.dumps({"prompt": "x"}).encode())
    response = httpx.post(plain.url + path, content=body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and response.headers["accept-encoding"] == "identity"
    assert "gzip" in response.json()["error"]["message"]


def test_no_error_counts_below_nothing(plain):
    long = "hi " * 400
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": long, "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/responses", {"input": long}),
        ("/v1/messages", {"messages": [{"role": "user", "content": long}], "max_tokens": 5}),
    ):
        message = post(plain.url, path, body, 400)["error"]["message"]
        assert "-" not in message and "256" in message


def test_failed_tools_are_reported_to_the_model(plain):
    def prompt(**fields):
        block = {"type": "tool_result", "tool_use_id": "t", "content": "no such city", **fields}
        call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
        turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [block]}]
        return post(plain.url, "/v1/messages/count_tokens", {"messages": [*asking.MESSAGES, *turns]})["input_tokens"]

    assert prompt(is_error=True) > prompt()


def test_an_empty_message_is_one_empty_block_whole_and_streamed(plain):
    for stream in (False, True):
        body = {"messages": asking.MESSAGES, "max_tokens": 9, "stop_sequences": ["{"], "output_config": {
            "format": {"type": "json_schema", "schema": {"type": "object"}}}}  # fmt: skip
        got = asking.messages(plain.url, body, stream)
        assert got.content == "" and got.finish == "stop_sequence"


# --- loops, defaults, names


def test_an_answer_in_a_loop_ends_with_repetition(plain):
    loop = {"allowed_token_ids": [20], "max_tokens": 100, "ignore_eos": True}
    limit = {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 5}
    choice = completion(plain.url, **loop, repetition_detection=limit)["choices"][0]
    assert choice["finish_reason"] == "repetition"
    body = {"messages": asking.MESSAGES, **loop, "repetition_detection": limit}
    chunks = events(plain.url, "/v1/chat/completions", body)
    assert chunks[-1]["choices"][0]["finish_reason"] == "repetition"
    assert completion(plain.url, **loop)["usage"]["completion_tokens"] == 100
    wrong = {"max_pattern_size": 4, "min_pattern_size": 5}
    assert completion(plain.url, 400, repetition_detection=wrong)["error"]["param"].startswith("repetition_detection")


@pytest.fixture(scope="module")
def configured(pair, tmp_path_factory):
    """A pair whose makers say how it is to be sampled; names are echoed."""
    teacher = tmp_path_factory.mktemp("configured") / "tiny"
    shutil.copytree(pair[0], teacher)
    config = {
        "temperature": 1e-9, "top_k": 5, "repetition_penalty": 1.2, "max_new_tokens": 7, "eos_token_id": 2,
        "repetition_detection": {"min_pattern_size": 1, "max_pattern_size": 4, "min_count": 4},
    }  # fmt: skip
    (teacher / "generation_config.json").write_text(json.dumps(config))
    return noted(teacher, pair[1])


def test_sampling_defaults_are_those_of_the_makers(configured, plain):
    body = {"messages": asking.MESSAGES, "ignore_eos": True}
    with RunningServer(configured, "--echo-requested-model", "--served-model-name", "tiny", "other", *QUICK) as server:
        first, again = (post(server.url, "/v1/chat/completions", body) for _ in range(2))
        greedy = body | {"temperature": 0, "repetition_penalty": 1.2, "max_tokens": 7}
        assert first["choices"][0]["message"] == again["choices"][0]["message"]
        assert first["choices"] == post(plain.url, "/v1/chat/completions", greedy)["choices"]
        assert first["usage"]["completion_tokens"] == 7 and first["choices"][0]["finish_reason"] == "length"
        hot = [post(server.url, "/v1/chat/completions", body | {"temperature": 2})["choices"][0] for _ in range(2)]
        assert hot[0]["message"] != hot[1]["message"]
        for name in ("other", "tiny", "tiny:4L"):
            answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1, "model": name})
            assert answer.json()["model"] == name and answer.headers["x-boomerang-size"].endswith("L")
    flags = (
        "--override-generation-config",
        '{"top_p": 0.5}',
        "--default-max-tokens",
        "9",
        "--generation-config",
        "none",
    )
    with RunningServer(configured, *flags, *QUICK) as server:
        assert post(server.url, "/v1/chat/completions", body)["usage"]["completion_tokens"] == 9
        assert any("sampling defaults: top_p 0.5, max_new_tokens 9" in line for line in server.log)


# --- tools for a model whose template knows none

F = asking.tool("light", closed(on={"type": "boolean"}))


@pytest.fixture(scope="module")
def toolless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toolless")
    (folder / "template").write_text(templates.NO_TOOLS)
    pair = make_pair(folder, max_len=1024)
    flags = ("--chat-template", str(folder / "template"), *QUICK)
    with RunningServer(pair, *flags) as server:
        yield server
    with RunningServer(pair, *flags, "--tool-template", "none") as strict:
        body = {"messages": asking.MESSAGES, "tools": [F]}
        assert post(strict.url, "/v1/chat/completions", body, 400)["error"]["param"] == "tools"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_described_where_the_template_knows_none(toolless, stream):
    url = toolless.url
    call = {"id": "c", "type": "function", "function": {"name": "light", "arguments": '{"on":true}'}}
    history = [
        {"role": "system", "content": "Be brief."},
        *asking.MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
        {"role": "tool", "tool_call_id": "d", "content": "also"},
    ]
    ids = post(url, "/tokenize", {"messages": history, "tools": [F]})["tokens"]
    prompt = post(url, "/detokenize", {"tokens": ids})["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and '"name": "light"' in prompt
    assert '<tool_call>\n{"name": "light", "arguments": {"on":true}}\n</tool_call><|im_end|>' in prompt
    assert "user\n<tool_response>\ndone\n</tool_response>\n<tool_response>\nalso\n</tool_response>" in prompt
    for choice in ("required", {"type": "function", "function": {"name": "light"}}):
        got = asking.chat(url, {"messages": history, "tools": [F], "tool_choice": choice, "size": "4L"}, stream)
        assert got.finish == "tool_calls" and json.loads(got.calls[0][1])["on"] in (True, False)
    got = asking.chat(url, {"tools": [F], "max_tokens": 5}, stream)  # auto: free text that may open a call
    assert got.finish == "length" and not got.calls
    assert sum("knows no tools" in line for line in toolless.log) == 1


def test_a_call_that_auto_opens_follows_the_schema(toolless):
    """A bias makes the model open a call; from there on a grammar holds it to the schema."""
    ids = post(toolless.url, "/tokenize", {"prompt": "<tool_call>", "add_special_tokens": False})["tokens"]
    got = asking.chat(toolless.url, {"tools": [F], "logit_bias": {str(ids[0]): 30}, "max_tokens": 120})
    text = got.content or ""
    assert got.calls or "<tool_call>\n" in text or not text.startswith("<tool_call>")
    for _, arguments in got.calls:
        assert json.loads(arguments)["on"] in (True, False)
