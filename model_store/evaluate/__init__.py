"""`boomerang evaluate`: what every size of a pair is worth, measured and stored with the pair.

Offers `EvaluateJob` and `run(job)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.evaluate.job import EvaluateJob
from model_store.files import read_json_if_there

if TYPE_CHECKING:
    import torch

    from model_store.evaluate.chat import Generate
    from model_store.pair import Pair

__all__ = ["EvaluateJob", "end_tokens", "measure_text", "run", "store_quality"]

QUALITY_FILE = "quality.json"


Rows = dict[int, dict[str, Any]]


def run(
    job: EvaluateJob,
    generator: Callable[[EvaluateJob], Generate] | None = None,
    nested: Callable[[Pair], Path] | None = None,
) -> int:
    """Measure, print, store. `generator` makes what answers the chat prompts (an engine); without it, transformers.

    `nested` makes the file of a pair's nested codes; ValueError for --precisions without it.
    """
    import torch
    from transformers import AutoTokenizer

    from model_store.distill.from_pair import load_elastic
    from model_store.distill.processes import has_bf16, pick_device
    from model_store.evaluate.chat import chat_prompts, transformers_generate
    from model_store.evaluate.orders import compare_orders, open_with_order, search_order
    from model_store.evaluate.overlap import read_texts

    device = pick_device(job.device)
    pair, is_own = open_with_order(job)
    if (job.text or job.kind) and job.window_tokens > (longest := pair.spec.max_context):
        raise ValueError(f"--window-tokens {job.window_tokens}: the pair is served up to {longest} tokens")
    sizes = job.chosen_sizes(pair.elasticity.sizes)
    held_out = list(read_texts(job.text, "--text")) if job.text else []
    prompts = chat_prompts(job.chat, job.chat_limit) if job.chat else []
    texts = {name: list(read_texts(path, "--kind")) for name, path in job.kind}
    provenance: dict[str, Any] = {"dtype": job.dtype} | _overlaps(pair, job, held_out, prompts, texts)
    model = load_elastic(pair, getattr(torch, job.dtype), device)
    if job.dtype == "bfloat16" and not has_bf16(device == "cpu"):
        # Such a processor takes ten times as long for products of bfloat16 matrices. The weights stay rounded.
        model.teacher.float()
        model.float()
        provenance |= {"products": "float32"} if job.text or job.chat or job.kind else {}
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path, local_files_only=True)

    found = search_order(model, tokenizer, job) if job.calibration else None
    if found is not None and job.patch_order == "klpatch":
        job = job.model_copy(update={"thresholds": tuple(found.thresholds)})  # for the engine that answers, too
        pair, is_own = open_with_order(job)
        model.elasticity = pair.elasticity
    provenance["patch_order"] = pair.patch_order
    rows: Rows = {size: {} for size in sizes}
    cut = lambda texts: _windows(texts, tokenizer, job)  # noqa: E731
    text = cut(held_out) if job.text else []
    if job.text:
        provenance["text"] = f"{job.text.name}, first {job.windows} windows of {job.window_tokens} tokens"
        _add(rows, measure_text(model, sizes, text))
    kinds = _measure_kinds(model, pair, job, cut, texts, sizes, nested, provenance)
    generate = generator(job) if generator else None
    if job.chat:
        provenance["chat"] = f"{job.chat.name}, {job.chat_limit} messages, greedy, at most {job.max_new_tokens}"
        if job.repetition_penalty != 1:
            provenance["repetition_penalty"] = job.repetition_penalty
        chat = measure_chat(model, sizes, tokenizer, prompts, job.max_new_tokens, job.repetition_penalty, generate)
        _add(rows, chat)
    if job.speed:
        speak = generate or transformers_generate(model, end_tokens(model, tokenizer))
        speeds = measure_speed(speak, sizes, tokenizer)
        _add(rows, {size: {"tokens_per_second": speed} for size, speed in speeds.items()})
    _add_costs(pair, rows, getattr(torch, job.dtype))
    orders = compare_orders(model, sizes, text, job, found) if job.compare_orders and job.text else {}
    _report(job, pair, rows, provenance, orders, kinds)
    if not job.no_store:
        _store(job, pair, is_own, rows, provenance, orders, kinds)
    return 0


def _measure_kinds(
    model: Any, pair: Pair, job: EvaluateJob, cut: Callable[[list[str]], Any], texts: Mapping[str, list[str]],
    sizes: Sequence[int], nested: Callable[[Pair], Path] | None, provenance: dict[str, Any],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Figures and provenance by kind of text."""
    from model_store.evaluate.kinds import KindsOfText

    if not job.kind:
        return {}
    if job.precisions and nested is None:
        raise ValueError("--precisions: nested codes are made by the server's packages, which are not here")
    file = nested(pair) if job.precisions and nested is not None else None
    measure, found = KindsOfText(model, pair, file, job.precisions), {}
    for name, path in job.kind:
        figures: dict[str, Any] = measure.measure(name, cut(texts[name]), sizes)
        figures["text"] = f"{path.name}, first {job.windows} windows of {job.window_tokens} tokens"
        if (overlap := provenance.pop(f"{name}_kind_overlap", None)) is not None:
            figures["overlap"] = overlap
        found[name] = figures
    return found


