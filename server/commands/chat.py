"""`boomerang chat`: a conversation in the terminal, at any size, with a running server or a pair loaded here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pydantic import BaseModel, Field

from model_store.errors import BoomerangError
from server.config import Settings
from server.sizing.spec import size_name

COMMANDS = {
    "/size": "SIZE: answer with this size from now on (auto, 24L, 24L-q6, 75%, student, teacher)",
    "/sizes": "list the sizes",
    "/system": "TEXT: start over with this system message",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
}
HELP = "\n".join(f"{name:8} {text}" for name, text in COMMANDS.items())


class ChatOptions(BaseModel):
    """Flags of `chat`."""

    url: str | None = Field(None, description="a running server; without one, the pair is loaded here")
    key: str | None = Field(None, description="API key for --url [env: OPENAI_API_KEY]")
    system: str | None = Field(None, description="system message")
    temperature: float | None = Field(
        None, description="of sampling; 0 is greedy [the model's]", ge=0, allow_inf_nan=False
    )
    max_tokens: int = Field(512, description="longest answer", ge=1)


class Backend(Protocol):
    """Where answers come from. `stream` yields pieces of text; afterwards `last_size` says who answered."""

    last_size: str
    num_tokens: int

    def sizes(self) -> list[str]: ...
    def stream(self, messages: list[dict[str, str]], size: str, arguments: ChatOptions) -> Iterator[str]: ...


class ChatError(BoomerangError):
    """What the user should read instead of an answer."""


class ServerBackend:
    """A running server, through its OpenAI-style API."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=600)
        try:
            card = self._get("/v1/models")["data"][0]
            self.model, self._sizes = card["id"], card["sizes"]
        except (LookupError, TypeError, ValueError):
            raise ChatError(f"--url: {url} is not a boomerang server") from None
        self.last_size, self.num_tokens = "", 0

    def _get(self, path: str) -> dict[str, Any]:
        with _connected():
            response = self._client.get(path)
        if response.status_code != 200:
            raise ChatError(_message(response.text))
        return response.json()

    def sizes(self) -> list[str]:
        return self._sizes

    def stream(self, messages: list[dict[str, str]], size: str, arguments: ChatOptions) -> Iterator[str]:
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "size": size, "stream": True,
            "max_tokens": arguments.max_tokens, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if arguments.temperature is not None:
            body["temperature"] = arguments.temperature
        with _connected(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatError(_message(response.read().decode()))
            self.last_size = response.headers.get("x-boomerang-size", "")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ChatError(chunk["error"]["message"])
                if chunk.get("usage"):
                    self.num_tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """ChatError for a server that is not there, or goes away."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ChatError(f"--url: the server does not answer: {error}") from error


class LocalBackend:
    """A pair loaded in this process; the engine is stepped by hand."""

    def __init__(self, settings: Settings) -> None:
        from server.api.generate.size_choice import SizeChooser
        from server.loading import load_model

        self._served = load_model(settings)
        template = self._served.tokenizer.chat_template
        if template is None:
            raise ChatError("this model has no chat template: give one with --chat-template")
        self._template = template
        self._chooser = SizeChooser(self._served.catalog, settings)
        self.last_size, self.num_tokens = "", 0

    def sizes(self) -> list[str]:
        return [f"{size}L" for size in self._served.catalog.sizes]

    def stream(self, messages: list[dict[str, str]], size: str, arguments: ChatOptions) -> Iterator[str]:
        from server.api.generate.detokenizer import Detokenizer
        from server.api.generate.protocol import SizeFields
        from server.api.generate.sampling import repetition_limit
        from server.core.request import Request, SamplingParams

        tokenizer, engine = self._served.tokenizer, self._served.engine
        prompt = tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        room = engine.config.max_model_len - len(prompt)
        if room < 1:
            raise ChatError("the conversation is longer than the model's context: /reset")
        choice = self._chooser.choose(SizeFields(size=size), None, {})
        default = self._served.sampling_defaults
        sampling = SamplingParams(
            max_tokens=min(arguments.max_tokens, room),
            temperature=default.temperature if arguments.temperature is None else arguments.temperature,
            top_p=default.top_p, top_k=max(default.top_k, 0), min_p=default.min_p,
            repetition_penalty=default.repetition_penalty, repetition=repetition_limit(default.repetition_detection),
            eos_token_ids=tokenizer.eos_token_ids,
        )  # fmt: skip
        asked = Request(
            uuid.uuid4().hex, prompt, sampling, sizes=choice.sizes, size_reason=choice.reason,
            min_width=choice.min_width, max_width=choice.max_width, workload=choice.workload,
        )  # fmt: skip
        try:
            request = engine.add_request(asked)
        except ValueError as error:
            raise ChatError(str(error)) from None
        text = Detokenizer(tokenizer, prompt)
        try:
            while not request.is_finished:
                for output in engine.step():
                    if output.error:
                        raise ChatError(output.error)
                    for token in output.new_token_ids:
                        text.push(token)
                if request.decision is not None:
                    self.last_size = size_name(request.decision.size, request.width)
                if piece := text.take():
                    yield piece
            text.finish()
            if piece := text.take(is_final=True):
                yield piece
        finally:
            self.num_tokens = len(request.output_token_ids)
            engine.abort([request.request_id])


def run_chat(arguments: ChatOptions, settings: Settings) -> int:
    """Read, answer, repeat. Ctrl-C stops an answer, Ctrl-D leaves."""
    try:
        key = arguments.key or os.environ.get("OPENAI_API_KEY")
        backend: Backend = ServerBackend(arguments.url, key) if arguments.url else LocalBackend(settings)
    except (ChatError, OSError) as error:
        print(f"boomerang: {error}")
        return 1
    size, system = settings.size, arguments.system
    last = size  # that answered
    messages = _start(system)
    read = _reader(backend.sizes(), settings)
    print(f"{backend.sizes()[0]} to {backend.sizes()[-1]}; /help for commands")
    while True:
        try:
            line = read(f"{size}> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return 0
        if command == "/help":
            print(HELP)
        elif command == "/sizes":
            print(" ".join(backend.sizes()))
        elif command == "/size":
            size = rest.strip() or size
        elif command in ("/reset", "/system"):
            system = rest.strip() or None if command == "/system" else system
            messages = _start(system)
        elif command.startswith("/"):
            print(f"no such command: {command}\n{HELP}")
        elif line:
            is_size = _turn(backend, messages, line, size, arguments)
            size = last = size if is_size else last


def _reader(sizes: list[str], settings: Settings) -> Callable[[str], str]:
    """Reads a line of what is piped in, or what is typed: with history, several lines, commands and sizes completed."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        return input
    from model_store.store import store_root
    from server.commands.prompt import make_session

    return make_session(sizes, COMMANDS, store_root(settings.store) / "chat_history").prompt


def _turn(backend: Backend, messages: list[dict[str, str]], line: str, size: str, arguments: ChatOptions) -> bool:
    """One question and its answer; a question without an answer is forgotten. False if `size` is none that answers."""
    messages.append({"role": "user", "content": line})
    pieces: list[str] = []
    start = time.perf_counter()
    try:
        for piece in backend.stream(messages, size, arguments):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except BoomerangError as error:
        messages.pop()
        print(f"[{error}]")
        return not str(error).startswith("size:")
    seconds = time.perf_counter() - start
    print(f"\n[{backend.last_size}, {backend.num_tokens} tokens, {backend.num_tokens / seconds:.1f} tokens/s]")
    messages.append({"role": "assistant", "content": "".join(pieces)})
    return True


def _start(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _message(text: str) -> str:
    """The message of an OpenAI-style error body, or the body."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text.strip() or "the server gave no answer"
