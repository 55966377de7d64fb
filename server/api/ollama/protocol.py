"""Bodies of Ollama's API. Fields that say how a model lies in memory change no answer and are taken as they come."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.chat.protocol import ToolFunction
from server.api.embeddings.protocol import VectorFields
from server.api.generate.protocol import CacheSalt, SizeFields
from server.api.http.body import MAX_MESSAGES, MAX_PARTS, AtMost, Body

_MEMORY = "ignored: what lies in memory was decided at the start"


class OllamaOptions(Body):
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="0: greedy; default: the model's"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="nucleus; default: the model's")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="as for chat")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(default=None, description="-1: none")
    stop: str | Annotated[list[str], AtMost(1024)] | None = Field(default=None, description="texts that end the answer")
    num_predict: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        default=None, description="most tokens to generate; 0 or less: what the context holds"
    )
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="`repetition_penalty`, over prompt and answer"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(default=None, description="as for chat")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(default=None, description="as for chat")
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="-1: penalties look at everything; with a penalty nothing else is taken"
    )
    penalize_newline: Literal[True] | None = Field(default=None, description="line breaks are no exception")
    num_ctx: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="ignored: every request has the whole context"
    )
    num_keep: int | None = Field(default=None, description="ignored: nothing of a conversation is dropped")
    num_batch: int | None = Field(default=None, description=_MEMORY)
    num_gpu: int | None = Field(default=None, description=_MEMORY)
    main_gpu: int | None = Field(default=None, description=_MEMORY)
    num_thread: int | None = Field(default=None, description=_MEMORY)
    use_mmap: bool | None = Field(default=None, description=_MEMORY)


class OllamaRequest(SizeFields):
    """What chat and generate share."""

    model: Annotated[str, Field(min_length=1)] = Field(description="NAME, NAME:latest, or NAME:24L for a size")
    stream: bool | None = Field(default=None, description="a JSON object per line as tokens come; default true")
    format: dict[str, Any] | Literal["", "json"] | None = Field(
        default=None, description="json, or a JSON schema: constrains the text"
    )
    options: OllamaOptions | None = Field(default=None, description="how tokens are drawn")
    think: bool | str | None = Field(
        default=None, description="whether to reason first; a text is the effort; default: if the model can"
    )
    logprobs: bool | None = Field(default=None, description="log-probability of every generated token")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="and of so many likeliest ones"
    )
    cache_salt: CacheSalt | None = Field(default=None, description="as for chat")
    keep_alive: float | str | None = Field(default=None, description="ignored: the pair stays loaded")
    truncate: bool | None = Field(default=None, description="ignored: a prompt that is too long is refused")
    shift: bool | None = Field(default=None, description="ignored: an answer ends where the context does")


class OllamaFunctionCall(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] | None = None


class OllamaToolCall(Body):
    function: OllamaFunctionCall
    id: str | None = None


class OllamaMessage(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | None = None
    thinking: str | None = Field(default=None, description="of an assistant's message")
    tool_calls: Annotated[list[OllamaToolCall], AtMost(128)] | None = Field(default=None, description="the same")
    tool_name: str | None = Field(default=None, description="of a tool's message")
    tool_call_id: str | None = Field(default=None, description="the same")
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="text only")


class OllamaTool(Body):
    type: Literal["function"] | None = None
    function: ToolFunction


class OllamaChatRequest(OllamaRequest):
    written_mark = b"tool_calls"

    messages: Annotated[list[OllamaMessage], AtMost(MAX_MESSAGES, MAX_PARTS)] | None = Field(
        default=None, description="the conversation; none: whether the model is there"
    )
    tools: Annotated[list[OllamaTool], AtMost(128)] | None = Field(default=None, description="functions to call")


class OllamaGenerateRequest(OllamaRequest):
    prompt: str | None = Field(default=None, description="a user's message; none: whether the model is there")
    system: str | None = Field(default=None, description="system prompt")
    raw: bool | None = Field(default=None, description="continue the prompt as it is, without template")
    suffix: Literal[""] | None = Field(default=None, description="not offered")
    template: Literal[""] | None = Field(default=None, description="not offered: templates are the model's own")
    context: Annotated[list[int], Field(max_length=0)] | None = Field(
        default=None, description="not offered: nothing is stored; use chat"
    )
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="text only")


class OllamaShowRequest(Body):
    model: str | None = Field(default=None, description="as for chat")
    name: str | None = Field(default=None, description="the older name of model")
    verbose: bool | None = Field(default=None, description="ignored")


class OllamaVectorFields(VectorFields):
    model: Annotated[str, Field(min_length=1)] = Field(description="as for chat")
    options: OllamaOptions | None = Field(default=None, description="ignored: nothing is drawn")
    keep_alive: float | str | None = Field(default=None, description="ignored: the pair stays loaded")


class OllamaEmbedRequest(OllamaVectorFields):
    input: str | Annotated[list[str], AtMost(65_536)] | None = Field(
        default=None, description="text or texts; none: whether the model is there"
    )
    truncate: bool | None = Field(default=None, description="false: refuse a text that is too long; default: cut it")


class OllamaEmbeddingsRequest(OllamaVectorFields):
    prompt: str | None = Field(default=None, description="a text; none: whether the model is there")
