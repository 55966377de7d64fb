"""Limits and refusals that hold for everything of a kind: for each route, each list, each way in."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.generate.answer_reader import AnswerReader
from server.api.generate.detokenizer import Detokenizer
from server.api.generate.grammar_compiler import Compiler
from server.api.generate.history import with_tools_in_words
from server.api.generate.recent import Recent
from server.api.generate.serving import is_crowded, written
from server.api.generate.tokenizer import ServingTokenizer
from server.api.generate.tool_forms import HERMES
from server.api.http import probes
from server.api.http.errors import APIError
from server.api.http.sse import dumped_parts, dumps, entries_of, listed
from server.api.routes.operations import POSTS
from server.config import Settings
from server.core.request import LiveRequest, RepetitionLimit, Request, SamplingParams
from server.engine.extras.grammar import Grammar
from server.engine.stopping import stop_status
from server.growing import _without_secrets
from server.process import bind
from tests.api.tiny import NAME, QUICK, RunningServer, make_tokenizer

HELLO = [{"role": "user", "content": "hi"}]
# Half of a surrogate pair: JSON can name it, no text can hold it.
HALF = '["\\ud800"]'
CALLS = [
    *HELLO,
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": HALF}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "x"},
]


@pytest.fixture(scope="module")
def server(pair):
    with RunningServer(pair, "--max-model-len", "256", *QUICK) as server:
        yield server


def unbounded(schema: Any, definitions: dict[str, Any], where: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """Places of lists and mappings whose entries are looked at one by one, and whose length nothing limits."""
    if not isinstance(schema, dict):
        return []
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return [] if name in seen else unbounded(definitions[name], definitions, name, seen | {name})
    found = [where] if schema.get("items") not in (None, {}, True) and "maxItems" not in schema else []
    if isinstance(schema.get("additionalProperties"), dict) and "maxProperties" not in schema:
        found.append(where)
    inner = [(f"{where}.{name}", value) for name, value in schema.get("properties", {}).items()]
    inner += [(where, value) for kind in ("anyOf", "oneOf", "allOf") for value in schema.get(kind, ())]
    inner += [(f"{where}[]", schema[kind]) for kind in ("items", "additionalProperties") if kind in schema]
    return found + [place for name, value in inner for place in unbounded(value, definitions, name, seen)]


def test_every_list_of_every_route_has_a_length_that_is_checked_first():
    found = set()
    for _, _, model, _, _ in POSTS:
        schema = model.model_json_schema(by_alias=True)
        found |= {*unbounded(schema, schema.get("$defs", {}), model.__name__)}
    # Prompts are looked at by hand (`read_prompts`).
    prompts = {f"{name}{end}" for name in ("CompletionRequest.prompt", "EmbeddingsRequest.input") for end in ("", "[]")}
    assert found == prompts


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/responses"])
def test_half_a_character_in_a_call_is_the_callers_mistake(server, path):
    body: dict[str, Any] = {"model": NAME, "messages": CALLS}
    if path == "/v1/responses":
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": HALF}
        body = {"model": NAME, "input": [*HELLO, call]}
    # Templates that print calls do so as JSON; this pair's prints none, and the prompt in words does.
    body["tools"] = [{"type": "function", "function": {"name": "f"}}]
    if path == "/v1/responses":
        body["tools"] = [{"type": "function", "name": "f"}]
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code in (200, 400), answer.text
    assert not any("Traceback" in line for line in server.log)


def test_a_salt_counts_on_every_route_that_computes(server):
    """Whatever route a text was sent on with a salt, without that salt nobody can tell that it was."""
    computing = [model for path, _, model, tag, _ in POSTS if tag != "tokenizer" and path != "/api/show"]
    assert all("cache_salt" in model.model_fields for model in computing)

    def cached(prompt: list[int], **more: Any) -> int:
        body = {"prompt": prompt, "max_tokens": 1, **more}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    ids = list(range(20, 84))
    httpx.post(server.url + "/v1/embeddings", json={"input": ids, "cache_salt": "mine"}, timeout=60).raise_for_status()
    assert cached(ids) == 0 and cached(ids, cache_salt="mine") > 0
    text = "A server that holds a teacher and a student serves every size in between. " * 2
    short = {"model": NAME, "prompt": text, "raw": True, "options": {"num_predict": 1}, "stream": False}
    httpx.post(server.url + "/api/generate", json=short | {"cache_salt": "mine"}, timeout=60).raise_for_status()
    assert cached(text) == 0 and cached(text, cache_salt="mine") > 0


def test_one_keys_uploads_cost_others_no_refusal():
    arriving = Counter({"flood": 90})
    assert not is_crowded(arriving, "flood", 100)
    arriving["flood"] += 20
    assert is_crowded(arriving, "flood", 100)
    arriving["other"] += 30
    assert not is_crowded(arriving, "other", 100) and is_crowded(arriving, "flood", 100)
    arriving["other"] += 30
    assert is_crowded(arriving, "other", 100)


def test_a_long_part_of_an_answer_is_written_while_the_event_loop_turns():
    async def scenario() -> int:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.ensure_future(turn())
        entries = range(300_000)
        part = await written(
            lambda: {"content": listed([entries_of(entries, lambda i: {"a": i}, 5000)])}, num_scored=len(entries)
        )
        turning.cancel()
        answer = {"choices": [part, 2, part], "text": "\u2028"}
        assert b"".join(dumped_parts(answer)) == dumps(answer)
        read = json.loads(dumps(answer))
        assert read["choices"][2]["content"][-1] == {"a": len(entries) - 1} and read["text"] == "\u2028"
        assert json.loads(dumps({"big": 10**30, "part": part}))["part"] == read["choices"][0]
        return turns

    assert asyncio.run(scenario()) > 2


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer(tmp_path)
    return ServingTokenizer.from_folder(tmp_path)


@pytest.fixture
def compiler(tokenizer):
    return Compiler(tokenizer, Settings())


def test_bytes_that_never_become_a_character_are_given_out_as_they_come(tokenizer):
    """Kept until the end, each further one would cost as much as all before it."""
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else tokenizer.encode("世")[:1]
    for ids in (half * 500, [*tokenizer.encode("a"), *half * 100, *tokenizer.encode("世界") * 50, *half * 100]):
        detokenizer = Detokenizer(tokenizer, [5, 9, 20])
        texts = []
        for token_id in ids:
            assert len(detokenizer._pending) <= 40 and len(detokenizer._context) <= 40
            assert not detokenizer.push(token_id)
            texts.append(detokenizer.take())
        assert len("".join(texts)) >= len(tokenizer.decode(ids)) - 40
        detokenizer.finish()
        assert "".join([*texts, detokenizer.take(is_final=True)]) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ['<tool_call>{"a":[' * 4000, '<tool_call>{"a":[' * 3000 + "]" * 3000 + "x"])
def test_marks_that_open_no_call_are_not_read_over_and_over(text):
    before = time.process_time()
    said = []
    for size in (1, 7, len(text)):
        reader = AnswerReader(["f"], HERMES)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        said.append("".join(part.text for piece in pieces for part in reader.push(piece)))
        said[-1] += "".join(part.text for part in reader.finish())
    assert said == [text] * 3
    assert time.process_time() - before < 3.0  # for half a minute


def test_results_of_many_calls_are_put_into_words_at_once():
    messages = [*HELLO, *[{"role": "tool", "content": "x" * 1000}] * 4000]
    before = time.process_time()
    said = with_tools_in_words(messages, None)
    assert time.process_time() - before < 0.5
    assert len(said) == 2 and said[1]["content"].count("<tool_response>") == 4000


def test_a_text_that_nearly_loops_is_looked_at_in_no_time():
    """The same answer as a comparison of all that could be a pattern, which would take seconds here."""
    rng = random.Random(0)
    limit = RepetitionLimit(1, 1024, 9)
    sampling = SamplingParams(max_tokens=10**6, repetition=limit)
    request = LiveRequest(Request("r", [1], sampling, (4,)))
    before = time.process_time()
    while len(request.output_token_ids) < 8000:
        request.output_token_ids.append(rng.choices((7, 8), (9, 1))[0])
        if request.output_token_ids[-9:] == [7] * 9:
            request.output_token_ids[-1] = 8
        assert stop_status(request, request.output_token_ids[-1], 10**6) is None
    assert time.process_time() - before < 2.0
    for _ in range(9 * 5):
        for token in (1, 2, 3, 4, 5):
            request.output_token_ids.append(token)
            if stop_status(request, token, 10**6) is not None:
                ended = request.output_token_ids[8000:]
                assert 9 * 5 <= len(ended) < 9 * 5 + 8
                return
    pytest.fail("the loop was not found")


def test_a_trial_process_that_something_else_has_ended_is_no_grammars_fault(compiler):
    async def scenario() -> None:
        await compiler.factory('["regex", "[a-c]+"]', "regex")
        for trial in compiler._trials:
            process = await trial._starting
            process.kill()
            await process.wait()
        await compiler.factory('["regex", "[d-f]+"]', "regex")
        assert not len(compiler._refused)

    asyncio.run(scenario())


def follow(constraint: Grammar, draw: random.Random) -> str | None:
    """150 tokens of what the constraint allows; why it could not be followed, or None."""
    for _ in range(150):
        allowed = np.flatnonzero(np.unpackbits(constraint.bitmask().view(np.uint8), bitorder="little"))
        if not constraint.accept(int(draw.choice(allowed))):
            assert constraint.error is not None, "it would be taken for a text that is whole"
        if constraint.is_terminated():
            break
    return constraint.error


def test_a_grammar_that_many_have_followed_can_be_followed(compiler):
    """A compiled grammar's copies share a lexer, whose states are limited: once all were met, none can go on."""
    draw, source = random.Random(0), '["regex", "(.*[a-m].{14})*"]'

    async def scenario() -> None:
        alone = await compiler.factory(source, "regex")
        assert any("too many states" in (follow(alone(), draw) or "") for _ in range(20)), "it shows nothing, then"
        for _ in range(3):
            constraint = await compiler.factory(source, "regex", count=16)
            assert [follow(constraint(), draw) for _ in range(16)] == [None] * 16

    asyncio.run(scenario())


