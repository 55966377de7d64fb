"""What a client makes of an answer with tools or reasoning: the same whole and streamed, whatever the model writes."""

import json

import pytest

from tests.api import asking, templates
from tests.api.asking import chat, closed, post, tool
from tests.api.tiny import QUICK, RunningServer, make_pair

X = closed(x={"type": "integer"})
F = tool("f", X)
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("roomy"), max_len=1024)


@pytest.fixture(scope="module")
def url(pair):
    """One server whose requests bring their own template."""
    with RunningServer(pair, "--trust-request-chat-template", *QUICK) as server:
        yield server.url


def ask(url, text, form="hermes", stream=False, **fields):
    body = {"tools": [F], "structured_outputs": {"choice": [text]}, "chat_template": templates.FORMS[form]}
    return chat(url, body | fields, stream)


def tagged(value: str) -> str:
    return f"<tool_call>{value}</tool_call>"


NO_CALLS = [
    "\n\nHello <tool_call>garbage",
    tagged('{"name": "g", "arguments": {}}'),
    tagged('{"name": ["f"], "arguments": {}}'),
    tagged('{"name": "f", "arguments": [1]}'),
    '{"name": {"first": "Ann"}}',
    "  \n",
]
ARGUMENTS = {
    '{"x": 123456789012345678901}': '{"x": 123456789012345678901}',
    '{"x":1e5,"s":"</tool_call>"}': '{"x":1e5,"s":"</tool_call>"}',
    "null": "{}",
    '""': "{}",
    '"{\\"x\\": 2}"': '{"x": 2}',
    r'"{\"s\": \"\ud800\"}"': r'{"s": "\ud800"}',  # half of a surrogate pair: text cannot hold it, JSON can name it
    r'{"s": "\ud800", "x": 1e999}': r'{"s": "\ud800", "x": 1e999}',
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Hi {CALL} bye", "Hi  bye", ['{"x": 1}']),
        (f"Text\n\n{CALL}", "Text", ['{"x": 1}']),
        (f"{CALL}\n{CALL}", None, ['{"x": 1}'] * 2),
        (tagged('{"name": "f"}'), None, ["{}"]),
        ('{"name": "f", "arguments": {"x": 1}}', None, ['{"x": 1}']),
        ('{"name": "f", "arguments": null}', None, ["{}"]),
        *((text, text, []) for text in NO_CALLS),
        *((tagged(f'{{"name": "f", "arguments": {given}}}'), None, [wanted]) for given, wanted in ARGUMENTS.items()),
    ],
)
def test_hermes_calls(url, text, content, calls, stream):
    got = ask(url, text, stream=stream)
    assert (got.content, [arguments for _, arguments in got.calls]) == (content, calls)
    assert got.finish == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', None, ['{"x": 1}']),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {}}', None, ['{"x": 1}', "{}"]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', None, ['{"x": 1}']),
        ("llama3", '{"name": "f", "parameters": {"x": 1}} bye', '{"name": "f", "parameters": {"x": 1}} bye', []),
        ("llama3", '{"name": {"first": "Ann"}}', '{"name": {"first": "Ann"}}', []),
        ("llama3", CALL, CALL, []),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', None, ['{"x": 1}']),
        ("mistral", 'Ok. [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 2}}]',
         "Ok.", ['{"x": 1}', '{"x": 2}']),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}', None, ['{"x": 1}']),
        ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("mistral", '[TOOL_CALLS][{"name": ["f"]}]', '[TOOL_CALLS][{"name": ["f"]}]', []),
    ],
)  # fmt: skip
def test_other_forms_of_calls(url, form, text, content, calls, stream):
    got = ask(url, text, form, stream)
    assert (got.content, [arguments for _, arguments in got.calls]) == (content, calls)


def test_an_answer_in_json_flows_though_tools_are_given(url):
    text = json.dumps({"name": "Ann", "about": "She lives in a small house by the sea and reads."})
    got = ask(url, text, "llama3", stream=True)
    assert got.content == text and len(got.chunks) > 3  # fast steps share one


