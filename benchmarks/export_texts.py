"""Does an exported size say what the server says at that size? Greedy texts of our engine, transformers, llama.cpp.

    python -m benchmarks.export_texts --size 22L [--llama-python PYTHON]

Exports the size (checkpoint and GGUF), lets all three answer the same chat prompts greedily in float32 (llama.cpp
from the bfloat16 GGUF; it rounds activations on the way) and prints how many answers are equal token by token, and
where the others first differ. `--llama-python` is the interpreter of an environment with llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_store.pair import open_pair
from server.cli import main as boomerang
from server.config import Settings
from server.offline import OfflineEngine

PROMPTS = Path(__file__).parent / "quality_chat_prompts.txt"
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
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python")
    args = parser.parse_args()
    pair = open_pair(args.teacher, args.student)
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    size = int(args.size.removesuffix("L"))
    lines = PROMPTS.read_text().splitlines()[: args.prompts]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": m}], add_generation_prompt=True, return_dict=False)
        for m in lines
    ]
    engine = OfflineEngine(pair, Settings(dtype="float32", device="cpu"), 1024)
    ours = engine.generate(size, prompts, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "checkpoint", Path(scratch) / "model.gguf"
        given = {"--teacher": args.teacher, "--student": args.student}
        names = [part for option, value in given.items() if value for part in (option, value)]
        if boomerang(["export", *names, "--size", args.size, "--out", str(folder), "--gguf", str(file)]):
            sys.exit(1)
        _compare("transformers", ours, _transformers(folder, prompts, args.tokens, engine.ends), tokenizer)
        if args.llama_python:
            theirs = _llama(args.llama_python, file, prompts, args.tokens, engine.ends)
            _compare("llama.cpp", ours, theirs, tokenizer)


@torch.no_grad()
def _transformers(folder: Path, prompts: list[list[int]], tokens: int, ends: set[int]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
