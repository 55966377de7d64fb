"""/v1/chat/completions: a template turns the conversation into a prompt, the rest is completion in another shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat_template import ChatTemplate, TemplateError
from server.api.errors import APIError, invalid
from server.api.generation import Delta, Generation, PromptInput
from server.api.grammar import grammar_factory
from server.api.logprobs import LogprobFormatter
from server.api.protocol import ChatCompletionRequest, TokenizeRequest
from server.api.serving import (
    Plan,
    created_now,
    encode_prompt,
    json_response,
    read_body,
    respond,
    truncate,
)
from server.api.sse import DONE, event
from server.api.state import ServerState
from server.api.tools import ToolStream, ToolUse, plain_messages


async def create_chat_completion(request: Request, state: ServerState) -> Response:
    body = await read_body(request, ChatCompletionRequest, state)
    carried = request.scope["state"]
    state.admission.check(carried["tenant"].name)
    call = ChatCall(state, body, body.request_id or carried["request_id"])
    prompt = await call.prompt()
    plan = Plan(
        state=state,
        body=body,
        request_id=call.id,
        arrival_time=carried["arrival_time"],
        tenant=carried["tenant"],
        headers=request.headers,
        num_logprobs=call.num_logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        max_tokens_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        grammar=await grammar_factory(body, state, call.tools.schema()),
    )
    plan.check_streaming()
    generation = plan.build([prompt])
    return await respond(request, generation, bool(body.stream), call.whole, call.events)


def chat_template(body: ChatCompletionRequest | TokenizeRequest, state: ServerState) -> ChatTemplate:
    """The model's template, or the request's own where the operator trusts those."""
    if body.chat_template is not None:
        if not state.settings.trust_request_chat_template:
            raise invalid("chat_template is not accepted here (--trust-request-chat-template).", "chat_template")
        try:
            return ChatTemplate(body.chat_template, state.tokenizer.special_tokens)
        except TemplateError as error:
            raise invalid(str(error), "chat_template") from None
    if state.tokenizer.chat_template is None:
        raise invalid("This model has no chat template; use /v1/completions or start with --chat-template.", "messages")
    return state.tokenizer.chat_template


def render(
    body: ChatCompletionRequest | TokenizeRequest, template: ChatTemplate, tools: list[dict[str, Any]] | None
) -> str:
    """The prompt text. 400 if the template refuses the conversation."""
    continue_final = bool(body.continue_final_message)
    add_prompt = body.add_generation_prompt
    if continue_final and add_prompt:
        raise invalid("continue_final_message and add_generation_prompt exclude each other.", "continue_final_message")
    options = dict(body.chat_template_kwargs or {})
    if reserved := {"messages", "tools", "documents", "add_generation_prompt"} & options.keys():
        raise invalid(f"chat_template_kwargs must not set {sorted(reserved)[0]}.", "chat_template_kwargs")
    try:
        return template.render(
            plain_messages(body.messages),
            add_generation_prompt=not continue_final if add_prompt is None else add_prompt,
            continue_final_message=continue_final,
            tools=tools,
            documents=getattr(body, "documents", None),
            **options,
        )
    except TemplateError as error:
        raise invalid(f"messages: {error}", "messages") from None


class ChatCall:
    """One call: its prompt and how its answer is written."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest, request_id: str) -> None:
        self.state = state
        self.body = body
        self.id = f"chatcmpl-{request_id}"
        self.created = created_now()
        self.role = state.settings.response_role
        if body.echo:
            raise APIError("echo is not supported here.", param="echo", code="unsupported_parameter")
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        most = state.settings.max_logprobs
        if body.top_logprobs is not None and most != -1 and not 0 <= body.top_logprobs <= most:
            raise invalid(f"top_logprobs is {body.top_logprobs}; 0 to {most} are allowed here.", "top_logprobs")
        if body.max_completion_tokens is not None and body.max_tokens not in (None, body.max_completion_tokens):
            raise invalid("max_tokens and max_completion_tokens disagree.", "max_completion_tokens")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(body, name) == 0:
                raise invalid(f"{name} must be at least 1.", name)
        self.num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.template = chat_template(body, state)
        self.tools = ToolUse(body.tools, body.tool_choice, self.template)
        self.format = LogprobFormatter(
            state.tokenizer, self.num_logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )

    async def prompt(self) -> PromptInput:
        body, state = self.body, self.state
        text = render(body, self.template, self.tools.for_template())
        is_cut = body.truncate_prompt_tokens is not None
        prompt = await encode_prompt(text, bool(body.add_special_tokens), state, "messages", is_cut)
        prompt.token_ids = truncate(prompt.token_ids, body.truncate_prompt_tokens, state.catalog.max_model_len)
        return prompt

    # --- one answer

    async def whole(self, generation: Generation) -> Response:
        parts: list[list[Delta]] = [[] for _ in generation.sequences]
        async for delta in generation.deltas():
            parts[delta.index].append(delta)
        choices = [self._choice(index, deltas) for index, deltas in enumerate(parts)]
        answer = self._envelope(generation, "chat.completion")
        answer |= {"choices": choices, "usage": generation.usage()}
        first = generation.sequences[0]
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self.format.prompt(first.prompt_logprobs or [])
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = first.request.prompt_token_ids
        return json_response(answer, generation.headers())

    def _choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        last = deltas[-1]
        content, calls = self.tools.read("".join(delta.text for delta in deltas))
        message: dict[str, Any] = {"role": self.role, "content": content}
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": "tool_calls" if calls and last.finish_reason == "stop" else last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if self.num_logprobs is not None:
            choice["logprobs"] = self.format.chat([entry for delta in deltas for entry in delta.logprobs or ()])
        if self.body.return_token_ids:
            choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return choice

    def _envelope(self, generation: Generation, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": generation.model_id,
            "system_fingerprint": self.state.model.fingerprint,
            "size": generation.size_summary(),
        }

    # --- a stream

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        options = self.body.stream_options
        with_usage = self.state.settings.enable_force_include_usage or bool(options and options.include_usage)
        every_usage = bool(options and options.continuous_usage_stats) and with_usage
        envelope = self._envelope(generation, "chat.completion.chunk")
        is_plain = not (self.num_logprobs is not None or self.body.return_token_ids or every_usage)
        # Everything but the text is the same in every plain chunk of a choice: written once.
        head = b"data: " + orjson.dumps(envelope)[:-1]
        heads = [head + b',"choices":[{"index":%d,"delta":{"content":' % s.index for s in generation.sequences]
        tail = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        tools = [ToolStream(self.tools) for _ in heads] if self.tools.is_active else None
        has_begun = [False] * len(heads)
        async for delta in generation.deltas():
            index, text = delta.index, delta.text
            calls: list[dict[str, Any]] = []
            if not (text or delta.token_ids or delta.finish_reason):
                continue
            if tools is not None:
                text = tools[index].push(text)
                if delta.finish_reason:
                    rest, calls = tools[index].finish()
                    text += rest
            # The role goes out with the first token: clients take the first chunk's time for time to first token.
            prefix = b""
            if not has_begun[index]:
                has_begun[index] = True
                prefix = self._role_event(envelope, generation, index, every_usage)
            if is_plain and not delta.finish_reason:
                if text or prefix:
                    yield prefix + (heads[index] + orjson.dumps(text) + tail if text else b"")
                continue
            yield prefix + self._chunk(envelope, generation, delta, text, calls, every_usage)
        if with_usage:
            yield event(envelope | {"choices": [], "usage": generation.usage()})
        yield DONE

    def _role_event(self, envelope: dict[str, Any], generation: Generation, index: int, with_usage: bool) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": self.role, "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = envelope | {"choices": [choice]}
        if self.body.return_token_ids:
            chunk["prompt_token_ids"] = generation.sequences[index].request.prompt_token_ids
        if with_usage:
            chunk["usage"] = generation.usage()
        return event(chunk)

    def _chunk(
        self,
        envelope: dict[str, Any],
        generation: Generation,
        delta: Delta,
        text: str,
        calls: list[dict[str, Any]],
        with_usage: bool,
    ) -> bytes:
        finish = "tool_calls" if calls and delta.finish_reason == "stop" else delta.finish_reason
        change: dict[str, Any] = {"content": text} if text or not finish else {}
        if calls:
            change["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": change,
            "logprobs": None,
            "finish_reason": finish,
        }
        if finish:
            choice["stop_reason"] = delta.stop_reason
        if self.num_logprobs is not None and delta.token_ids:
            choice["logprobs"] = self.format.chat(list(delta.logprobs or ()))
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        chunk = envelope | {"choices": [choice]}
        if with_usage:
            chunk["usage"] = generation.usage()
        return event(chunk)
