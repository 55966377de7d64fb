"""The engine as a function from prompts to answers, without HTTP: for `boomerang evaluate` and `boomerang distill`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from server.config import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from model_store.distill.job import DistillJob
    from model_store.evaluate.job import EvaluateJob
    from model_store.pair import Pair

# (size, prompts as token ids, most new tokens, temperature, repetition penalty) -> answers as token ids, the ending
# token included
Generate = Callable[..., list[list[int]]]
_MAX_SEQS = 32


class OfflineEngine:
    """A pair loaded in this process; every call answers a list of prompts with continuous batching."""

    def __init__(self, pair: Pair, settings: Settings, max_model_len: int) -> None:
        import dataclasses

        from server.api.generate.tokenizer import ServingTokenizer
        from server.engine.engine import Engine
        from server.forms import load_weights, pick_device, weight_form
        from server.loading import engine_config

        form, device = weight_form(settings, pair), pick_device(settings)
        loaded = load_weights(settings, pair, form, device)
        config = engine_config(settings, pair, form.dtype, device)
        length = min(max_model_len, pair.spec.max_context)
        self.engine = Engine(loaded, dataclasses.replace(config, max_num_seqs=_MAX_SEQS, max_model_len=length))
        tokenizer = ServingTokenizer.from_folder(pair.tokenizer_path, vocab_size=pair.spec.vocab_size, store=pair.store)
        self.ends = set(tokenizer.eos_token_ids)
        self._calls = 0

    def generate(
        self, size: int, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 0.0,
        repetition_penalty: float = 1.0, first_seed: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """One answer per prompt, prompt i sampled with the seed `first_seed` + i. ValueError if a prompt leaves no room
        for an answer or the size was not loaded (`--memory-budget`), RuntimeError if a step failed."""
        from server.core.request import Request, SamplingParams

        if size not in self.engine.sizes:
            reason = self.engine.missing_sizes.get(size, "the pair has no such size")
            raise ValueError(f"{size}L cannot answer: {reason}")
        self._calls += 1
        requests = []
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(
                max_tokens=min(max_new_tokens, self.engine.config.max_model_len - len(prompt)),
                temperature=temperature, repetition_penalty=repetition_penalty, seed=first_seed + number,
                eos_token_ids=frozenset(self.ends),
            )  # fmt: skip
            request = Request(f"{self._calls}-{number}", list(prompt), sampling, sizes=(size,))
            requests.append(self.engine.add_request(request))
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error:
                    raise RuntimeError(f"the engine failed: {output.error}")
        return [list(request.output_token_ids) for request in requests]


def pair_generator(job: EvaluateJob, longest: int = 2048) -> Generate:
    """Answers by the pair that a job of `evaluate` names; it is loaded, in their order, at the first call."""
    from model_store.pair import open_pair

    def pair() -> Pair:
        order = None if job.thresholds else job.patch_order
        return open_pair(job.teacher, job.student, patch_order=order, thresholds=job.thresholds, store=job.store)

    return _lazy(pair, Settings(dtype=job.dtype, device=job.device), longest)


def nested_codes(pair: Pair) -> Path:
    """The file of a pair's nested codes, which are made if the store has none."""
    from server.forms import nested_codes

    return nested_codes(pair, pair.store)


def teacher_generator(job: DistillJob, longest: int = 2048) -> Generate:
    """Answers by a teacher alone, as `distill --self-generate` needs them: no student exists yet."""
    from model_store.pair import NO_STUDENT, open_pair

    return _lazy(lambda: open_pair(job.teacher, NO_STUDENT, store=job.store), Settings(device=job.device), longest)


def _lazy(open_it: Callable[[], Pair], settings: Settings, longest: int) -> Generate:
    engines: list[OfflineEngine] = []

    def generate(*values: Any, **named: Any) -> list[list[int]]:
        if not engines:
            engines.append(OfflineEngine(open_it(), settings, longest))
        return engines[0].generate(*values, **named)

    return generate
