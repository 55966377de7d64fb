"""Ollama's words to ours: its bodies as the chat or completion request that means the same."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from server.api.chat.protocol import ChatCompletionRequest
from server.api.completions.convert import Continuation
from server.api.completions.protocol import CompletionRequest
from server.api.generate.chat_template import to_json
from server.api.generate.conversation import Conversation
from server.api.generate.protocol import SamplingFields, SizeFields
from server.api.http.body import check_extra, check_values
from server.api.http.errors import APIError, from_validation, invalid
from server.api.http.state import ServerState
from server.api.ollama.protocol import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
)

T = TypeVar("T", bound=SamplingFields)
Talk = Conversation | Continuation

_LATEST = ":latest"
_NAMES = {"max_tokens": "options.num_predict", "response_format": "format"}
_SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")


def model_name(model: str | None, state: ServerState) -> str:
    """Ours for a name as Ollama's clients write it. 404 in its words for one that is not served here."""
    if not model:
        raise invalid("model is required", "model")
    name = model.removesuffix(_LATEST)
    try:
        state.catalog.card(name)
    except APIError as error:
        detail = error.message.partition(": ")[2]
        message = f"model {model[:200]!r} not found: {detail}"
        raise APIError(message, param="model", status=404, code=error.code) from None
    return name


def chat(body: OllamaChatRequest, state: ServerState) -> Talk:
    messages = _messages(body.messages or [])
    fields: dict[str, Any] = {"messages": messages}
    if body.tools:
        fields["tools"] = [{"type": "function", "function": tool.function.model_dump()} for tool in body.tools]
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return _conversation(body, fields, state)


def generate(body: OllamaGenerateRequest, state: ServerState) -> Talk:
    """A prompt is a user's message, unless it is `raw` or the model has no chat template."""
    if body.raw and body.system:
        raise invalid("system: raw mode does not support template, system, or context", "system")
    if body.raw or (state.tokenizer.chat_template is None and not body.system):
        if body.think:
            raise invalid("think needs a chat template, and raw takes none.", "think")
        fields: dict[str, Any] = {
            "prompt": body.prompt,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
        continuation = Continuation(state, _body(CompletionRequest, body, fields))
        continuation.default_max_tokens = state.sampling_defaults.max_new_tokens or None
        return _limited(continuation, body)
    messages = [{"role": "system", "content": body.system}] if body.system else []
    fields = {"messages": [*messages, {"role": "user", "content": body.prompt}]}
    return _conversation(body, fields, state, _NAMES | {"messages": "prompt"})


def _conversation(
    body: OllamaRequest, fields: dict[str, Any], state: ServerState, names: dict[str, str] = _NAMES
) -> Talk:
    if body.think is not None:
        template = state.tokenizer.chat_template
        if body.think and not (template and template.thinks):
            raise invalid(f"think: {body.model[:200]!r} does not support thinking", "think")
        fields["enable_thinking"] = bool(body.think)
        if isinstance(body.think, str):
            fields["reasoning_effort"] = body.think
    fields |= {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs if body.logprobs else None}
    return _limited(Conversation(state, _body(ChatCompletionRequest, body, fields), names), body)


def _limited(talk: Talk, body: OllamaRequest) -> Talk:
    most = None if body.options is None else body.options.num_predict
    if most is not None and most < 1:
        talk.default_max_tokens = None
    return talk


def _body(model: type[T], body: OllamaRequest, fields: dict[str, Any]) -> T:
    fields |= {name: getattr(body, name) for name in SizeFields.model_fields}
    fields |= {"model": body.model, "cache_salt": body.cache_salt, "stream": body.stream is not False}
    fields |= _sampling(body.options or OllamaOptions())
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif body.format:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.format}}
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def _sampling(options: OllamaOptions) -> dict[str, Any]:
    try:
        check_extra(options.model_extra or {})
    except APIError as error:
        raise invalid(f"options.{error.message}", f"options.{error.param}") from None
    fields = {name: getattr(options, name) for name in _SAME}
    fields["repetition_penalty"] = options.repeat_penalty
    fields["max_tokens"] = options.num_predict if (options.num_predict or 0) > 0 else None
    if options.repeat_last_n not in (None, -1):
        penalties = (options.presence_penalty or 0, options.frequency_penalty or 0, (options.repeat_penalty or 1) - 1)
        if any(penalties):
            param = "options.repeat_last_n"
            raise invalid(f"{param}: penalties look at the whole text here; leave it out, or say -1.", param)
    return fields


def _messages(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """With ids for calls that have none, and for their results by name and order: some templates print them."""
    result = []
    open_calls: list[tuple[str, str]] = []  # (name, id) of the last message with calls, whose result has not come
    for index, message in enumerate(messages):
        item: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            item["reasoning_content"] = message.thinking
        if message.tool_calls:
            item["tool_calls"], open_calls = [], []
            for place, call in enumerate(message.tool_calls):
                call_id = (
                    call.id or f"call{index:02d}{place:03d}"
                )  # nine letters and digits, as Mistral's templates want
                open_calls.append((call.function.name, call_id))
                arguments = call.function.arguments or {}
                check_values(arguments, f"messages.{index}.tool_calls.{place}")
                function = {"name": call.function.name, "arguments": to_json(arguments)}
                item["tool_calls"].append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool":
            found = next((call for call in open_calls if message.tool_name in (None, call[0])), None)
            if found is not None:
                open_calls.remove(found)
            item["tool_call_id"] = message.tool_call_id or (found[1] if found else None)
            item["name"] = message.tool_name or (found[0] if found else None)
        result.append(item)
    return result
