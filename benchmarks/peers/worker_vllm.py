"""vLLM behind a line protocol: reads {"prompts": [[ids]], "num_new": n}, answers {"seconds": s}.

Runs in vLLM's own environment: imports nothing of this project.
"""

import argparse
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr  # vLLM prints; the protocol keeps the real one
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model, dtype="bfloat16", max_model_len=2048, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=4096, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    print(json.dumps({"ready": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=job["num_new"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        start = time.perf_counter()
        results = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(result.outputs[0].token_ids) == job["num_new"] for result in results)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
