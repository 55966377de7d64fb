"""Requests as real clients send them: openai-python, lm-eval, vllm bench, guidellm, Anthropic's, Ollama's; ours."""

from __future__ import annotations

from typing import Any

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_SAY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown fox?"}]

SEEDS: list[tuple[str, dict[str, Any]]] = [
    # lm-eval, loglikelihood and generation
    ("/v1/completions", {
        "model": "tiny:5L", "prompt": [[5, 9, 20, 31, 40]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }),
    ("/v1/completions", {
        "model": "tiny", "prompt": "A server that holds", "max_tokens": 12, "temperature": 0, "seed": 1234,
        "stop": ["\n\n", "Q:", "<|im_end|>"], "top_p": 0.95, "top_k": 40,
    }),
    # vllm bench serve, guidellm
    ("/v1/completions", {
        "model": "tiny", "prompt": "The quick brown fox", "repetition_penalty": 1.0, "max_tokens": 8,
        "logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }),
    ("/v1/chat/completions", {
        "model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_completion_tokens": 9, "stream": True, "stop": None, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }),
    # openai-python
    ("/v1/chat/completions", {
        "model": "tiny", "messages": _SAY, "max_tokens": 8, "logprobs": True, "top_logprobs": 3, "n": 2,
        "temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100}, "user": "u",
    }),
    ("/v1/chat/completions", {
        "model": "tiny", "messages": _SAY, "max_tokens": 30, "tools": [_WEATHER], "tool_choice": "required",
        "parallel_tool_calls": False,
    }),
    ("/v1/chat/completions", {
        "model": "tiny", "max_tokens": 16, "tools": [_WEATHER], "tool_choice": "auto", "messages": [
            *_SAY,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
    }),
    ("/v1/chat/completions", {
        "model": "tiny", "messages": _SAY, "max_tokens": 24, "response_format": {"type": "json_schema", "json_schema": {
            "name": "p", "strict": True, "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}},
        }},
    }),
    ("/v1/chat/completions", {
        "messages": [*_SAY, {"role": "assistant", "content": "The"}], "continue_final_message": True,
        "add_generation_prompt": False, "max_tokens": 6, "prompt_logprobs": 1, "return_token_ids": True,
    }),
    # our own fields
    ("/v1/completions", {
        "prompt": ["The quick", "A server"], "max_tokens": 6, "min_size": "4L", "max_size": "75%", "n": 2, "seed": 3,
        "slo": {"ttft_ms": 5000, "tpot_ms": 500}, "slo_policy": "best_effort", "priority": 2, "cache_salt": "s",
    }),
    ("/v1/completions", {
        "prompt": "The quick", "max_tokens": 9, "size_schedule": [{"size": "6L", "tokens": 3}, {"size": "4L"}],
        "bad_words": ["fox"], "allowed_token_ids": [5, 6, 7, 8], "min_tokens": 2, "stop_token_ids": [9],
    }),
    ("/v1/completions", {
        "prompt": "The quick", "max_tokens": 20, "structured_outputs": {"regex": "[a-c]{2,5}"}, "memory_budget_mb": 300,
        "truncate_prompt_tokens": 3, "include_stop_str_in_output": True, "skip_special_tokens": False,
    }),
    # text that looks like calls, schemas of all kinds, loops
    ("/v1/chat/completions", {
        "messages": _SAY, "max_tokens": 40, "tools": [_WEATHER], "stream": True, "enable_thinking": True,
        "structured_outputs": {"choice": ['a <tool_call>{"name": "get_weather", "arguments": {}}</tool_call>']},
    }),
    ("/v1/chat/completions", {
        "messages": _SAY, "max_tokens": 20, "response_format": {"type": "json_object", "schema": {
            "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "format": "int64"}},
            "$defs": {"a": {"$ref": "#/$defs/a"}},
        }},
    }),
    ("/v1/completions", {
        "prompt": "The \ufffd", "max_tokens": 30, "seed": -1, "echo": True, "logprobs": 1, "prompt_logprobs": 0,
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3},
    }),
    # tokenizer, and the newer protocols
    ("/tokenize", {"model": "tiny", "prompt": "Hello Köln 🌍", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": _SAY, "add_generation_prompt": True, "chat_template_kwargs": {"x": 1}}),
    ("/detokenize", {"model": "tiny", "tokens": [5, 9, 20, 31]}),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 8, "system": "Be brief.", "messages": [{"role": "user", "content": "Hello"}],
        "stream": True, "stop_sequences": ["x"], "metadata": {"user_id": "u"},
    }),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}),
    ("/v1/responses", {"model": "tiny", "input": "Hello", "max_output_tokens": 8, "instructions": "Be brief."}),
    ("/v1/responses", {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
            {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"at": 1e5}'},
            {"type": "function_call_output", "call_id": "c", "output": "rain"},
        ],
        "tools": [{"type": "function", **_WEATHER["function"]}], "tool_choice": "auto", "max_output_tokens": 8,
        "stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"},
        "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"},
    }),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 8, "cache_salt": "s", "tool_choice": {"type": "any"},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "thinking": {"type": "disabled"}, "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 0.10}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "is_error": True}]},
        ],
    }),
    # vectors
    ("/v1/embeddings", {
        "model": "tiny:5L", "input": ["The quick", "A server"], "dimensions": 8, "encoding_format": "base64",
        "cache_salt": "s", "user": "u",
    }),
    ("/v1/embeddings", {"input": [[5, 9, 20], [31]], "min_size": "4L", "max_size": "75%", "memory_budget_mb": 300}),
    # precisions, kinds of text
    ("/v1/completions", {
        "prompt": "The quick", "max_tokens": 4, "size": "5L-exact", "precision": "exact", "min_precision": "q4",
        "max_precision": "exact", "workload": "worst",
    }),
    # Ollama's clients
    ("/api/chat", {
        "model": "tiny:latest", "messages": [
            *_SAY,
            {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"at": 0.5}}}]},
            {"role": "tool", "tool_name": "get_weather", "content": "rain"},
        ],
        "tools": [_WEATHER], "think": False, "keep_alive": "5m", "logprobs": True, "top_logprobs": 2,
        "options": {"num_predict": 6, "temperature": 0, "repeat_penalty": 1.1, "stop": ["x"], "num_ctx": 128},
    }),
    ("/api/chat", {
        "model": "tiny", "messages": _SAY, "stream": False, "format": "json", "options": {"num_predict": 9, "seed": 7},
    }),
    ("/api/generate", {
        "model": "tiny:5L", "prompt": "The quick", "raw": True, "keep_alive": -1, "truncate": True, "shift": False,
        "options": {"num_predict": 5, "top_k": 3, "min_p": 0.1, "repeat_last_n": -1}, "size": "5L", "cache_salt": "s",
    }),
    ("/api/generate", {
        "model": "tiny", "prompt": "Hello", "system": "Be brief.", "stream": False, "suffix": "", "context": [],
        "format": {"type": "object", "properties": {"a": {"type": "integer"}}}, "options": {"num_predict": 9},
    }),
    ("/api/embed", {
        "model": "tiny", "input": ["The quick", "A server"], "truncate": True, "dimensions": 8, "keep_alive": 60,
        "options": {"num_ctx": 64},
    }),
    ("/api/embeddings", {"model": "tiny", "prompt": "The quick"}),
    ("/api/show", {"model": "tiny:5L", "verbose": True}),
]  # fmt: skip
