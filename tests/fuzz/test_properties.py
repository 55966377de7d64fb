"""Properties of what is done to every text, for any text: 300 examples each in the suite, 10,000 in `make fuzz`."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.generate.answer_parts import CallPart
from server.api.generate.answer_reader import AnswerReader
from server.api.generate.detokenizer import Detokenizer
from server.api.generate.json_text import ObjectScanner, parse
from server.api.generate.tokenizer import ServingTokenizer
from server.api.generate.tool_forms import GENERIC, HERMES, LLAMA3, MISTRAL
from tests.api.test_text import common
from tests.api.tiny import make_tokenizer

NUM_EXAMPLES = int(os.environ.get("BOOMERANG_PROPERTY_EXAMPLES", "300"))
TEXTS = [
    "secret \ufffd",
    "Bonjour 你好 世界 🌶🌶 fin",
    "Grüße, \ufffd\ufffd\n\u2028 🫠 שלום",
    "<|im_start|>user\nHi<|im_end|>\n",
]
many = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
# What texts with calls are made of, whole and in splinters.
MARKS = """<tool_call> </tool_call> <tool _call> { } "name" : "f" "g" , "arguments" "parameters" {"x":1} null "" "{}"
<think> </think> [TOOL_CALLS] [ ] [ARGS] [CALL_ID] f ; <|python_tag|> \\ " < é🌶 abc 1 text"""
PIECES = [
    *MARKS.split(),
    " ", "\n", '{"name": "f", "arguments": {"x": 1}}', '{"s": "<tool_call>"}', '[TOOL_CALLS]f[ARGS]{"x":1}',
    '<tool_call>{"name": "f", "arguments": {"x": 1e5}}</tool_call>', '[{"name": "f", "arguments": {"x": 1.50}}]',
    r"\ud800", r'<tool_call>{"name": "f", "arguments": "{\"s\": \"\ud800\"}"}</tool_call>',
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return ServingTokenizer.from_folder(folder)


@many
@given(data=st.data())
def test_new_text_is_the_whole_less_the_prompt(tokenizer, data):
    """For any text, cut at any token, and for tokens in any order."""
    text = data.draw(st.sampled_from(TEXTS) | st.text(max_size=20))
    ids = tokenizer.encode(text.encode("utf-8", "ignore").decode(), add_special_tokens=False)
    if data.draw(st.booleans()):
        ids += data.draw(st.lists(st.integers(0, tokenizer.backend.get_vocab_size() - 1), max_size=8))
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer, pieces = Detokenizer(tokenizer, ids[:cut]), []
    for token_id in ids[cut:]:
        assert detokenizer.offset(token_id) >= len(detokenizer.text)
        detokenizer.push(token_id)
        pieces.append(detokenizer.take())
    detokenizer.finish()
    pieces.append(detokenizer.take(is_final=True))
    prompt, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:cut], ids))
    assert "".join(pieces) == detokenizer.text == whole[common(prompt, whole) :]


@many
@given(data=st.data())
def test_stop_strings_cut_the_text(tokenizer, data):
    """And until then all is handed out but what may be the beginning of one."""
    text = data.draw(st.sampled_from(TEXTS) | st.text(alphabet="ab🌶é ", max_size=30))
    stops = data.draw(st.lists(st.text(alphabet="ab🌶é", min_size=1, max_size=4), min_size=1, max_size=5))
    detokenizer, taken = Detokenizer(tokenizer, stop=stops), ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if detokenizer.push(token_id):
            break
        taken += detokenizer.take()
        ends = (stop[:size] for stop in stops for size in range(len(stop)))
        assert len(detokenizer.text) - len(taken) == max(len(end) for end in ends if detokenizer.text.endswith(end))
    detokenizer.finish()
    taken += detokenizer.take(is_final=True)
    shown = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)
    # Which one is complete first depends on how the text is cut into tokens.
    assert not any(stop in taken for stop in stops) and shown.startswith(taken + (detokenizer.stop_string or ""))
    assert detokenizer.stop_string in stops or taken == shown


def read(text: str, cuts: list[int], is_cut: bool, **fields) -> list[tuple]:
    """(kind, text) and ("call", name, arguments) of an answer that comes in pieces."""
    reader, parts = AnswerReader(**fields), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += reader.push(text[begin:end])
    result: list[list[str]] = []
    for part in [*parts, *reader.finish(is_cut)]:
        if isinstance(part, CallPart):
            result += [["call", part.name or "", ""]] if part.id else []
            result[-1][2] += part.arguments
        elif result and result[-1][0] == type(part).__name__:
            result[-1][1] += part.text
        else:
            result.append([type(part).__name__, part.text])
    return [tuple(item) for item in result]


@many
@given(data=st.data())
def test_a_streamed_answer_is_the_whole_answer(data):
    """Any text, cut anywhere, in every form of calls; and what is handed out as a call is one."""
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14)))
    fields = {
        "names": {"f"},
        "form": data.draw(st.sampled_from([HERMES, LLAMA3, MISTRAL, GENERIC])),
        "allows_several": data.draw(st.booleans()),
        "thinks": data.draw(st.booleans()),
        "has_thought_begun": data.draw(st.booleans()),
    }
    is_cut = data.draw(st.booleans())
    whole = read(text, [], is_cut, **fields)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    assert read(text, cuts, is_cut, **fields) == read(text, list(range(1, len(text))), is_cut, **fields) == whole
    calls = [item for item in whole if item[0] == "call"]
    assert all(name == "f" for _, name, _ in calls)
    for _, _, arguments in calls if not is_cut else ():
        assert isinstance(parse(arguments), dict)
        assert arguments in text or arguments == "{}" or arguments.replace("\\", "") in text.replace("\\", "")
        arguments.encode()
    if not calls and not fields["thinks"] and not fields["has_thought_begun"]:
        assert "".join(item[1] for item in whole) == text


@many
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
), rest=st.text(max_size=5), data=st.data())  # fmt: skip
def test_an_object_ends_where_it_ends(value, rest, data):

    written = json.dumps(
        {"a": value, "b": 1}, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1]))
    )
    scanner, text = ObjectScanner(), written + rest
    cut = data.draw(st.integers(0, len(text)))
    scanner.scan(text[:cut])
    scanner.scan(text)
    assert scanner.end == len(written) and json.loads(text[slice(*scanner.members["a"])]) == value
