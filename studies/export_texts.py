"""Does an exported size say what the server says at that size? Greedy texts of our server, transformers, llama.cpp.

    python -m studies.export_texts --size 22L [--llama-python PYTHON]

Exports the size (checkpoint and GGUF), lets all three answer the same chat prompts greedily and prints how many
answers are equal token by token, and where the others first differ. All in `--dtype`: the server, over HTTP with the
size in the request, the checkpoint, and the matrices of the GGUF file. `--llama-python` is the interpreter of an
environment with llama-cpp-python.

Answered 28 November 2026: all answers equal in transformers, 31 of 32 in llama.cpp (docs/log/2026-11-28-exports.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.local_server import LocalServer
from model_store.evaluate.chat import chat_prompts, prompt_ids
from model_store.pair import open_pair
from server.cli import main as boomerang

PROMPTS = Path(__file__).resolve().parent.parent / "benchmarks" / "quality_chat_prompts.txt"
_LLAMA = """
import json, sys
from llama_cpp import Llama
job = json.load(sys.stdin)
model = Llama(job["file"], n_ctx=1024, n_threads=job["threads"], verbose=False, logits_all=False)
answers = []
for prompt in job["prompts"]:
    model.reset()
    answer = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        answer.append(token)
        if token in job["ends"] or len(answer) == job["tokens"]:
            break
    answers.append(answer)
print("ANSWERS" + json.dumps(answers))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="22L")
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python")
    args = parser.parse_args()
    pair = open_pair(args.teacher, args.student)
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    prompts = prompt_ids(tokenizer, chat_prompts(PROMPTS, args.prompts))
    given = {"--teacher": args.teacher, "--student": args.student}
    names = [part for option, value in given.items() if value for part in (option, value)]
    with LocalServer([*names, "--dtype", args.dtype]) as server:
        ours = _server(server.url, args.size, prompts, args.tokens)
    ends = {tokenizer.eos_token_id}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "checkpoint", Path(scratch) / "model.gguf"
        options = ["--size", args.size, "--dtype", args.dtype, "--out", str(folder), "--gguf", str(file)]
        if boomerang(["export", *names, *options]):
            sys.exit(1)
        dtype = getattr(torch, args.dtype)
        _compare("transformers", ours, _transformers(folder, dtype, prompts, args.tokens, ends), tokenizer)
        if args.llama_python:
            theirs = _llama(args.llama_python, file, prompts, args.tokens, ends)
            _compare("llama.cpp", ours, theirs, tokenizer)


def _server(url: str, size: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "size": size, "return_token_ids": True}
        answer = httpx.post(url + "/v1/completions", json=body, timeout=120).raise_for_status().json()
        assert answer["model"].endswith(f":{size.removesuffix('L')}L"), answer["model"]
        answers.append(answer["choices"][0]["token_ids"])
    return answers


@torch.no_grad()
def _transformers(
    folder: Path, dtype: torch.dtype, prompts: list[list[int]], tokens: int, ends: set[int]
) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    answers = []
    for prompt in prompts:
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=min(ends),
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def _llama(python: Path, file: Path, prompts: list[list[int]], tokens: int, ends: set[int]) -> list[list[int]]:
    job = {"file": str(file), "prompts": prompts, "tokens": tokens, "ends": sorted(ends)}
    job["threads"] = torch.get_num_threads()
    done = subprocess.run([python, "-c", _LLAMA], input=json.dumps(job), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("ANSWERS")[1])


def _compare(name: str, ours: list[list[int]], theirs: list[list[int]], tokenizer: object) -> None:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {equal} of {len(ours)} answers equal, token by token")
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            print(f"  answer {number} differs from token {at} of {len(a)}: {tokenizer.decode(a[: at + 1])!r}")


if __name__ == "__main__":
    main()