def test_a_schema_of_the_answer_beside_tools_is_no_call(url):
    """Whatever object the text holds: a name that is no text is no call, and nothing fails."""
    inner = {
        "type": "object",
        "properties": {"first": {"const": "Ann"}},
        "required": ["first"],
        "additionalProperties": False,
    }
    schema = {"type": "object", "properties": {"name": inner}, "required": ["name"], "additionalProperties": False}
    body = {"tools": [F], "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    for stream in (False, True):
        got = chat(url, body, stream)
        assert json.loads(got.content) == {"name": {"first": "Ann"}} and got.finish == "stop" and not got.calls


# --- forced calls

ZIP = closed(to={"$ref": "#/$defs/A"}) | {"$defs": {"A": closed(zip={"type": "string", "maxLength": 5})}}
SEVEN = closed(n={"$ref": "#/$defs/A"}, m={"$ref": "#/properties/n"}) | {"$defs": {"A": {"const": 7}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [chat, asking.responses, asking.messages])
def test_forced_calls_follow_references_within_their_own_schema(url, route, stream):
    for parameters, others in ((ZIP, SEVEN), (SEVEN, ZIP)):
        choice = {"type": "any"} if route is asking.messages else "required"
        got = route(url, {"tools": [tool("f", parameters), tool("g", others)], "tool_choice": choice}, stream)
        name, arguments = got.calls[0]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        wanted = {"f": parameters, "g": others}[name]
        assert len(arguments["to"]["zip"]) <= 5 if wanted is ZIP else arguments == {"n": 7, "m": 7}


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_function_without_parameters_is_called_with_none(url, parameters, stream):
    got = chat(url, {"tools": [tool("get_time", parameters)], "tool_choice": "required", "max_tokens": 60}, stream)
    assert got.calls == [("get_time", "{}")] and got.finish == "tool_calls" and got.content is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_invents_no_parameters(url, stream):
    """`properties` without `additionalProperties`, as most libraries write them; whoever wants others says so."""
    shut = {"type": ["object", "null"], "properties": {"a": {"const": 1}}, "$defs": {"A": {}}}
    for required, wanted in ((["a"], [{"a": 1}]), ([], [{}, {"a": 1}])):
        for route, choice in ((chat, "required"), (asking.responses, "required"), (asking.messages, {"type": "any"})):
            tools = [tool("f", shut | {"required": required})]
            got = route(url, {"tools": tools, "tool_choice": choice}, stream).calls[0][1]
            assert (json.loads(got) if isinstance(got, str) else got) in wanted


def test_parameters_are_an_object(url):
    for parameters in ({"type": "array", "items": {"const": 1}}, {"type": ["null", "string"]}, {"type": 7}):
        body = {"messages": asking.MESSAGES, "tools": [tool("f", parameters)], "tool_choice": "required"}
        error = post(url, "/v1/chat/completions", body, 400)["error"]
        assert error["param"] == "tools" and "object" in error["message"]
    # What is no schema is 400 as well, not a failure of ours.
    for required in (7, [7], [{}]):
        parameters = {"type": "object", "properties": {"a": {"const": 1}}, "required": required}
        post(url, "/v1/chat/completions", body | {"tools": [tool("f", parameters)]}, 400)


@pytest.mark.parametrize("stream", [False, True])
def test_a_mark_within_a_forced_argument_is_text(url, stream):
    schema = {
        "type": "object",
        "properties": {"s": {"const": "use <tool_call> tag"}},
        "required": ["s"],
        "additionalProperties": False,
    }
    for route, choice in ((chat, "required"), (asking.responses, "required"), (asking.messages, {"type": "any"})):
        got = route(url, {"tools": [tool("f", schema)], "tool_choice": choice}, stream)
        arguments = got.calls[0][1]
        assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == {"s": "use <tool_call> tag"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_cut_short_is_a_partial_call(url, stream):
    schema = {
        "type": "object",
        "properties": {"s": {"const": "a long text " * 5}},
        "required": ["s"],
        "additionalProperties": False,
    }
    body = {"tools": [tool("f", schema)], "tool_choice": "required"}
    got = chat(url, body | {"max_tokens": 30}, stream)
    assert got.finish == "length" and got.content is None and got.calls[0][0] == "f"
    assert got.calls[0][1].startswith("{") and not got.calls[0][1].endswith("}")
    assert asking.responses(url, dict(body) | {"max_output_tokens": 30}, stream).finish == "incomplete"
    first = chat(url, body | {"max_tokens": 1}, stream)
    assert first.calls == [("f", "")] and first.finish == "length"
    stopped = chat(url, body | {"stop": "long"}, stream)
    assert stopped.finish == "stop" and stopped.calls[0][1].endswith("a ")


def test_forced_arguments_arrive_as_they_are_written(url):
    schema = {
        "type": "object",
        "properties": {"s": {"const": "a long text " * 4}},
        "required": ["s"],
        "additionalProperties": False,
    }
    got = chat(url, {"tools": [tool("f", schema)], "tool_choice": "required"}, stream=True)
    assert sum("tool_calls" in choice["delta"] for chunk in got.chunks for choice in chunk["choices"]) > 5


UNENFORCED = "password byte binary int64 uri-reference json-pointer regex path decimal"


@pytest.mark.parametrize("kind", UNENFORCED.split())
def test_formats_that_nobody_enforces_are_annotations(url, kind):
    schema = closed(s={"type": "string", "format": kind, "maxLength": 3})
    got = chat(url, {"tools": [tool("f", schema)], "tool_choice": "required"})
    assert len(json.loads(got.calls[0][1])["s"]) <= 3
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert len(json.loads(chat(url, {"response_format": form}).content)["s"]) <= 3


# --- history


@pytest.mark.parametrize(
    ("arguments", "walked", "written"),
    [
        ("", "", "{}"),
        ("null", "", "{}"),
        (
            '{"x":1e5,"y":123456789012345678901}',
            "[x=1e5][y=123456789012345678901]",
            '{"x":1e5,"y":123456789012345678901}',
        ),
        ({"x": 2}, "[x=2]", '{"x": 2}'),
    ],
)
def test_calls_in_the_history_are_what_they_were(url, arguments, walked, written):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = [*asking.MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for template, text in ((templates.WALKING, walked), (templates.HERMES, f'"arguments": {written or arguments}}}')):
        body = {"messages": history, "tools": [F], "chat_template": template}
        ids = post(url, "/tokenize", body)["tokens"]
        assert text in post(url, "/detokenize", {"tokens": ids})["prompt"]


# --- reasoning


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("template", "text", "reasoning", "content"),
    [
        (templates.THINKING, "<think>\nhm, hm\n</think>\n\nYes.", "hm, hm", "Yes."),
        (templates.THINKING, "Yes.", "", "Yes."),
        (templates.THINKING, "<think>\nhm", "hm", ""),
        (templates.THINKING, "Yes <think>no</think>", "", "Yes <think>no</think>"),
        (templates.OPENED, "hm\n</think>\nYes.", "hm", "Yes."),
    ],
)
def test_reasoning_is_apart_from_the_answer(url, template, text, reasoning, content, stream):
    body = {"structured_outputs": {"choice": [text]}, "chat_template": template}
    got = chat(url, body, stream)
    assert (got.reasoning, got.content) == (reasoning, content)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_calls_on_the_other_routes(pair, stream, tmp_path):
    (tmp_path / "template").write_text(templates.THINKING)
    text = f"<think>hm</think>{CALL}"
    with RunningServer(pair, "--chat-template", str(tmp_path / "template"), *QUICK) as server:
        got = asking.responses(server.url, {"tools": [F], "structured_outputs": {"choice": [text]}}, stream)
        assert (got.reasoning, got.calls, got.content) == ("hm", [("f", '{"x": 1}')], None)
        answer = post(server.url, "/v1/responses", {"input": "hi", "structured_outputs": {"choice": [text]}})
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        prompt = {"messages": asking.MESSAGES}
        off = post(server.url, "/tokenize", prompt | {"chat_template_kwargs": {"enable_thinking": False}})["count"]
        on = post(server.url, "/tokenize", prompt)["count"]
        for path, fields in (
            ("/v1/chat/completions", {"enable_thinking": False, **prompt, "max_tokens": 1}),
            ("/v1/responses", {"enable_thinking": False, "input": "hi", "max_output_tokens": 1}),
            ("/v1/messages", {"thinking": {"type": "disabled"}, **prompt, "max_tokens": 1}),
        ):
            usage = post(server.url, path, fields)["usage"]
            counted = usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
            assert off > on and counted == off