def test_texts_of_grammars_are_kept_up_to_so_many_bytes(compiler):
    sources = [json.dumps(["choice", [f"{name}{n}" for n in range(1000)]]) for name in "abcdef"]
    compiler._texts = Recent(40_000)
    tried, convert = [], compiler._try

    async def note(key: bytes, source: str, param: str) -> str:
        tried.append(source)
        return await convert(key, source, param)

    async def scenario() -> None:
        compiler._try = note
        for source in [*sources, *sources[::-1]]:
            await compiler.factory(source, "choice")
            assert compiler._texts.weight <= 40_000

    asyncio.run(scenario())
    assert tried == [*sources, *sources[1::-1]], "four of them fit"


def test_what_weighs_too_much_by_itself_drives_out_nothing():
    recent: Recent[str] = Recent(10)
    for key, weight in ((b"a", 4), (b"b", 4), (b"c", 11)):
        recent.put(key, "value", weight)
    assert recent.get(b"a") and not recent.get(b"c") and recent.weight == 8
    recent.put(b"d", "value", 4)
    assert recent.get(b"a") and not recent.get(b"b") and len(recent) == 2
    recent.put(b"a", "value", 1)
    assert recent.weight == 5


def test_a_trial_process_that_cannot_be_started_is_started_later(compiler, monkeypatch):
    async def scenario() -> None:
        start = asyncio.create_subprocess_exec

        async def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no more descriptors")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
        with pytest.raises(APIError) as told:
            await compiler.factory('["regex", "[a-c]+"]', "regex")
        assert told.value.status == 503
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        await compiler.factory('["regex", "[a-c]+"]', "regex")

    asyncio.run(scenario())


