"""Request bodies. Types are strict: a bool is no int, a float no int, NaN and infinity are refused by the JSON parser.

Fields that nobody here knows are accepted (and logged once), except those in `UNSUPPORTED`: ignoring them would change
the answer, so they are refused by name.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import WithJsonSchema

from server.api.errors import APIError, from_validation, invalid

logger = logging.getLogger(__name__)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[
    str | int | float,
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "number"}],
            "examples": ["auto", "24L", 24, "75%", 0.75, "110M", "student", "teacher"],
        }
    ),
]
Positive = Annotated[float, Field(gt=0, le=1e12)]

# field -> values that mean "not used"
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_embeds": (None,),
    "logprob_token_ids": (None, []),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "thinking_token_budget": (None,),
    "stop_regex": (None, []),
    "mirostat": (None, 0),
    "typical_p": (None, 1, 1.0),
    "tfs_z": (None, 1, 1.0),
    "xtc_probability": (None, 0, 0.0),
    "dry_multiplier": (None, 0, 0.0),
    "lora_request": (None,),
    "lora_path": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "grammar": (None, ""),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
}
_seen_unknown: set[str] = set()


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), populate_by_name=True)


T = TypeVar("T", bound=Body)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SLO(Body):
    """Limits from arrival, in milliseconds."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None


class ScheduledSize(Body):
    """One leg of `size_schedule`: this size for so many output tokens (the last one: until the end)."""

    model_config = ConfigDict(strict=True, extra="forbid")
    size: Size
    tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None


class JSONSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice", "structural_tag"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's extra: exactly one of these constrains the text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class SizeFields(Body):
    """How a caller chooses the size; the same on every endpoint that generates."""

    size: Size | None = Field(default=None, description="auto, 24L, 24, 75%, 0.75, 110M, student or teacher")
    min_size: Size | None = Field(default=None, description="smallest size that may answer")
    max_size: Size | None = Field(default=None, description="largest size that may answer")
    memory_budget_mb: Positive | None = Field(
        default=None, description="largest size whose own weights plus KV for prompt and max_tokens fit, in MiB"
    )
    slo: SLO | None = Field(default=None, description="latency limits")
    slo_policy: Literal["best_effort", "strict"] | None = Field(
        default=None, description="serve at the floor, or refuse, when a limit cannot be met now"
    )
    size_schedule: Annotated[list[ScheduledSize], Field(max_length=64)] | None = Field(
        default=None, description="sizes in turn, by output tokens"
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(default=None, description="lower runs first")


class SamplingFields(SizeFields):
    """Fields that completions and chat share."""

    model: str | None = Field(default=None, description="NAME, or NAME:24L for a size")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="keep the last so many prompt tokens; -1: as many as the context holds"
    )
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    user: str | None = None


Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt = Field(description="text, texts, token ids, or lists of token ids")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None


class ContentPart(Body):
    type: str
    text: str | None = None


class ToolCallFunction(Body):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolCallFunction


class ChatMessage(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class NamedToolFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedToolFunction


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object, or APIError. orjson refuses NaN, infinities, lone surrogates, bad UTF-8 and deep nesting."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    return value


def parse_body(model: type[T], raw: bytes) -> T:
    """Validate a request body; APIError 400 names the parameter."""
    try:
        body = model.model_validate(parse_json(raw))
    except ValidationError as error:
        raise from_validation(error) from None
    if body.model_extra:
        check_extra(body.model_extra)
    return body


def check_extra(extra: dict[str, Any]) -> None:
    """Refuse unsupported fields that would change the answer; log other unknown ones once."""
    for name, value in extra.items():
        neutral = UNSUPPORTED.get(name)
        if neutral is not None:
            # `in` would call True equal to 1.
            if not any(value == ok and type(value) is type(ok) for ok in neutral):
                raise APIError(f"{name} is not supported.", param=name, code="unsupported_parameter")
        elif name not in _seen_unknown and len(_seen_unknown) < 1000:
            _seen_unknown.add(name)
            logger.info("ignoring unknown request field %r", name[:100])
