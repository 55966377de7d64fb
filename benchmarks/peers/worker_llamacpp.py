"""llama.cpp behind the same line protocol, one sequence at a time. Runs in llama-cpp-python's environment."""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp writes to the real standard output
    started = time.perf_counter()
    import numpy as np
    from llama_cpp import Llama, llama_cpp, llama_get_logits_ith

    if "q8_0" in sys.argv[1]:
        # Its repacked int8 buffers for AMX end in a segmentation fault (0.3.36): the ordinary AVX-512 VNNI path runs.
        defaults = llama_cpp.llama_model_default_params

        def without_repacking():
            params = defaults()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_model_default_params = without_repacking
    threads = len(os.sched_getaffinity(0))
    llm = Llama(
        model_path=sys.argv[1], n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=2048, n_ubatch=512,
        verbose=False,
    )  # fmt: skip
    vocabulary = llm.n_vocab()

    def next_token() -> int:
        pointer = llama_get_logits_ith(llm.ctx, -1)
        return int(np.ctypeslib.as_array(pointer, (vocabulary,)).argmax())

    answers.write(json.dumps({"ready": time.perf_counter() - started}) + "\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        for prompt in job["prompts"]:
            llm.reset()
            llm.eval(prompt)
            for _ in range(job["num_new"] - 1):
                llm.eval([next_token()])
            next_token()
        answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
