"""Fields that routes share: sizes, sampling, formats. The descriptions are the reference in docs/api.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.json_schema import WithJsonSchema

from server.api.http.body import AtMost, Body

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[
    str | int | float,
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "number"}],
            "examples": ["auto", "24L", "24L-q6", 24, "75%", 0.75, "110M", "student", "teacher"],
        }
    ),
]
CacheSalt = Annotated[str, Field(max_length=1024)]
Positive = Annotated[float, Field(gt=0, le=1e12)]


class StreamOptions(Body):
    include_usage: bool | None = Field(default=None, description="a last chunk with usage and no choices")
    continuous_usage_stats: bool | None = Field(default=None, description="with include_usage: usage in every chunk")


class SLO(Body):
    """Limits from arrival, in milliseconds."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ttft_ms: Positive | None = Field(default=None, description="to the first token; header `x-slo-ttft-ms`")
    tpot_ms: Positive | None = Field(default=None, description="per further token; header `x-slo-tpot-ms`")
    e2e_ms: Positive | None = Field(default=None, description="to the last token")


class ScheduledSize(Body):
    """One leg of `size_schedule`: this size for so many output tokens (the last one: until the end)."""

    model_config = ConfigDict(strict=True, extra="forbid")
    size: Size = Field(description="as `size`, but not auto")
    tokens: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        default=None, description="output tokens of this leg; only the last may leave it out"
    )


class JSONSchemaFormat(Body):
    name: str | None = Field(default=None, description="ignored")
    description: str | None = Field(default=None, description="ignored")
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema", description="the JSON schema")
    strict: bool | None = Field(default=None, description="ignored: the schema always holds")


class Structure(Body):
    """A tag of `structural_tag`: after `begin`, text follows the schema up to `end`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    begin: Annotated[str, Field(min_length=1)] = Field(description="opens the tag; starts with a trigger")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema of what is inside")
    end: str = Field(description="closes the tag")


class ResponseFormat(Body):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"] = Field(
        description="what the text must be; the field of that name says more"
    )
    json_schema: JSONSchemaFormat | None = Field(default=None, description="for json_schema")
    regex: str | None = Field(default=None, description="for regex: the whole text matches it")
    choice: Annotated[list[str], AtMost(1000)] | None = Field(
        default=None, description="for choice: one of these texts"
    )
    grammar: str | None = Field(default=None, description="for grammar: Lark or GBNF")
    structures: Annotated[list[Structure], AtMost(128)] | None = Field(
        default=None, description="for structural_tag: the tags"
    )
    triggers: Annotated[list[str], AtMost(128)] | None = Field(
        default=None, description="for structural_tag: what starts a tag"
    )
    schema_: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="for json_object and json_schema: the schema, as llama.cpp has it"
    )


class StructuredOutputs(Body):
    """vLLM's extra: exactly one of these constrains the text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json", description="JSON schema")
    regex: str | None = Field(default=None, description="the whole text matches it")
    choice: Annotated[list[str], AtMost(1000)] | None = Field(default=None, description="one of these texts")
    grammar: str | None = Field(default=None, description="Lark or GBNF grammar")
    json_object: bool | None = Field(default=None, description="any JSON object")
    structural_tag: str | None = Field(default=None, description="JSON of a structural_tag response format")
    disable_any_whitespace: bool | None = Field(default=None, description="JSON without optional blanks")
    whitespace_pattern: str | None = Field(default=None, description="regex of the blanks in JSON")


class SizeFields(Body):
    """How a caller chooses the size; the same on every endpoint that generates."""

    size: Size | None = Field(default=None, description="auto, 24L, 24L-q6, 24, 75%, 0.75, 110M, student or teacher")
    min_size: Size | None = Field(default=None, description="smallest size that may answer")
    max_size: Size | None = Field(default=None, description="largest size that may answer")
    precision: str | None = Field(
        default=None, description="auto, exact, or bits of a weight as q8, q6; a size without one is exact"
    )
    min_precision: str | None = Field(default=None, description="narrowest precision that may answer")
    max_precision: str | None = Field(default=None, description="widest precision that may answer")
    workload: str | None = Field(
        default=None,
        description="kind of text whose measured quality auto goes by, or worst (the default): that of the worst kind",
    )
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
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        default=None, description="lower runs first; without keys only what is above `--priority` counts"
    )


class RepetitionDetection(Body):
    """vLLM's: an answer that ends in a pattern, so often repeated, ends with `repetition`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    max_pattern_size: Annotated[int, Field(ge=0, le=1024)] = Field(description="tokens of the longest; 0: off")
    min_pattern_size: Annotated[int, Field(ge=0, le=1024)] = Field(default=1, description="tokens of the shortest")
    min_count: Annotated[int, Field(ge=2, le=1024)] = Field(default=2, description="times it must stand there")


class SamplingFields(SizeFields):
    """Fields that completions and chat share."""

    model: str | None = Field(default=None, description="NAME, or NAME:24L for a size")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="most tokens to generate; completions: 16 if left out, chat: `--default-max-tokens`"
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="0: greedy; default: the model's"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="nucleus; default: the model's")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="least probability, relative to the likeliest token's"
    )
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(default=None, description="answers per prompt; default 1")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        default=None, description="the same seed gives the same text, in any batch but for rounding; -1: none"
    )
    stop: str | Annotated[list[str], AtMost(1024)] | None = Field(default=None, description="texts that end the answer")
    stop_token_ids: Annotated[list[TokenId], AtMost(1024)] | None = Field(
        default=None, description="tokens that end the answer"
    )
    include_stop_str_in_output: bool | None = Field(default=None, description="keep the stop text in the answer")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="no end of text before so many tokens"
    )
    ignore_eos: bool | None = Field(default=None, description="go on after the end-of-text token")
    repetition_detection: RepetitionDetection | None = Field(default=None, description="ends an answer that loops")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="taken off the logits of tokens that were generated"
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="the same, times how often"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="divides the logits of tokens seen in prompt or answer; 1: none"
    )
    logit_bias: Annotated[dict[str, float], AtMost(4096)] | None = Field(
        default=None, description="token id: -100 .. 100, added to its logit"
    )
    allowed_token_ids: Annotated[list[TokenId], AtMost(1 << 20)] | None = Field(
        default=None, description="nothing but these tokens"
    )
    bad_words: Annotated[list[str], AtMost(256)] | None = Field(
        default=None, description="words that must not be generated"
    )
    stream: bool | None = Field(default=None, description="send server-sent events as tokens come")
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")
    skip_special_tokens: bool | None = Field(default=None, description="leave special tokens out of text; default true")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="keep so many prompt tokens; -1: as many as the context holds"
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="which end of the prompt is cut; default left"
    )
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="so many likeliest tokens at every prompt position; -1: all; not with stream"
    )
    return_token_ids: bool | None = Field(default=None, description="add prompt_token_ids and token_ids")
    return_tokens_as_token_ids: bool | None = Field(default=None, description="logprobs name tokens `token_id:7`")
    response_format: ResponseFormat | None = Field(default=None, description="constrains the text")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="the same, as vLLM has it")
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="part of the answer's id; default: header `X-Request-Id`, or made up"
    )
    cache_salt: CacheSalt | None = Field(
        default=None, description="the prefix cache is shared only among requests with the same salt"
    )
    user: str | None = Field(default=None, description="ignored")