def _windows(texts: list[str], tokenizer: Any, job: EvaluateJob) -> list[torch.Tensor]:
    from model_store.evaluate.measure import windows
    from model_store.opening import opening

    ids = tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids
    return windows(ids, job.window_tokens, job.windows, opening(tokenizer))


def _add(rows: Rows, more: Mapping[int, dict[str, Any]]) -> None:
    for size, row in more.items():
        rows[size].update(row)


def _report(
    job: EvaluateJob, pair: Pair, rows: Rows, provenance: dict[str, Any], orders: dict[str, Rows],
    kinds: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Print the tables, and write --report."""
    from model_store.evaluate.measure import is_monotone
    from model_store.evaluate.report import kinds_table, markdown, table, uses, write_report

    print(markdown(table(rows)))
    if job.text:
        worse = is_monotone({size: row["kl"] for size, row in rows.items()})
        falls = "KL to the teacher falls at every added layer."
        print("\n" + "\n".join(uses(rows)))
        print(
            "\n"
            + (f"KL to the teacher does not fall at {', '.join(f'{size}L' for size in worse)}." if worse else falls)
        )
    if kinds:
        print("\n" + markdown(kinds_table(kinds)))
    for name, other in orders.items():
        print(f"\n{name}\n\n{markdown(table(other))}")
    if job.report:
        notes = [f"{key}: {_note(value)}" for key, value in provenance.items()]
        write_report(job.report, f"{pair.name}, quality by size", notes, rows, orders)


def _store(
    job: EvaluateJob, pair: Pair, is_own: bool, rows: Rows, provenance: dict[str, Any], orders: dict[str, Rows],
    kinds: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    from model_store.evaluate.orders import adopt

    name = job.patch_order or pair.patch_order
    if job.adopt_order and not is_own:
        adopt(pair, name)
        is_own = True
    if is_own:
        store_quality(pair, rows, provenance, orders, kinds)
    else:  # `sizes` of quality.json are read as those of the pair's own order
        store_quality(pair, {}, {}, orders | {name: rows})


def _overlaps(
    pair: Pair, job: EvaluateJob, held_out: list[str], prompts: list[str], kinds: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Where --text, --chat and --kind were looked for and what share was found; OverlapError if it is too much.

    They are looked for in the text that an order is searched on, too.
    """
    from model_store.evaluate.overlap import check_overlap, fingerprint_of

    known = fingerprint_of(pair.notes_path)
    training = [*job.training_data, *(job.calibration or [])]
    if not job.training_data and known is None:
        _say("what the pair was trained on is not known here: overlap with it is not checked (--training-data)")
    elif known is not None and known.unknown:
        _say(f"the training started from {', '.join(known.unknown)}: what those were trained on is not checked")
    found = {}
    for name, texts in (("text", held_out), ("chat", prompts)):
        if texts and (overlap := check_overlap(f"--{name}", texts, training, known, job.allow_overlap)):
            found[f"{name}_overlap"] = overlap
    for name, texts in kinds.items():
        if overlap := check_overlap(f"--kind {name}", texts, training, known, job.allow_overlap):
            found[f"{name}_kind_overlap"] = overlap
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def measure_text(model: Any, sizes: Sequence[int], sequences: Sequence[torch.Tensor]) -> dict[int, dict[str, float]]:
    """Perplexity, KL and agreement per size on windows of token ids."""
    from tqdm import tqdm

    from model_store.evaluate.measure import score, summary

    top = model.elasticity.sizes[-1]
    with tqdm(total=len(sequences), desc="windows", file=sys.stderr) as bar:
        scores = score(model, sorted({*sizes, top}), sequences, progress=lambda done: bar.update(done - bar.n))
    return {size: summary(scores[size], scores[top]) for size in sizes}


def measure_chat(
    model: Any, sizes: Sequence[int], tokenizer: Any, messages: Sequence[str], max_new_tokens: int,
    repetition_penalty: float = 1.0, generate: Generate | None = None,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Divergence on the teacher's own answers to users' messages, and what each size's own answers look like."""
    import torch
    from tqdm import tqdm

    from model_store.evaluate.chat import Answers, compare, prompt_ids, share, transformers_generate
    from model_store.evaluate.measure import score, summary

    prompts = prompt_ids(tokenizer, messages)
    ends = end_tokens(model, tokenizer)
    generate = generate or transformers_generate(model, ends)
    top = model.elasticity.sizes[-1]
    answers, penalised = {}, {}
    for size in tqdm(sorted({*sizes, top}), desc="answers", file=sys.stderr):
        answers[size] = generate(size, prompts, max_new_tokens)
        if repetition_penalty != 1:
            own = generate(size, prompts, max_new_tokens, repetition_penalty=repetition_penalty)
            penalised[size] = share("repetition_penalised", Answers.of(own, ends).repetitive)
    sequences = [torch.tensor([*p, *a]) for p, a in zip(prompts, answers[top], strict=True)]
    scores = score(model, sorted({*sizes, top}), sequences, [len(p) for p in prompts])
    figures = compare({size: Answers.of(own, ends) for size, own in answers.items()}, top)
    wanted = ("kl", "kl_ci", "top1_agreement", "top1_agreement_ci")
    return {
        size: {f"chat_{k}": v for k, v in summary(scores[size], scores[top]).items() if k in wanted}
        | figures[size] | penalised.get(size, {})
        for size in sizes
    }  # fmt: skip


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the generation config's, the tokenizer's, and the end of a turn if it has one."""
    configured = model.teacher.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured])
    ends |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return {token for token in ends if token is not None and token != tokenizer.unk_token_id}


def _add_costs(pair: Pair, rows: dict[int, dict[str, Any]], dtype: Any) -> None:
    from model_store.weight_form import WeightForm

    for entry in pair.size_table(WeightForm(dtype)):
        if entry["size"] in rows:
            rows[entry["size"]]["weight_bytes"] = entry["weight_bytes"]


def measure_speed(
    generate: Generate, sizes: Sequence[int], tokenizer: Any, num_new: int = 64, repeats: int = 3
) -> dict[int, float]:
    """Decode tokens per second of one request at each size, the median; what precedes the first token is taken off."""
    prompt = tokenizer("Once upon a time there was a lighthouse keeper who", add_special_tokens=False).input_ids
    speeds: dict[int, float] = {}
    for size in sizes:
        generate(size, [prompt], 4)
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            generate(size, [prompt], 1)
            first = time.perf_counter()
            (answer,) = generate(size, [prompt], num_new)
            rates.append((len(answer) - 1) / max(time.perf_counter() - first - (first - start), 1e-9))
        speeds[size] = statistics.median(rates)
    return speeds


def store_quality(
    pair: Pair, rows: dict[int, dict[str, Any]], provenance: dict[str, Any],
    orders: dict[str, dict[int, dict[str, Any]]] | None = None, kinds: dict[str, dict[str, Any]] | None = None,
) -> Path:  # fmt: skip
    """Write quality.json beside the student: what `open_pair` reads back as `Pair.quality`.

    Figures of an earlier call that this one did not take stay; `orders` are the same sizes in other patch orders. Text
    or prompts that replace an earlier call's bring what is known of their overlap with the training text, or nothing.
    """
    file = pair.notes_path / QUALITY_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    known = read_json_if_there(file)
    measured = known.get("measured", {})
    for kind in provenance.keys() & {"text", "chat"}:
        measured.pop("products", None)
        for stale in (f"{kind}_overlap", "overlap_13gram"):  # the latter: of both, by earlier versions
            measured.pop(stale, None)
    content = {"measured": measured | provenance, "sizes": _merged(known.get("sizes", {}), rows)}
    if other := known.get("orders", {}) | {name: _merged({}, found) for name, found in (orders or {}).items()}:
        content["orders"] = other
    if every_kind := known.get("kinds", {}) | (kinds or {}):
        content["kinds"] = every_kind
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _merged(known: dict[str, dict[str, Any]], rows: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    merged = {int(size): row for size, row in known.items()}
    for size, row in rows.items():
        merged[size] = merged.get(size, {}) | {key: _rounded(value) for key, value in row.items()}
    return {str(size): merged[size] for size in sorted(merged)}


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) and value == value else value if value == value else None
