"""The native executor serves where neither torch nor transformers can be imported."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from model_store.pair import open_pair
from server.kernels.cpu import library
from tests.api.tiny import RunningServer, make_pair

# Found by Python at its start; finders are asked before anything that is installed.
REFUSES = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers") and sys._getframe(2).f_code.co_name != "find_spec":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refusing())
"""

REQUESTS = [
    {"temperature": 0.8, "seed": 1, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 3},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    {"logit_bias": {"9": 3.5}, "min_tokens": 3, "allowed_token_ids": [5, 9, 11], "bad_words": ["the"]},
    {"echo": True, "logprobs": 2, "prompt_logprobs": 1},
    {"structured_outputs": {"regex": "[a-c]{4}"}},
    {"size_schedule": [{"size": "4L", "tokens": 2}, {"size": "6L"}], "ignore_eos": True},
    {"n": 3, "stream": True},
]


@pytest.mark.parametrize("flags", [("--speculative-size", "auto"), ("--quantization", "int8", "--dtype", "bfloat16")])
def test_every_kind_of_request_without_torch(tmp_path: Path, flags: tuple[str, ...]) -> None:
    if isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    served = make_pair(tmp_path)
    open_pair(*served)  # the first opening of a folder asks transformers what it is, a start finds that noted
    (tmp_path / "sitecustomize.py").write_text(REFUSES)
    with RunningServer(served, "--executor", "native", *flags, env={"PYTHONPATH": str(tmp_path)}) as server:
        server.wait_ready()
        for request in REQUESTS:
            body = {"prompt": "The quick brown fox", "max_tokens": 6} | request
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, (request, answer.text)
            assert "error" not in answer.text
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "The quick brown fox"}, timeout=60)
        assert answer.status_code == 200, (answer.text, server.log[-30:])
    assert not [line for line in server.log if "was imported" in line]
