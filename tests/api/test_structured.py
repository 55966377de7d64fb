"""Constrained text and tools over HTTP: whatever the (random) model would rather say, the answer has the form."""

import json
import re

import httpx
import openai
import pytest

from tests.api.tiny import NAME

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "numbers": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    },
    "required": ["kind", "numbers"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" " " [0-9]'
TAG = {"structures": [{"begin": "<f>", "schema": {"enum": [1, 2]}, "end": "</f>"}], "triggers": ["<f"]}


def tool(name: str) -> dict:
    """Few words: the context of the tiny model is short."""
    return {"type": "function", "function": {"name": name, "parameters": {"enum": [{"on": True}, {"on": False}]}}}


@pytest.fixture(scope="module")
def client(plain):
    return openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)


def is_schema(text: str) -> bool:
    value = json.loads(text)
    return value["kind"] in "ab" and set(value["numbers"]) <= {1, 2} and len(value) == 2


FORMS = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, is_schema),
    ({"response_format": {"type": "regex", "regex": "[ab]{3}-[0-9]"}}, re.compile("[ab]{3}-[0-9]").fullmatch),
    ({"response_format": {"type": "choice", "choice": ["left", "right"]}}, ["left", "right"].__contains__),
    ({"response_format": {"type": "grammar", "grammar": GBNF}}, re.compile("yes|no [0-9]").fullmatch),
    ({"structured_outputs": {"json": SCHEMA}}, is_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, lambda t: " " not in t),
    ({"structured_outputs": {"regex": "x{2,4}"}}, re.compile("x{2,4}").fullmatch),
    ({"structured_outputs": {"choice": ["Grüße", "世界"]}}, ["Grüße", "世界"].__contains__),
    ({"structured_outputs": {"grammar": 'start: "a" "b" "c"?'}}, re.compile("abc?").fullmatch),
]


@pytest.mark.parametrize(("form", "fits"), FORMS)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_text_has_the_form(client, form, fits, temperature):
    sampling = {"model": NAME, "max_tokens": 120, "temperature": temperature, "seed": 3, "extra_body": form}
    completion = client.completions.create(prompt="hi", **sampling).choices[0]
    chat = client.chat.completions.create(messages=HELLO, **sampling).choices[0]
    assert completion.finish_reason == chat.finish_reason == "stop"
    assert fits(completion.text) and fits(chat.message.content)
    stream = client.chat.completions.create(messages=HELLO, stream=True, **sampling)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.message.content


def test_json_objects_and_tags(client):
    text = (
        client.completions.create(
            model=NAME, prompt="hi", max_tokens=60, seed=1, extra_body={"response_format": {"type": "json_object"}}
        )
        .choices[0]
        .text
    )
    assert text.startswith("{")
    url = str(client.base_url).removesuffix("v1/")
    angle = [str(t) for t in httpx.post(url + "tokenize", json={"prompt": "<f>12"}).json()["tokens"]]
    forms = [{"response_format": {"type": "structural_tag", **TAG}}]
    forms += [{"structured_outputs": {"structural_tag": json.dumps(TAG)}}]
    for form in forms:
        # Tokens of the tag are made likely, or a random model would never open one.
        form["logit_bias"] = dict.fromkeys(angle, 30)
        arguments = {"model": NAME, "prompt": "<", "max_tokens": 40, "extra_body": form}
        texts = [client.completions.create(**arguments, seed=seed).choices[0].text for seed in range(4)]
        assert any("<f>" in text for text in texts), texts
        found = [inside for text in texts for inside in re.findall(r"<f>(.*?)</f>", text)]
        assert all(json.loads(inside) in (1, 2) for inside in found)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": "root ::= nothing"}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.structural_tag"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "string", "format": ["date"]}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"minimum": "1", "maximum": 2**60}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 70000}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
    ],
)  # fmt: skip
def test_bad_constraints_are_named(client, form, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="x", extra_body=form)
    assert caught.value.body["param"] == param


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "b"}}])
def test_forced_calls(client, choice):
    arguments = {"model": NAME, "messages": HELLO, "tools": [tool("a"), tool("b")], "tool_choice": choice}
    answer = client.chat.completions.create(**arguments, temperature=0, max_tokens=60).choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and isinstance(json.loads(call.function.arguments)["on"], bool)
    assert call.function.name == "b" or choice == "required"
    chunks = list(client.chat.completions.create(**arguments, temperature=0, max_tokens=60, stream=True))
    streamed = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert [c.function.name for c in streamed if c.id] == [call.function.name]
    assert "".join(c.function.arguments for c in streamed) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_calls_are_read_from_free_text_and_none_means_none(client):
    """`auto` does not force anything: here a regex stands in for a model that decides to call."""
    call = '<tool_call>\n{"name": "a", "arguments": {"on": true}}\n</tool_call>'
    form = {"structured_outputs": {"choice": [f"Sure. {call}{call}"]}}
    arguments = {"model": NAME, "messages": HELLO, "tools": [tool("a")], "max_tokens": 135}
    both = client.chat.completions.create(**arguments, extra_body=form).choices[0]
    assert both.message.content == "Sure." and len(both.message.tool_calls) == 2
    one = client.chat.completions.create(**arguments, extra_body=form, parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1
    none = client.chat.completions.create(**arguments, extra_body=form, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and call in none.message.content
    chunks = list(client.chat.completions.create(**arguments, extra_body=form, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == "Sure." and sum(len(c.choices[0].delta.tool_calls or ()) for c in chunks) == 2


def test_tool_choices_that_cannot_be_followed(client):
    for changes, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
        ({"tools": [tool("bad name")]}, "tools.0.function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=HELLO, **changes)
        assert caught.value.body["param"] == param
