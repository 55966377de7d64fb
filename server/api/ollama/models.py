"""Ollama's routes about models: which there are (tags are sizes), what one is, which are loaded."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model_store.arrays import device_of
from server.api.generate.serving import json_response, read_body
from server.api.http.state import ServerState, state_of
from server.api.ollama.convert import model_name
from server.api.ollama.protocol import OllamaShowRequest
from server.sizing.spec import format_count

# The version of Ollama whose API this follows: clients ask for the least that they need.
FOLLOWED = "0.12.11"
_FOREVER = "9999-12-31T23:59:59Z"

router = APIRouter()


@router.get("/api/tags", tags=["ollama"], summary="Ollama's list of models: NAME:latest, and NAME:24L for every size")
async def ollama_tags(request: Request) -> Response:
    state = state_of(request)
    return json_response({"models": [_entry(state, card) for card in state.catalog.cards()]})


@router.get("/api/ps", tags=["ollama"], summary="Ollama's list of loaded models: the pair, always")
async def ollama_ps(request: Request) -> Response:
    state = state_of(request)
    entry = _entry(state, state.catalog.card(state.catalog.name))
    del entry["modified_at"]
    if (sleeper := state.served.engine.sleeper) is not None:
        entry["size"] -= sleeper.report.num_bytes
    on_gpu = device_of(state.served.engine.executor.kv_tensors()[0]) != "cpu"
    memory = {"expires_at": _FOREVER, "size_vram": entry["size"] if on_gpu else 0}
    return json_response({"models": [entry | memory | {"context_length": state.catalog.max_model_len}]})


@router.get("/api/version", tags=["ollama"], summary="Version of Ollama's API that is followed")
async def ollama_version() -> Response:
    return json_response({"version": FOLLOWED})


async def ollama_show(request: Request, state: ServerState) -> Response:
    body = await read_body(request, OllamaShowRequest, state)
    card = state.catalog.card(model_name(body.model or body.name, state))
    spec, template, entry = state.served.engine.spec, state.tokenizer.chat_template, _entry(state, card)
    capabilities = ["completion"]
    if template is not None and (template.mentions_tools or state.settings.tool_template != "none"):
        capabilities.append("tools")
    if template is not None and template.thinks:
        capabilities.append("thinking")
    details = entry["details"]
    return json_response(
        {
            "modelfile": f"FROM {card['root']}\n",
            "parameters": "\n".join(state.sampling_defaults.described().split(", ")),
            "template": "" if template is None else template.source,
            "details": details,
            "model_info": {
                "general.architecture": spec.family,
                "general.basename": state.catalog.name,
                "general.parameter_count": _largest(state, card)["parameters"],
                f"{spec.family}.block_count": _largest(state, card)["layers"],
                f"{spec.family}.context_length": state.catalog.max_model_len,
                f"{spec.family}.embedding_length": spec.hidden_size,
                f"{spec.family}.feed_forward_length": spec.intermediate_size,
                f"{spec.family}.attention.head_count": spec.num_heads,
                f"{spec.family}.attention.head_count_kv": spec.num_kv_heads,
                f"{spec.family}.vocab_size": spec.vocab_size,
            },
            "capabilities": capabilities,
            "modified_at": entry["modified_at"],
        }
    )


def _largest(state: ServerState, card: dict[str, Any]) -> dict[str, Any]:
    """The card of a size; of a name without one, that of the largest."""
    return card if "bytes" in card else state.catalog.card(state.catalog.model_id(state.catalog.sizes[-1]))


def _entry(state: ServerState, card: dict[str, Any]) -> dict[str, Any]:
    """One model as Ollama lists it. A name without a size has the bytes of all sizes together."""
    is_auto = "bytes" not in card
    name = f"{card['id']}:latest" if is_auto else card["id"]
    family = state.served.engine.spec.family
    digest = hashlib.sha256(f"{state.served.fingerprint} {name}".encode()).hexdigest()
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(card["created"], UTC).isoformat().replace("+00:00", "Z"),
        "size": state.catalog.total_bytes if is_auto else card["bytes"],
        "digest": digest,
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": format_count(_largest(state, card)["parameters"]),
            "quantization_level": str(state.served.engine.executor.weight_form),
        },
    }
