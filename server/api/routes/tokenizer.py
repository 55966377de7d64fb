"""The tokenizer by itself: text or messages to ids and back, and what its folder says."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.conversation import chat_template, render
from server.api.generate.serving import json_response, read_body, too_long
from server.api.generate.tools import ToolUse
from server.api.http.errors import invalid
from server.api.http.sse import entries_of, listed
from server.api.http.state import ServerState, state_of
from server.api.routes.protocol import DetokenizeRequest, TokenizeRequest

router = APIRouter()


async def tokenize(request: Request, state: ServerState) -> Response:
    body = await read_body(request, TokenizeRequest, state)
    state.catalog.split_model(body.model)
    tokenizer = state.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        if not body.messages:
            raise invalid("messages is an empty list.", "messages")
        template = chat_template(body, state)
        is_strict = state.settings.tool_template == "none"
        text = render(body, ToolUse(body.tools, None, template, is_strict=is_strict))
        add_special = bool(body.add_special_tokens)
    else:
        text, add_special = body.prompt or "", body.add_special_tokens is not False
    param = "prompt" if body.messages is None else "messages"
    if len(text) > tokenizer.longest_token * state.catalog.max_model_len:
        raise too_long(text, state, param)
    try:
        token_ids = await tokenizer.encode_async(text, add_special)
    except UnicodeError:
        raise invalid(f"{param} is not valid Unicode.", param) from None
    answer = {"count": len(token_ids), "max_model_len": state.catalog.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        texts = await asyncio.to_thread(entries_of, token_ids, tokenizer.token_text, 5000)
        answer["token_strs"] = listed([texts])
    return json_response(answer)


async def detokenize(request: Request, state: ServerState) -> Response:
    body = await read_body(request, DetokenizeRequest, state)
    state.catalog.split_model(body.model)
    if body.tokens and max(body.tokens) >= state.tokenizer.vocab_size:
        raise invalid(f"tokens: {max(body.tokens)} is not in the vocabulary.", "tokens")
    return json_response({"prompt": await asyncio.to_thread(state.tokenizer.decode, body.tokens)})


@router.get("/tokenizer_info", tags=["tokenizer"], summary="Special tokens and chat template")
async def tokenizer_info(request: Request) -> Response:
    return json_response(state_of(request).tokenizer.info())
