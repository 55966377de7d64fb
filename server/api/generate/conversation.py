"""What every chat-like route shares: template, tools, prompt, and the answer as content and tool calls.

`/v1/chat/completions`, `/v1/messages` and `/v1/responses` differ in the shape of what goes in and out; each turns its
body into a `ChatCompletionRequest` and writes the `Piece`s of the answer in its own way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from server.api.chat.protocol import ChatCompletionRequest
from server.api.generate.chat_template import ChatTemplate, TemplateError
from server.api.generate.generation import Delta, Generation, PromptInput
from server.api.generate.grammar import grammar_factory
from server.api.generate.serving import Plan, encode_prompt, truncate
from server.api.generate.tools import ToolStream, ToolUse, plain_messages
from server.api.http.errors import invalid
from server.api.http.state import ServerState
from server.api.routes.protocol import TokenizeRequest


@dataclass(slots=True)
class Piece:
    """What is new for one choice. `calls` are whole; `finish_reason` is OpenAI's, `tool_calls` included."""

    index: int
    text: str
    calls: list[dict[str, Any]]
    delta: Delta
    finish_reason: str | None = None


@dataclass(slots=True)
class Answer:
    """One finished choice."""

    content: str | None
    calls: list[dict[str, Any]]
    finish_reason: str | None
    stop_reason: int | str | None
    deltas: list[Delta] = field(default_factory=list)


class Conversation:
    """One request's messages on their way to a prompt, and its answer on the way back."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest) -> None:
        """APIError for fields that contradict each other or that this model cannot follow."""
        self.state = state
        self.body = body
        if body.max_completion_tokens is not None and body.max_tokens not in (None, body.max_completion_tokens):
            raise invalid("max_tokens and max_completion_tokens disagree.", "max_completion_tokens")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(body, name) == 0:
                raise invalid(f"{name} must be at least 1.", name)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        most = state.settings.max_logprobs
        if body.top_logprobs is not None and most != -1 and not 0 <= body.top_logprobs <= most:
            raise invalid(f"top_logprobs is {body.top_logprobs}; 0 to {most} are allowed here.", "top_logprobs")
        self.num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.template = chat_template(body, state)
        self.tools = ToolUse(body.tools, body.tool_choice, self.template, body.parallel_tool_calls is not False)

    async def generation(self, request: Request, answer_id: str) -> Generation:
        """Everything checked and tokenised, ready to start."""
        body, carried = self.body, request.scope["state"]
        self.state.admission.check(carried["tenant"].name)
        prompt = await self.prompt()
        plan = Plan(
            state=self.state,
            body=body,
            request_id=answer_id,
            arrival_time=carried["arrival_time"],
            tenant=carried["tenant"],
            headers=request.headers,
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            max_tokens_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            grammar=await grammar_factory(body, self.state, self.tools.schema()),
        )
        plan.check_streaming()
        return plan.build([prompt])

    async def prompt(self) -> PromptInput:
        body, state = self.body, self.state
        text = render(body, self.template, self.tools.for_template())
        is_cut = body.truncate_prompt_tokens is not None
        prompt = await encode_prompt(text, bool(body.add_special_tokens), state, "messages", is_cut)
        prompt.token_ids = truncate(prompt.token_ids, body, state.catalog.max_model_len)
        return prompt

    # --- the answer

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer as it comes. Text that may yet turn out to be a call is held back."""
        streams = [ToolStream(self.tools) for _ in generation.sequences] if self.tools.is_active else None
        async for delta in generation.deltas():
            if not (delta.text or delta.token_ids or delta.finish_reason):
                continue
            text, calls = delta.text, []
            if streams is not None:
                text = streams[delta.index].push(text)
                if delta.finish_reason:
                    rest, calls = streams[delta.index].finish()
                    text += rest
            yield Piece(delta.index, text, calls, delta, _finish_reason(delta, calls))

    async def answers(self, generation: Generation) -> list[Answer]:
        """All choices, finished."""
        parts: list[list[Delta]] = [[] for _ in generation.sequences]
        async for delta in generation.deltas():
            parts[delta.index].append(delta)
        answers = []
        for deltas in parts:
            last = deltas[-1]
            content, calls = self.tools.read("".join(delta.text for delta in deltas))
            answers.append(Answer(content, calls, _finish_reason(last, calls), last.stop_reason, deltas))
        return answers


def _finish_reason(delta: Delta, calls: list[dict[str, Any]]) -> str | None:
    return "tool_calls" if calls and delta.finish_reason == "stop" else delta.finish_reason


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
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        options.setdefault("reasoning_effort", effort)
    try:
        return template.render(
            plain_messages(body.messages),
            add_generation_prompt=not continue_final if add_prompt is None else add_prompt,
            continue_final_message=continue_final,
            tools=tools,
            documents=getattr(body, "documents", None),
            variables=options,
        )
    except TemplateError as error:
        raise invalid(f"messages: {error}", "messages") from None
