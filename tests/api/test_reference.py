"""docs/api.md says what the running server does: every field of every body is sent, once right and once wrong."""

from pathlib import Path

import httpx
import pytest

from server.api.chat.protocol import ChatCompletionRequest
from server.api.completions.protocol import CompletionRequest
from server.api.embeddings.protocol import EmbeddingsRequest
from server.api.http.body import UNSUPPORTED
from server.api.messages.protocol import MessagesRequest
from server.api.ollama.protocol import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from server.api.reference import main
from server.api.responses.protocol import ResponsesRequest
from server.api.routes.operations import POSTS
from server.api.routes.protocol import DetokenizeRequest, TokenizeRequest
from tests.api.tiny import NAME, ROOT

HELLO = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
WRONG = {"no field": "takes this"}  # an object with an unknown key

# What each path needs, and a value for every field it knows. A tuple: (value, further fields).
SIZE = {
    "size": "5L", "min_size": 4, "max_size": "100%", "precision": "exact", "min_precision": "q4",
    "max_precision": "exact", "workload": "worst", "memory_budget_mb": 100.0, "slo": {"e2e_ms": 60000},
    "slo_policy": "best_effort", "size_schedule": [{"size": "4L", "tokens": 2}, {"size": "5L"}], "priority": -1,
}  # fmt: skip
SAMPLING = SIZE | {
    "model": f"{NAME}:5L", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "n": 2,
    "seed": 7, "stop": ["x", "y"], "stop_token_ids": [9], "include_stop_str_in_output": True,
    "min_tokens": 1, "ignore_eos": True,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 2.0},
    "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 50},
    "allowed_token_ids": [5, 6], "bad_words": ["fox"], "stream": True, "stream_options": ({}, {"stream": True}),
    "skip_special_tokens": False, "truncate_prompt_tokens": 2, "truncation_side": "right", "prompt_logprobs": 1,
    "return_token_ids": True, "return_tokens_as_token_ids": True, "response_format": {"type": "text"},
    "structured_outputs": {"choice": ["a", "b"]}, "request_id": "mine", "cache_salt": "s", "user": "me",
}  # fmt: skip
TEMPLATE = {"add_special_tokens": True, "add_generation_prompt": True, "continue_final_message": True,
            "chat_template_kwargs": {"a": 1}, "tools": [TOOL], "chat_template": "{{ messages }}"}  # fmt: skip
