"""What every chat-like route shares: template, tools, prompt, and the answer as content and tool calls.

`/v1/chat/completions`, `/v1/messages` and `/v1/responses` differ in the shape of what goes in and out; each turns its
body into a `ChatCompletionRequest` and writes the `Piece`s of the answer in its own way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.api.chat.protocol import ChatCompletionRequest
from server.api.generate.answer_parts import CallPart, Part, Reasoning, Text
from server.api.generate.answer_reader import AnswerReader
from server.api.generate.chat_template import ChatTemplate, TemplateError
from server.api.generate.generation import Delta, Generation
from server.api.generate.grammar import grammar_factory
from server.api.generate.history import plain_messages, with_tools_in_words
from server.api.generate.serving import encode_prompt, truncate
from server.api.generate.submission import Caller, OutputLimits, PromptInput, Submission
from server.api.generate.thought import THINK, THOUGHT
from server.api.generate.tools import ToolUse
from server.api.http.body import check_values
from server.api.http.errors import APIError, invalid
from server.api.http.state import ServerState
from server.api.routes.protocol import TokenizeRequest

_NO_NAMES: Mapping[str, str] = {}


@dataclass(slots=True)
class Piece:
    """What is new for one choice: `parts` in order. `finish_reason` is OpenAI's, `tool_calls` included."""

    index: int
    parts: list[Part]
    delta: Delta
    finish_reason: str | None = None


@dataclass(slots=True)
class Call:
    """A tool call of a finished answer; `arguments` are JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """One finished choice: what was said, thought and called, in order."""

    items: list[Text | Reasoning | Call] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    deltas: list[Delta] = field(default_factory=list)

    @property
    def content(self) -> str | None:
        """None where there are calls and nothing else."""
        text = "".join(item.text for item in self.items if isinstance(item, Text))
        return text or (None if self.calls else "")

    @property
    def reasoning(self) -> str:
        return "".join(item.text for item in self.items if isinstance(item, Reasoning))

    @property
    def calls(self) -> list[Call]:
        return [item for item in self.items if isinstance(item, Call)]

    def add(self, piece: Piece) -> None:
        self.deltas.append(piece.delta)
        for part in piece.parts:
            last = self.items[-1] if self.items else None
            if isinstance(part, CallPart):
                if part.id is not None:
                    self.items.append(Call(part.id, part.name or "", part.arguments))
                else:
                    self.calls[-1].arguments += part.arguments
            elif isinstance(part, Text) and isinstance(last, Text):
                self.items[-1] = Text(last.text + part.text)
            elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
                self.items[-1] = Reasoning(last.text + part.text)
            else:
                self.items.append(part)
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.delta.stop_reason


class Conversation:
    """One request's messages on their way to a prompt, and its answer on the way back."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest, names: Mapping[str, str] = _NO_NAMES) -> None:
        """APIError for fields that contradict each other or that this model cannot follow.

        `names`: what the caller's route calls `max_tokens`, `messages` and `response_format`, where it differs.
        """
        self.state = state
        self.body = body
        is_old_name = body.max_completion_tokens is None
        self.limit_param = names.get("max_tokens", "max_tokens" if is_old_name else "max_completion_tokens")
        self.prompt_param = names.get("messages", "messages")
        self.format_param = names.get("response_format")
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
        self.tools = ToolUse(
            body.tools,
            body.tool_choice,
            self.template,
            allows_several=body.parallel_tool_calls is not False,
            is_strict=state.settings.tool_template == "none",
        )
        self.default_max_tokens = state.sampling_defaults.max_new_tokens or None  # None: what the context holds
        self._has_thought_begun = False
        self._readers: dict[int, AnswerReader | None] = {}  # by choice
        self.num_reasoning_tokens = 0

    async def generation(self, caller: Caller, answer_id: str) -> Generation:
        """Everything checked and tokenised, ready to start."""
        body, state = self.body, self.state
        state.admission.check(caller.tenant)
        prompt = await self.prompt()
        try:
            grammar = await grammar_factory(body, state, self.tools, caller.tenant)
        except APIError as error:
            if self.format_param is not None:
                error.rename("response_format", self.format_param)
            raise
        limits = OutputLimits(
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            param=self.limit_param,
            prompt=self.prompt_param,
            default=self.default_max_tokens,
            logprobs=self.num_logprobs,
            prompt_logprobs=body.prompt_logprobs,
            repetition=None if grammar or body.ignore_eos else state.sampling_defaults.repetition_detection,
        )
        submission = Submission.build(
            state,
            caller,
            body,
            [prompt],
            answer_id=answer_id,
            limits=limits,
            grammar=grammar,
            marks=self._marks(),
        )
        return Generation(state, submission)

    async def prompt(self) -> PromptInput:
        body, state = self.body, self.state
        text = render(body, self.tools)
        self._has_thought_begun = self.template.thinks and text.rstrip().endswith(THINK)
        is_cut = None if body.truncate_prompt_tokens is None else body.truncation_side or "left"
        prompt = await encode_prompt(text, bool(body.add_special_tokens), state, self.prompt_param, is_cut)
        prompt.token_ids = truncate(prompt.token_ids, body, state.catalog.max_model_len)
        return prompt

    def _marks(self) -> dict[int, str]:
        """Special tokens that calls and reasoning are recognised by."""
        marks = self.tools.form.marks if self.tools.is_active else ()
        if self.template.thinks:
            marks = (*marks, THINK, THOUGHT)
        return self.state.tokenizer.special_marks(marks)

    # --- the answer

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer as it comes."""
        async for delta in generation.deltas():
            if (piece := self.read(delta)) is not None:
                yield piece

    def read(self, delta: Delta) -> Piece | None:
        """What a delta says; None if nothing. Text that may yet turn out to be a call is held back."""
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return None
        if delta.index not in self._readers:
            self._readers[delta.index] = self.tools.reader(self._has_thought_begun)
        reader, finish_reason = self._readers[delta.index], delta.finish_reason
        if reader is None:
            parts: list[Part] = [Text(delta.text)] if delta.text else []
        else:
            if reader.is_thinking:
                self.num_reasoning_tokens += len(delta.token_ids)
            parts = reader.push(delta.text)
            if finish_reason:
                is_cut = finish_reason != "stop" or isinstance(delta.stop_reason, str)
                parts += reader.finish(is_cut)
                if finish_reason == "stop" and reader.num_calls and not reader.is_partial:
                    finish_reason = "tool_calls"
        return Piece(delta.index, parts, delta, finish_reason)

    async def answers(self, generation: Generation) -> list[Answer]:
        """All choices, finished."""
        answers = [Answer() for _ in generation.sequences]
        async for piece in self.pieces(generation):
            answers[piece.index].add(piece)
        return answers

    def usage(self, generation: Generation) -> dict[str, Any]:
        """OpenAI's counts; with those of reasoning where the model does that."""
        usage = generation.usage()
        if self.template.thinks:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning_tokens}
        return usage


