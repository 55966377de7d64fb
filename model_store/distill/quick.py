"""`boomerang distill --quick`: a student in minutes, without training.

Some blocks of two layers become one, where that is measured to cost least; their layers are fitted by least squares to
what the block did (warm_start.py); and only sizes that held-out text has shown to be worth it are offered.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.distill.warm_start import fit_by_least_squares, fit_layer

if TYPE_CHECKING:
    from model_store.distill.job import DistillJob
    from model_store.evaluate.chat import Generate

_TOKENS = 50_000  # of text that is enough for a fit, where --tokens asks for more
_CHOICE_ROWS, _SCORED_ROWS, _ORDER_ROWS, _GATE_SHARE = 16, 4, 4, 8  # the gate gets one row of so many
_SHARE = 0.2  # of the layers that are taken away by default
_CALIBRATION = Path(__file__).parents[1] / "calibration.txt"
_PROMPT, _AT_ONCE = 24, 32  # tokens of that text that the teacher goes on from, and how many at once
_FITTED = ("self_attn.o_proj", "mlp.down_proj")  # of families whose students can be differences
_RANK = 256


def run_quick(job: DistillJob, generator: Callable[[DistillJob], Generate] | None = None) -> int:
    """Make the student and write the pair. ValueError if no size passes the gate."""
    from transformers import AutoTokenizer

    from model_store import lowrank
    from model_store.distill.from_pair import load_transformers
    from model_store.distill.write import write_full, write_low_rank, write_manifest
    from model_store.evaluate import store_quality
    from model_store.pair import open_pair
    from model_store.sources import default_teacher, resolve

    started = time.monotonic()
    teacher_path = resolve(job.teacher, job.store) if job.teacher else default_teacher(job.store)
    tokenizer = AutoTokenizer.from_pretrained(teacher_path, local_files_only=True)
    rows = _text(job, tokenizer, teacher_path, generator)
    num_gate = max(1, len(rows) // _GATE_SHARE)
    fitted, gate = rows[:-num_gate], rows[-num_gate:]
    if len(fitted) < 4:
        raise ValueError(f"--data gives {len(rows)} rows of {job.row_tokens} tokens: too few to fit and to measure on")
    teacher = load_transformers(teacher_path, torch.float32, job.store)
    num_layers = teacher.config.num_hidden_layers
    kept = _kept(job, num_layers, lambda: block_costs(teacher, fitted[:_CHOICE_ROWS], _say))
    _say(f"the student keeps {len(kept)} of {num_layers} layers; fitting on {fitted.numel():,} tokens")
    model = ElasticModel(teacher, Elasticity.last_to_first(num_layers, kept))
    fit_by_least_squares(model, list(fitted.split(8)), progress=_say, fits_attention=True)
    is_low_rank = teacher.config.model_type in lowrank.FAMILIES
    rank = job.rank or job.store_rank or _RANK
    if is_low_rank:
        round_to_rank(model, rank)
    model, figures = gated(order_by_kl(model, fitted[:_ORDER_ROWS]), gate, job.max_kl, _say)
    model.eval()
    job.out.mkdir(parents=True, exist_ok=True)
    if is_low_rank:
        write_low_rank(job.out, model, lambda name: rank if name in _FITTED else 1, None, True)
    else:
        write_full(job.out, model)
        tokenizer.save_pretrained(job.out)
    seconds = round(time.monotonic() - started)
    manifest = {
        "name": job.out.name, "teacher": job.teacher or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "patch_order": "thresholds", "command": "boomerang distill --quick", "data": [path.name for path in job.data],
        "tokens": fitted.numel(), "max_kl": job.max_kl, "seconds": seconds,
    }  # fmt: skip
    if job.licence:
        manifest["licence"] = job.licence
    write_manifest(job.out, model, manifest)
    pair = open_pair(teacher_path, job.out, store=job.store)
    text = f"held back from the fit, {len(gate)} rows of {job.row_tokens} tokens"
    store_quality(pair, {size: {"kl": kl} for size, kl in figures.items()}, {"text": text})
    sizes = ", ".join(f"{size}L {kl:.3f}" for size, kl in figures.items())
    name = job.teacher or teacher_path
    print(f"wrote {job.out} in {seconds} s: KL {sizes}\nserve it: boomerang serve --teacher {name} --student {job.out}")
    return 0


def _text(
    job: DistillJob, tokenizer: Any, teacher_path: Path, generator: Callable[[DistillJob], Generate] | None
) -> torch.Tensor:
    """Rows of token ids [rows, row_tokens]: of --data, else what the teacher says itself."""
    wanted = int(min(job.tokens, _TOKENS))
    if job.data:
        from model_store.distill.data import pack, read_documents

        documents = [document for path in job.data for document in read_documents(path)]
        return pack(documents, tokenizer, wanted, job.row_tokens, "all", job.seed).ids
    from model_store.distill.elastic import ElasticModel as Model
    from model_store.distill.from_pair import load_transformers
    from model_store.evaluate import end_tokens
    from model_store.evaluate.chat import transformers_generate

    prompt = tokenizer(_CALIBRATION.read_text(), add_special_tokens=False).input_ids
    pieces = [prompt[at : at + _PROMPT] for at in range(0, len(prompt) - _PROMPT, _PROMPT)]
    num_layers = AutoConfig.from_pretrained(teacher_path).num_hidden_layers
    if generator is not None:
        generate = generator(job)
    else:
        teacher = load_transformers(teacher_path, torch.float32, job.store)
        model = Model(teacher, Elasticity.of_teacher(num_layers), {})
        generate = transformers_generate(model, end_tokens(model, tokenizer))
    stream: list[int] = []
    with tqdm(total=wanted, desc="the teacher's own text", unit="token", file=sys.stderr) as bar:
        while len(stream) < wanted:
            asked = [pieces[(len(stream) + i) % len(pieces)] for i in range(_AT_ONCE)]
            said = generate(num_layers, asked, job.row_tokens - _PROMPT, job.temperature)
            new = [token for one, more in zip(asked, said, strict=True) for token in (*one, *more)]
            stream += new
            bar.update(len(new))
    whole = min(len(stream), wanted) // job.row_tokens * job.row_tokens
    rows = torch.tensor(stream[:whole]).view(-1, job.row_tokens)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed))]


def _kept(job: DistillJob, num_layers: int, costs: Callable[[], list[float]]) -> list[int]:
    """The kept layers: a list or a step as it says, else blocks of two that cost least."""
    from model_store.distill.recipe import kept_layers

    if job.keep.isdecimal():
        num_blocks = num_layers - int(job.keep)
        if not 0 < num_blocks <= num_layers // 2:
            least = num_layers - num_layers // 2
            raise ValueError(f"--keep {job.keep}: --quick keeps {least} to {num_layers - 1} layers")
    elif job.keep == "every-2nd":
        num_blocks = max(1, round(_SHARE * num_layers))
    else:
        return kept_layers(job.keep, num_layers)
    gone = {first + 1 for first in cheapest_blocks(costs(), num_blocks)}
    return [layer for layer in range(num_layers) if layer not in gone]


def cheapest_blocks(costs: Sequence[float], count: int) -> list[int]:
    """First layers of `count` blocks of two, no layer in two of them, of the least sum of costs[first layer]."""
    nothing: tuple[float, tuple[int, ...]] = (float("inf"), ())  # there are not so many blocks
    best = [[(0.0, nothing[1]), *[nothing] * count] for _ in range(2)]
    for first, cost in enumerate(costs):
        row = list(best[-1])
        for number in range(1, count + 1):
            before = best[-2][number - 1]
            row[number] = min(row[number], (before[0] + cost, (*before[1], first)))
        best.append(row)
    return list(best[-1][count][1])


@torch.no_grad()
def block_costs(teacher: Any, rows: torch.Tensor, say: Callable[[str], None] = lambda line: None) -> list[float]:
    """By first layer: KL to the teacher, in nats per token, where a block of two layers is its first one, fitted."""
    num_layers = teacher.config.num_hidden_layers
    every = ElasticModel(teacher, Elasticity(num_layers, range(num_layers - 1), [num_layers] * (num_layers - 1)), {})
    states = [every.embed(rows)]
    rope = every.rope(states[0])
    for layer in every.body.layers:
        states.append(every.run_layer(layer, states[-1], rope))
    scored = slice(0, _SCORED_ROWS)
    reference = F.log_softmax(every.logits(states[-1][scored]).float(), -1)
    costs = []
    for first in tqdm(range(num_layers - 1), desc="blocks", file=sys.stderr):
        layer = copy.deepcopy(every.body.layers[first]).float()
        fit_layer(every, layer, [([states[first]], 1.0)], [states[first + 2]], [rope], 3e-3)
        hidden = every.run_layer(layer, states[first][scored], rope)
        for after in every.body.layers[first + 2 :]:
            hidden = every.run_layer(after, hidden, rope)
        ours = F.log_softmax(every.logits(hidden).float(), -1)
        costs.append(float((reference.exp() * (reference - ours)).sum(-1).mean()))
    say(f"cost of a block by its first layer: {' '.join(f'{cost:.3f}' for cost in costs)}")
    return costs


def round_to_rank(model: ElasticModel, rank: int) -> None:
    """Make the student's layers what write_low_rank stores of them, so that what is measured is what is served."""
    from model_store.distill.write import low_rank_factors, quantise_rows

    for key, layer in model.student.items():
        base = model.body.layers[model.elasticity.stations[int(key)].start]
        for name in _FITTED:
            ours, theirs = (part.get_submodule(name).get_parameter("weight") for part in (layer, base))
            factors = low_rank_factors(ours.detach().float() - theirs.detach().float(), rank)
            a, b = (values.float() * scale[:, None] for values, scale in map(quantise_rows, factors))
            with torch.no_grad():
                ours.copy_(theirs.float() + b @ a)