OLLAMA = SIZE | {
    "model": f"{NAME}:5L", "stream": False, "format": {"type": "object"}, "options": {"temperature": 0.5},
    "think": False, "logprobs": True, "top_logprobs": 2, "keep_alive": "5m", "truncate": True, "shift": False,
    "cache_salt": "s",
}  # fmt: skip
VECTOR = SIZE | {"cache_salt": "s", "dimensions": 3, "size_schedule": None}
OLLAMA_VECTOR = {"model": f"{NAME}:5L", "options": {"num_ctx": 2048}, "keep_alive": 0}
CASES = {
    "/v1/completions": (
        CompletionRequest, {"prompt": "hi", "max_tokens": 2},
        SAMPLING | {"prompt": [5, 6], "echo": True, "logprobs": 1, "add_special_tokens": False},
    ),
    "/v1/chat/completions": (
        ChatCompletionRequest, {"messages": HELLO, "max_tokens": 2},
        SAMPLING | TEMPLATE | {
            "messages": HELLO, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": (1, {"logprobs": True}),
            "tool_choice": ("auto", {"tools": [TOOL]}), "parallel_tool_calls": False, "echo": True,
            "documents": [{"text": "a"}], "reasoning_effort": "low", "enable_thinking": True,
        },
    ),
    "/v1/messages": (
        MessagesRequest, {"messages": HELLO, "max_tokens": 2},
        SIZE | {
            "model": NAME, "messages": HELLO, "max_tokens": 3, "system": "x", "temperature": 0.5, "top_p": 0.9,
            "top_k": 3, "stop_sequences": ["x"], "stream": True, "seed": 1, "metadata": {"user_id": "me"},
            "cache_salt": "s",
            "service_tier": "auto",
            "tools": [{"name": "f", "input_schema": PARAMETERS}], "tool_choice": {"type": "auto"},
            "thinking": {"type": "disabled"}, "output_config": {"effort": "low"}, "thread": None,
        },
    ),
    "/v1/responses": (
        ResponsesRequest, {"input": "hi", "max_output_tokens": 2},
        SIZE | {
            "model": NAME, "input": HELLO, "instructions": "x", "max_output_tokens": 3, "temperature": 0.5,
            "top_p": 0.9, "top_k": 3, "top_logprobs": (1, {"include": ["message.output_text.logprobs"]}), "include": [],
            "seed": 1,
            "stop": "x", "stream": True, "stream_options": {"include_obfuscation": False},
            "text": {"format": {"type": "text"}}, "structured_outputs": {"choice": ["a"]},
            "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}], "tool_choice": "none",
            "parallel_tool_calls": False, "reasoning": {"effort": "low"}, "enable_thinking": True,
            "truncation": "disabled", "store": True,
            "background": False, "previous_response_id": None, "conversation": None, "prompt": None,
            "max_tool_calls": 1, "cache_salt": "s", "request_id": "mine", "chat_template_kwargs": {"a": 1},
            "metadata": {"a": "b"}, "user": "me", "service_tier": "auto",
        },
    ),
    "/api/chat": (
        OllamaChatRequest, {"model": NAME, "messages": HELLO, "options": {"num_predict": 2}},
        OLLAMA | {"messages": HELLO, "tools": [TOOL]},
    ),
    "/api/generate": (
        OllamaGenerateRequest, {"model": NAME, "prompt": "hi", "options": {"num_predict": 2}},
        OLLAMA | {
            "prompt": "ho", "system": "x", "raw": True, "suffix": "", "template": "", "context": [], "images": [],
        },
    ),
    "/v1/embeddings": (
        EmbeddingsRequest, {"input": "hi"},
        VECTOR | {"model": NAME, "input": [[5, 6], [7]], "encoding_format": "base64", "user": "me"},
    ),
    "/api/embed": (
        OllamaEmbedRequest, {"model": NAME, "input": "hi"},
        VECTOR | OLLAMA_VECTOR | {"input": ["hi", "ho"], "truncate": False},
    ),
    "/api/embeddings": (OllamaEmbeddingsRequest, {"model": NAME, "prompt": "hi"},
                        VECTOR | OLLAMA_VECTOR | {"prompt": "ho"}),
    "/api/show": (OllamaShowRequest, {"model": NAME}, {"model": NAME, "name": NAME, "verbose": True}),
    "/tokenize": (
        TokenizeRequest, {"messages": HELLO},
        TEMPLATE | {"model": NAME, "prompt": ("hi", {"messages": None}), "messages": HELLO, "return_token_strs": True},
    ),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}, {"model": NAME, "tokens": [5, 6]}),
}  # fmt: skip
# Needs a flag that the operator has not given.
REFUSED = {"chat_template"}


def names(model) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.fixture(scope="module")
def client(plain):
    with httpx.Client(base_url=plain.url, timeout=60) as client:
        yield client


def test_the_page_is_up_to_date():
    assert main(["--check", str(Path(ROOT) / "docs" / "api.md")]) == 0


def test_the_openapi_document_has_the_same_fields(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for _, _, model, _, _ in POSTS:
        assert set(schemas[model.__name__]["properties"]) == names(model)


@pytest.mark.parametrize("path", CASES)
def test_every_field_is_taken(client, path):
    model, base, samples = CASES[path]
    assert set(samples) == names(model)
    for field, sample in samples.items():
        value, more = sample if isinstance(sample, tuple) else (sample, {})
        answer = client.post(path, json=base | more | {field: value})
        if field in REFUSED:
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field
        else:
            assert answer.status_code == 200, (field, answer.text)


@pytest.mark.parametrize("path", CASES)
def test_every_field_is_checked(client, path):
    _, base, samples = CASES[path]
    for field, sample in samples.items():
        value = sample[0] if isinstance(sample, tuple) else sample
        answer = client.post(path, json=base | {field: 7 if isinstance(value, dict) else WRONG})
        assert answer.status_code == 400, (field, answer.text)
        error = answer.json()["error"]
        if path.startswith("/api/"):
            named = error
        else:
            named = error["message"] if path == "/v1/messages" else error["param"]
        assert named.split(":")[0].split(".")[0] == field, (field, error)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unsupported_fields_are_refused_by_name_and_unknown_ones_are_not(client, path):
    base = CASES[path][1]
    for field, neutral in UNSUPPORTED.items():
        answer = client.post(path, json=base | {field: "something"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == field and error["code"] == "unsupported_parameter"
        for value in neutral:
            assert client.post(path, json=base | {field: value}).status_code == 200, (field, value)
    harmless = {"session_id": "a", "prompt_cache_key": "b", "store": True, "metadata": {"a": "b"}, "verbosity": "low"}
    assert client.post(path, json=base | harmless).status_code == 200
