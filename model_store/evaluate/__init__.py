"""`boomerang evaluate`: what every size of a pair is worth, measured and stored with the pair.

Offers `add_arguments(parser)` and `run(args)` to the command line; torch is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_store.evaluate.chat import Generate
    from model_store.pair import Pair

QUALITY_FILE = "quality.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--teacher", help="folder, GGUF file or hub id (default: the default pair's)")
    add("--student", help="folder or hub id of the student")
    orders = ("last_to_first", "first_to_last", "klpatch")
    add("--patch-order", choices=orders, help="measure this order, not the pair's own; klpatch: the one found on "
        "--calibration")  # fmt: skip
    add("--compare-orders", action="store_true", help="also last-to-first and first-to-last, beside the pair's own; "
        "with --calibration, KLPatch too")  # fmt: skip
    add("--calibration", type=Path, nargs="+", help="files of text or conversations, not the held-out ones, on which a "
        "KLPatch order is searched")  # fmt: skip
    add("--calibration-windows", type=int, default=8, help="windows of each of them to use (default %(default)s)")
    add("--search", choices=("up", "down"), default="up", help="from the student up, or from the teacher down, which "
        "favours the large sizes (default %(default)s)")  # fmt: skip
    add("--search-places", type=int, metavar="N", help="search the first N blocks that are added (--search down: the "
        "last N); the others stay in the pair's own order")  # fmt: skip
    add("--adopt-order", action="store_true", help="make the order of --patch-order the pair's own (in its pair.json)")
    add("--text", type=Path, help="held-out text file; figures are taken on its first windows")
    add("--windows", type=int, default=16, help="windows of the text to use (default %(default)s)")
    add("--window-tokens", type=int, default=512, help="tokens of a window (default %(default)s)")
    add("--chat", type=Path, help="file of held-out user messages, one per line: adds chat figures")
    add("--chat-limit", type=int, default=32, help="messages to use (default %(default)s)")
    add("--max-new-tokens", type=int, default=96, help="longest answer of the chat checks (default %(default)s)")
    add("--repetition-penalty", type=float, default=1.1, help="the chat checks count repeating answers under this "
        "penalty too (default %(default)s; 1: they do not)")  # fmt: skip
    add("--sizes", help="sizes to measure, as 16,20,30 (default: all)")
    add("--training-data", type=Path, nargs="*", default=[], help="files trained on: --text and --chat must not be in "
        "them, nor in the text of which `distill` left a fingerprint with the pair")  # fmt: skip
    add("--allow-overlap", type=float, default=0.0, help="share of 13-word runs, and of shorter texts, that may be in "
        "the training text (default %(default).0f)")  # fmt: skip
    add("--speed", action="store_true", help="also time each size: tokens per second of one request")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default %(default)s)")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    add("--report", type=Path, help="folder for quality.md, quality.svg and quality.html")
    add("--no-store", action="store_true", help="do not write quality.json into the pair")
    add("--store", help="folder of the local model store")
    parser.set_defaults(thresholds=None)  # of the order that `run` searches


def run(args: argparse.Namespace, generate: Generate | None = None) -> int:
    """Measure, print, store. `generate` answers the chat prompts, if given (an engine's); else transformers does."""
    import torch
    from transformers import AutoTokenizer

    from model_store.distill.from_pair import load_elastic
    from model_store.distill.processes import has_bf16, pick_device
    from model_store.evaluate.chat import chat_prompts, transformers_generate
    from model_store.evaluate.measure import is_monotone
    from model_store.evaluate.orders import adopt, compare_orders, open_with_order, search_order
    from model_store.evaluate.overlap import read_texts
    from model_store.evaluate.report import markdown, table, write_report

    if args.text is None and args.chat is None and not args.speed:
        raise ValueError("nothing to measure: give --text, --chat, --speed or several of them")
    for name in ("windows", "calibration_windows", "chat_limit", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.window_tokens < 2:
        raise ValueError("--window-tokens must be at least 2: a window's first token has nothing to be predicted from")
    device = pick_device(args.device)
    pair, is_own = open_with_order(args)
    if args.window_tokens > pair.spec.max_context:
        raise ValueError(
            f"--window-tokens {args.window_tokens}: the pair is served up to {pair.spec.max_context} tokens"
        )
    held_out = list(read_texts(args.text, "--text")) if args.text else []
    prompts = chat_prompts(args.chat, args.chat_limit) if args.chat else []
    provenance: dict[str, Any] = {"dtype": args.dtype} | _overlaps(pair, args, held_out, prompts)
    model = load_elastic(pair, getattr(torch, args.dtype), device)
    if args.dtype == "bfloat16" and not has_bf16(device == "cpu"):
        # Such a processor takes ten times as long for products of bfloat16 matrices. The weights stay rounded.
        model.teacher.float()
        model.float()
        provenance |= {"products": "float32"} if args.text or args.chat else {}
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path, local_files_only=True)

    found = search_order(model, tokenizer, args) if args.calibration else None
    if args.patch_order == "klpatch":
        args.thresholds = list(found.thresholds)  # for the engine that answers, too
        pair, is_own = open_with_order(args)
        model.elasticity = pair.elasticity
    sizes = _sizes(args.sizes, pair.elasticity.sizes)
    provenance["patch_order"] = pair.patch_order
    rows: dict[int, dict[str, Any]] = {size: {} for size in sizes}
    if args.text:
        ids = tokenizer("\n\n".join(held_out), add_special_tokens=False).input_ids
        provenance["text"] = f"{args.text.name}, first {args.windows} windows of {args.window_tokens} tokens"
        for size, row in measure_text(model, sizes, ids, args.window_tokens, args.windows).items():
            rows[size].update(row)
    if args.chat:
        provenance["chat"] = f"{args.chat.name}, {args.chat_limit} messages, greedy, at most {args.max_new_tokens}"
        if args.repetition_penalty != 1:
            provenance["repetition_penalty"] = args.repetition_penalty
        chat = measure_chat(model, sizes, tokenizer, prompts, args.max_new_tokens, args.repetition_penalty, generate)
        for size, row in chat.items():
            rows[size].update(row)
    if args.speed:
        speak = generate or transformers_generate(model, end_tokens(model, tokenizer))
        for size, speed in measure_speed(speak, sizes, tokenizer).items():
            rows[size]["tokens_per_second"] = speed
    _add_costs(pair, rows, getattr(torch, args.dtype))

    print(markdown(table(rows)))
    if args.text:
        worse = is_monotone({size: row["kl"] for size, row in rows.items()})
        falls = "KL to the teacher falls at every added layer."
        print("\n" + (f"KL to the teacher does not fall at {', '.join(map(str, worse))} layers." if worse else falls))
    orders = compare_orders(model, sizes, ids, args, found) if args.compare_orders and args.text else {}
    for name, other in orders.items():
        print(f"\n{name}\n\n{markdown(table(other))}")
    if args.report:
        notes = [f"{key}: {_note(value)}" for key, value in provenance.items()]
        write_report(args.report, f"{pair.name}, quality by size", notes, rows, orders)
    if not args.no_store:
        if args.adopt_order and not is_own:
            adopt(pair, args.patch_order)
            is_own = True
        if is_own:
            store_quality(pair, rows, provenance, orders)
        else:  # `sizes` of quality.json are read as those of the pair's own order
            store_quality(pair, {}, {}, orders | {args.patch_order: rows})
    return 0


def _overlaps(pair: Pair, args: argparse.Namespace, held_out: list[str], prompts: list[str]) -> dict[str, Any]:
    """Where --text and --chat were looked for and what share of them was found; OverlapError if it is too much.

    They are looked for in the text that an order is searched on, too.
    """
    from model_store.evaluate.overlap import check_overlap, fingerprint_of

    known = fingerprint_of(pair.notes_path)
    training = [*args.training_data, *(args.calibration or [])]
    if not args.training_data and known is None:
        _say("what the pair was trained on is not known here: overlap with it is not checked (--training-data)")
    elif known is not None and known.unknown:
        _say(f"the training started from {', '.join(known.unknown)}: what those were trained on is not checked")
    found = {}
    for name, texts in (("text", held_out), ("chat", prompts)):
        if texts and (overlap := check_overlap(f"--{name}", texts, training, known, args.allow_overlap)):
            found[f"{name}_overlap"] = overlap
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def _sizes(text: str | None, known: Sequence[int]) -> list[int]:
    if not text:
        return list(known)
    try:
        sizes = sorted({int(part.strip().removesuffix("L")) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--sizes: {text!r} is not a list of layer counts") from error
    if unknown := [size for size in sizes if size not in known]:
        raise ValueError(f"--sizes: the pair has no size {unknown[0]} (it has {known[0]} to {known[-1]})")
    return sizes


def measure_text(
    model: Any, sizes: Sequence[int], ids: Sequence[int], window_tokens: int, limit: int | None
) -> dict[int, dict[str, float]]:
    """Perplexity, KL and agreement per size on consecutive windows of token ids."""
    from tqdm import tqdm

    from model_store.evaluate.measure import score, summary, windows

    sequences = windows(ids, window_tokens, limit)
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
    orders: dict[str, dict[int, dict[str, Any]]] | None = None,
) -> Path:  # fmt: skip
    """Write quality.json beside the student: what `open_pair` reads back as `Pair.quality`.

    Figures of an earlier call that this one did not take stay; `orders` are the same sizes in other patch orders. Text
    or prompts that replace an earlier call's bring what is known of their overlap with the training text, or nothing.
    """
    file = pair.notes_path / QUALITY_FILE
    known = json.loads(file.read_text()) if file.is_file() else {}
    measured = known.get("measured", {})
    for kind in provenance.keys() & {"text", "chat"}:
        measured.pop("products", None)
        for stale in (f"{kind}_overlap", "overlap_13gram"):  # the latter: of both, by earlier versions
            measured.pop(stale, None)
    content = {"measured": measured | provenance, "sizes": _merged(known.get("sizes", {}), rows)}
    if other := known.get("orders", {}) | {name: _merged({}, found) for name, found in (orders or {}).items()}:
        content["orders"] = other
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _merged(known: dict[str, dict[str, Any]], rows: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    merged = {int(size): row for size, row in known.items()}
    for size, row in rows.items():
        merged[size] = merged.get(size, {}) | {key: _rounded(value) for key, value in row.items()}
    return {str(size): merged[size] for size in sorted(merged)}


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) and value == value else value if value == value else None