def order_by_kl(model: ElasticModel, rows: torch.Tensor) -> ElasticModel:
    """The same model in the order that KLPatch finds on these rows."""
    from model_store.distill.order import greedy_order, kl_of_paths

    own = model.elasticity
    found = greedy_order(own, kl_of_paths(model, [rows]), "up")
    model.elasticity = Elasticity.from_order(own.num_teacher_layers, own.kept, found)
    return model


def gated(
    model: ElasticModel, rows: torch.Tensor, max_kl: float, say: Callable[[str], None] = lambda line: None
) -> tuple[ElasticModel, dict[int, float]]:
    """The model with the sizes that pass, and the KL of each on `rows`. ValueError if none does."""
    from model_store.distill.order import kl_of_paths

    own = model.elasticity
    divergence = kl_of_paths(model, [rows])
    measured = {size: divergence(own.path(size).teacher_stations) for size in own.sizes}
    say("KL on held-out text: " + ", ".join(f"{size}L {kl:.3f}" for size, kl in measured.items()))
    offered = offered_sizes(measured, max_kl)
    if len(offered) < 2:
        raise ValueError(f"no size is below --max-kl {max_kl:g}: the best has {min(list(measured.values())[:-1]):.3f}")
    if left := [size for size in measured if size not in offered]:
        say(f"not offered: {', '.join(f'{size}L' for size in left)}")
    elasticity, layers = only_sizes(own, offered)
    student: dict[int, nn.Module] = {
        station: model.student[str(old)] for station, old in layers.items() if str(old) in model.student
    }
    return ElasticModel(model.teacher, elasticity, student), {size: measured[size] for size in offered}