def chat_template(body: ChatCompletionRequest | TokenizeRequest, state: ServerState) -> ChatTemplate:
    """The model's template (that for tools, if the request has any), or the request's own where those are trusted."""
    if body.chat_template is not None:
        if not state.settings.trust_request_chat_template:
            raise invalid("chat_template is not accepted here (--trust-request-chat-template).", "chat_template")
        try:
            return ChatTemplate(body.chat_template, state.tokenizer.special_tokens)
        except TemplateError as error:
            raise invalid(str(error), "chat_template") from None
    tokenizer = state.tokenizer
    has_tools = bool(body.tools) and getattr(body, "tool_choice", None) != "none"
    template = tokenizer.tool_template if has_tools else tokenizer.chat_template
    if template is None:
        names = f" but named ones ({', '.join(tokenizer.template_names)})" if tokenizer.template_names else ""
        raise invalid(
            f"This model has no chat template{names}; use /v1/completions or start with --chat-template.", "messages"
        )
    return template


def render(body: ChatCompletionRequest | TokenizeRequest, tools: ToolUse) -> str:
    """The prompt text. 400 if the template refuses the conversation."""
    continue_final = bool(body.continue_final_message)
    add_prompt = body.add_generation_prompt
    if continue_final and add_prompt:
        raise invalid("continue_final_message and add_generation_prompt exclude each other.", "continue_final_message")
    options = dict(body.chat_template_kwargs or {})
    if reserved := {"messages", "tools", "documents", "add_generation_prompt"} & options.keys():
        raise invalid(f"chat_template_kwargs must not set {sorted(reserved)[0]}.", "chat_template_kwargs")
    for name in ("reasoning_effort", "enable_thinking"):
        if (value := getattr(body, name, None)) is not None:
            options.setdefault(name, value)
    documents = getattr(body, "documents", None)
    messages, described = plain_messages(body.messages or []), tools.for_template()
    for name, value in (("tools", described), ("documents", documents), ("chat_template_kwargs", options)):
        check_values(value or (), name)
    if tools.is_generic:
        messages, described = with_tools_in_words(messages, described), None
    try:
        return tools.template.render(
            messages,
            add_generation_prompt=not continue_final if add_prompt is None else add_prompt,
            continue_final_message=continue_final,
            tools=described,
            documents=documents,
            variables=options,
        )
    except TemplateError as error:
        raise invalid(f"messages: {error}", "messages") from None