def test_a_socket_that_another_server_listens_on_is_not_taken_away(tmp_path):
    path = tmp_path / "socket"
    with bind(Settings(uds=str(path))), pytest.raises(FileExistsError, match="another process listens"):
        bind(Settings(uds=str(path)))
    with bind(Settings(uds=str(path))):  # what a dead one has left
        assert path.is_socket()


def test_probes_are_answered_though_somebody_holds_every_place(monkeypatch):
    monkeypatch.setattr(probes, "_MOST_AT_ONCE", 4)
    monkeypatch.setattr(probes, "_SECONDS", 0.5)
    fine = SimpleNamespace(check_health=lambda: None, check_live=lambda: None)

    def render() -> bytes:
        raise RuntimeError("dictionary changed size during iteration")

    server = probes.ProbeServer(("127.0.0.1", 0), SimpleNamespace(metrics=SimpleNamespace(render=render), **vars(fine)))
    address = server.server_address
    url = f"http://127.0.0.1:{address[1]}"
    try:
        assert httpx.get(url + "/metrics").status_code == 500
        held = [socket.create_connection(address) for _ in range(4)]
        time.sleep(0.1)
        with socket.create_connection(address) as fifth:  # hung up on at once, with no thread
            fifth.settimeout(5)
            assert fifth.recv(1) == b""
        for connection in held:  # a byte now and then does not keep a place
            connection.sendall(b"G")
        time.sleep(0.7)
        assert httpx.get(url + "/health").json() == {"status": "ok"}
    finally:
        server.close()
        for connection in held:
            connection.close()


def test_the_load_balancer_passes_every_route_but_the_metrics():
    """Its allow-list is written by hand."""
    import re

    from server.api.routes.operations import ROUTERS

    text = (Path(__file__).parents[2] / "deploy/haproxy/haproxy.cfg").read_text()
    (known,) = re.findall(r"acl is_known path_reg (\S+)", text)
    paths = [path for path, *_ in POSTS] + [route.path for router in ROUTERS for route in router.routes]
    passed = {path for path in paths if re.search(known, path.replace("{model:path}", NAME))}
    assert {*paths} - passed == {"/metrics"}


def test_who_makes_a_student_gets_no_key():
    given = {
        "PATH": "/bin",
        "BOOMERANG_STORE": "/s",
        "BOOMERANG_API_KEY": "x",
        "BOOMERANG_API_KEY_FILE": "f",
        "HF_TOKEN": "t",
    }
    assert _without_secrets(given) == {"PATH": "/bin", "BOOMERANG_STORE": "/s"}