def offered_sizes(kl: Mapping[int, float], max_kl: float) -> list[int]:
    """Sizes, ascending, whose KL is at most `max_kl` and below that of every smaller one among them."""
    offered: list[int] = []
    for size in sorted(kl):
        if kl[size] <= max_kl and all(kl[size] < kl[smaller] for smaller in offered):
            offered.append(size)
    return offered


def only_sizes(own: Elasticity, offered: Sequence[int]) -> tuple[Elasticity, dict[int, int]]:
    """The pair with these sizes only (ascending, the teacher's among them), and its stations -> those of `own`.

    A block that all of them run whole becomes stations of one layer; others are put back at the next size offered.
    """
    kept: list[int] = []
    thresholds: list[int] = []
    stations: dict[int, int] = {}
    smallest, second = offered[0], offered[1]
    for station, threshold in zip(own.stations, own.thresholds, strict=True):
        if station.num_layers > 1 and threshold > smallest:
            stations[len(kept)] = station.index
            kept.append(station.start)
            thresholds.append(next(size for size in offered if size >= threshold))
            continue
        if station.num_layers == 1:
            stations[len(kept)] = station.index
        kept += range(station.start, station.stop)
        thresholds += [second] * station.num_layers
    return Elasticity(own.num_teacher_layers, kept, thresholds), stations


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
