"""One settings object: every field below is a flag, an environment variable and a YAML key.

The fields are the only table there is: flags, help, completion, variables, YAML keys and checks come from it
(server/options.py). Order of precedence: flag > environment > YAML > default.
"""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


def parse_bytes(text: str | int) -> int:
    """`2GiB`, `512M` (binary), `1GB` (decimal), `4096` -> bytes. ValueError otherwise."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a number of bytes (like 2GiB, 512MiB or 1000000)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def option(
    default: Any, help: str, *, group: str, minimum: float | None = None, maximum: float | None = None,
    aliases: tuple[str, ...] = (), guards: bool = False,
) -> Any:  # fmt: skip
    """A field of `Settings`. `aliases`: further names of its flag; `guards`: given, it must not be empty."""
    extra: dict[str, Any] = {"group": group, "aliases": list(aliases), "guards": guards}
    return Field(default, description=help, ge=minimum, le=maximum, json_schema_extra=extra)


def extras(field: FieldInfo) -> dict[str, Any]:
    """What `option` noted beside pydantic's own facts."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def kind_of(field: FieldInfo) -> Any:
    """The type of a field that was given: `X` of `X | None`, `Bytes` for what `parse_bytes` reads."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return Bytes if any(isinstance(item, BeforeValidator) for item in field.metadata) else kind


class Settings(BaseModel):
    """What the operator decided. Frozen after start; a value of None means: decided by the machine or the model."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """What variables and YAML say in their own ways. ValueError for what would be taken for something else."""
        field = cls.model_fields[str(info.field_name)]
        kind = kind_of(field)
        if isinstance(value, str) and get_origin(kind) is tuple:
            value = value.split(",")
        if isinstance(value, list | tuple):
            value = tuple(item for part in value if (item := str(part).strip()))
        if extras(field).get("guards") and value is not None and not value:
            raise ValueError("given, but empty")  # taken as "none", it would open the server without a word
        if value is None or (value == "" and field.default is None):
            return field.default
        if kind is bool:
            return value if value != "" else False
        if isinstance(value, bool):
            if kind is str or get_origin(kind) is Literal:
                return "on" if value else "off"  # as YAML reads on and off
            raise ValueError(f"{value} is not a number")
        return value

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ValueError("--ssl-keyfile and --ssl-certfile are needed together")
        return self

    # --- HTTP server
    host: str = option("0.0.0.0", "address to listen on", group="server")
    port: int = option(8000, "port to listen on; 0 lets the system pick one", group="server", minimum=0, maximum=65535)
    metrics_port: int | None = option(
        None,
        "serve /metrics, /health and /live on this port, from a thread of their own; /metrics is then nowhere else",
        group="server",
        minimum=0,
        maximum=65535,
    )
    uds: str | None = option(None, "listen on this Unix socket instead of a port", group="server")
    root_path: str = option("", "path prefix that a proxy in front strips", group="server")
    ssl_keyfile: str | None = option(None, "TLS private key (PEM)", group="server")
    ssl_certfile: str | None = option(None, "TLS certificate chain (PEM)", group="server")
    ssl_ca_certs: str | None = option(
        None, "CA certificates (PEM); with them only clients with a certificate of theirs may connect", group="server"
    )
    allowed_origins: tuple[str, ...] = option(("*",), "CORS origins", group="server")
    allowed_methods: tuple[str, ...] = option(("*",), "CORS methods", group="server")
    allowed_headers: tuple[str, ...] = option(("*",), "CORS request headers", group="server")
    allow_credentials: bool = option(False, "CORS: let browsers send credentials", group="server")
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = option(
        "info",
        "log level of the server",
        group="server",
    )
    log_format: Literal["text", "json"] = option(
        "text",
        "log lines as text or as JSON objects",
        group="server",
    )
    access_log: bool = option(True, "one log line per HTTP request", group="server")
    disable_access_log_for_endpoints: tuple[str, ...] = option(
        ("/health", "/metrics", "/ping", "/load"), "paths without an access log line", group="server"
    )
    enable_request_id_headers: bool = option(True, "send X-Request-Id with every answer", group="server")
    disable_fastapi_docs: bool = option(False, "no /docs, /redoc and /openapi.json", group="server")
    shutdown_timeout: float = option(
        30.0,
        "seconds that running requests get to finish after SIGTERM (0: abort them at once)",
        group="server",
        minimum=0,
    )
    stalled_client_timeout: float = option(
        60.0, "seconds after which a client that reads nothing of its answer is dropped", group="server", minimum=1
    )

    # --- security
    api_key: tuple[str, ...] = option((), "accepted API keys; none: no authentication", group="security", guards=True)
    api_key_file: str | None = option(
        None,
        "file with one API key per line, or a YAML list of {key, tenant, ...}; read again on SIGHUP",
        group="security",
        guards=True,
    )
    share_prefix_cache: bool = option(
        False, "one prefix cache for all API keys: a key can then tell what others have sent", group="security"
    )

    # --- model
    teacher: str | None = option(None, "teacher: store name, hub id, folder or GGUF file", group="model")
    student: str | None = option(
        None,
        "student: hub id or folder; none: the teacher alone; make: made here in idle cycles, its sizes appear as they "
        "come [a known pair's, else the newest that was made here, else the teacher alone]",
        group="model",
    )
    max_kl: float = option(1.0, "--student make: the most KL of a size that is offered, nats per token", group="model")
    make_minutes: float = option(20.0, "--student make: how long it may keep the machine busy", group="model")
    make_tokens: int = option(
        150_000, "--student make: of the teacher's own text to make it from", group="model", minimum=1000
    )
    patch_order: Literal["last_to_first", "first_to_last"] | None = option(
        None,
        "order in which student layers give way to teacher blocks",
        group="model",
    )
    store: str | None = option(None, "folder of the local model store", group="model")
    served_model_name: tuple[str, ...] = option(
        (), "model ids to answer to; the first is the one reported", group="model"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "weights and KV",
        group="model",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="model")
    quantization: Literal["none", "int8", "q8", "q6", "q5", "q4"] | None = option(
        None,
        "none: matrices in --dtype; int8: of 8 bits, rounded when loaded, one scale per output channel; q8, q6, q5, "
        "q4: nested codes read at so many bits, made once and kept in the store; not given: a GGUF file's own codes, "
        "--dtype for other checkpoints",
        group="model",
    )
    precision_dial: Literal["auto", "on", "off"] = option(
        "auto",
        "whether requests choose how many bits of the weights they read, from one copy. on: nested codes, made "
        "once and kept in the store; auto: where the store has them and a file's own codes are not used; off: never",
        group="model",
    )
    exact: Literal["auto", "on", "off"] = option(
        "auto",
        "whether the weights as loaded lie beside the codes of --precision-dial. off: 8 bits are the most that can be "
        "read, in less memory; auto: on if memory allows",
        group="model",
    )
    weight_compression: Literal["auto", "off"] = option(
        "auto",
        "auto: the native executor keeps bfloat16 weights in twelve bits, without loss; off: it keeps sixteen bits, "
        "which is faster from 16 requests on",
        group="model",
    )
    memory_budget: Bytes | None = option(
        None, "bytes of memory for weights; sizes that do not fit are not served", group="model"
    )
    low_rank: Literal["auto", "on", "off"] = option(
        "auto",
        "whether a low-rank student stays a difference to the teacher. on: least memory, cheapest mixes of sizes; "
        "off: expanded, fastest small sizes (beside a teacher in a file's codes: into Q5_1); auto: on if the expanded "
        "student does not fit --memory-budget",
        group="model",
    )
    chat_template: str | None = option(None, "Jinja chat template: a file or the text itself", group="model")
    trust_request_chat_template: bool = option(False, "let requests bring their own chat template", group="model")
    response_role: str = option("assistant", "role of the answers", group="model")
    tool_template: Literal["auto", "none"] = option(
        "auto",
        "auto: a chat template that knows no tools gets them described in Hermes' form; none: then tools are refused",
        group="model",
    )
    generation_config: Literal["auto", "none"] = option(
        "auto",
        "auto: sampling defaults come from the model's generation_config.json; none: temperature 1 and no cuts",
        group="model",
    )
    override_generation_config: str | None = option(
        None, 'JSON object of sampling defaults, such as {"temperature": 0.2}', group="model"
    )
    default_max_tokens: int | None = option(
        None, "max_tokens of chats that leave it out; 0: what the context holds [1024 for the default pair, else 0]",
        group="model", minimum=0,
    )  # fmt: skip
    echo_requested_model: bool = option(
        False, "answers name the model as it was asked for; the size stands in `size` and the header", group="model"
    )

    # --- engine
    max_model_len: int | None = option(
        None, "longest prompt plus output, in tokens [model's own, at most 8192]", group="engine", minimum=1
    )
    max_num_seqs: int | None = option(
        None, "sequences running at once [64 on CPU, 256 on CUDA]", group="engine", minimum=1
    )
    max_num_batched_tokens: int | None = option(
        None, "tokens of one step [1024 on CPU, 8192 on CUDA]", group="engine", minimum=1
    )
    kv_cache_memory: Bytes | None = option(
        None, "bytes of KV cache [a share of what is free, capped]", group="engine", minimum=1
    )
    kv_cache_dtype: Literal["auto", "int8"] = option(
        "auto",
        "keys and values; auto: in --dtype; int8: in 8 bits with scales per token and head, about half the memory "
        "(not on cuda)",
        group="engine",
    )
    size_change_memory: Bytes | None = option(
        None, "bytes of hidden states that make a change of size cheaper; 0: none [a sixteenth of the KV cache]",
        group="engine", minimum=0,
    )  # fmt: skip
    gpu_memory_utilization: float = option(
        0.9, "share of GPU memory for weights and KV together", group="engine", minimum=0.05, maximum=1.0
    )
    page_size: int = option(
        32, "tokens per KV page", group="engine", minimum=1, maximum=1024, aliases=("--block-size",)
    )
    enable_prefix_caching: bool = option(True, "keep KV of finished prefixes for reuse", group="engine")
    executor: Literal["auto", "cuda", "native", "torch"] = option(
        "auto",
        "which executor computes steps; auto: the first that can",
        group="engine",
    )
    enforce_eager: bool = option(False, "record no CUDA graphs", group="engine")
    speculative_size: str = option(
        "off",
        "what guesses tokens for larger sizes: a size, auto (the smallest), a precision of the request's own layers "
        "(q4, with --precision-dial), both (24L-q4), or off; the server guesses only where it predicts that it pays",
        group="engine",
    )
    num_speculative_tokens: int = option(3, "tokens guessed ahead, at most", group="engine", minimum=1, maximum=16)
    seed: int = option(0, "seed for requests without one", group="engine")
    num_threads: int | None = option(
        None, "CPU threads for the model [this replica's share of the cores, within its container's quota]",
        group="engine", minimum=1,
    )  # fmt: skip
    max_replicas: int = option(
        1,
        "replicas that may run on this machine: the defaults of --kv-cache-memory and --num-threads are one's share of "
        "its memory and cores (limits of a container are its own)",
        group="engine",
        minimum=1,
    )

    step_timeout: float = option(
        300.0,
        "seconds after which a step counts as hung: the process then says where it hangs and exits",
        group="engine",
        minimum=1,
    )

    sleep_after: float | None = option(
        None,
        "seconds without requests after which weights that only larger sizes need are given back to the system; the "
        "smallest size goes on answering, and they are read again once somebody wants them",
        group="engine",
        minimum=0.1,
    )
    enable_sleep_mode: bool = option(
        False, "POST /sleep and /wake, also without --sleep-after; whoever has a key may call them", group="engine"
    )

    # --- size choice
    size: str = option(
        "auto", "size of requests that name none: auto, 24L, 24L-q6, 75%, 110M, student, ...", group="sizes"
    )
    min_size: str | None = option(None, "smallest size served", group="sizes")
    max_size: str | None = option(None, "largest size served", group="sizes")
    precision: str = option(
        "auto", "precision where a request names no size and no precision: auto, exact, q8, q6, ...", group="sizes"
    )
    min_precision: str | None = option(None, "narrowest precision served", group="sizes")
    max_precision: str | None = option(None, "widest precision served", group="sizes")
    workload: str = option(
        "worst", "kind of text whose measured quality auto goes by; worst: that on which a size is worst", group="sizes"
    )
    slo_ttft_ms: float | None = option(None, "default limit on time to first token", group="sizes", minimum=0)
    slo_tpot_ms: float | None = option(None, "default limit on time per output token", group="sizes", minimum=0)
    slo_e2e_ms: float | None = option(None, "default limit on total time", group="sizes", minimum=0)
    slo_policy: Literal["best_effort", "strict"] = option(
        "best_effort",
        "if a limit cannot be met: serve at the size that comes closest (best_effort), or refuse (strict)",
        group="sizes",
    )
    memory_budget_mb: float | None = option(
        None, "default limit on a request's own weights plus KV, in MiB", group="sizes", minimum=0
    )
    priority: int = option(0, "priority of requests that name none; lower runs first", group="sizes")
    size_policy: Literal["auto", "largest"] = option(
        "auto",
        "how auto picks: by load and latency, or largest",
        group="sizes",
    )

    # --- limits
    max_num_queued_reqs: int | None = option(
        1024, "waiting requests before new ones get 503 (0: no limit)", group="limits", minimum=0
    )
    max_num_queued_tokens: int | None = option(
        None, "waiting prompt tokens before new requests get 503", group="limits", minimum=0
    )
    max_logprobs: int = option(20, "largest logprobs / top_logprobs", group="limits", minimum=-1)
    max_body_bytes: Bytes = option(4 * MiB, "largest request body", group="limits", minimum=1)
    max_completion_prompts: int = option(1024, "prompts in one request", group="limits", minimum=1)
    max_n: int = option(128, "largest n", group="limits", minimum=1)
    max_stop_strings: int = option(64, "stop strings in one request", group="limits", minimum=0)
    max_stop_length: int = option(1024, "characters in one stop string", group="limits", minimum=1)
    max_grammar_bytes: Bytes = option(64 * KiB, "largest schema, regex or grammar", group="limits", minimum=1)
    max_request_seconds: float | None = option(
        None, "deadline of a request, after which it is aborted", group="limits", minimum=0
    )
    max_logprob_entries: int = option(
        2_000_000, "log-probabilities in one answer: positions times (1 + logprobs)", group="limits", minimum=1
    )
    max_concurrent_per_key: int | None = option(None, "requests in flight per API key", group="limits", minimum=1)
    max_requests_per_minute_per_key: int | None = option(
        None, "requests per minute and API key", group="limits", minimum=1
    )
    max_sequences_per_minute_per_key: int | None = option(
        None, "sequences (prompts times n) per minute and API key", group="limits", minimum=1
    )
    max_tokens_per_minute_per_key: int | None = option(
        None, "prompt and requested output tokens per minute and API key", group="limits", minimum=1
    )

    # --- reporting
    enable_force_include_usage: bool = option(False, "send usage in every stream", group="reporting")
    disable_log_stats: bool = option(False, "no log line every ten seconds of how much is served", group="reporting")
    enable_per_request_metrics: bool = option(
        False, "put queue time, time to first token and speed into every answer (`metrics`)", group="reporting"
    )
    metrics_legacy_names: bool = option(False, "also export metric names that vLLM has dropped", group="reporting")
    otlp_traces_endpoint: str | None = option(
        None, "send OpenTelemetry traces there, e.g. http://collector:4318/v1/traces (extra `otel`)", group="reporting"
    )
    otlp_metrics_endpoint: str | None = option(
        None, "send OpenTelemetry GenAI metrics there, e.g. http://collector:4318/v1/metrics", group="reporting"
    )


GROUPS = {
    "server": "HTTP server",
    "security": "Security",
    "model": "Model",
    "engine": "Engine",
    "sizes": "Size choice",
    "limits": "Limits",
    "reporting": "Reporting",
}
