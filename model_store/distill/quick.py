"""`boomerang distill --quick`: a student in minutes.

Some blocks of two layers become one, where that is measured to cost least; their layers are fitted by least squares to
what the block did (warm_start.py), then trained for as long as there is time (polish.py); and only sizes that held-out
text has shown to be worth it are offered. A run goes on from where an earlier one of the same job was ended.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig

from model_store import made
from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.distill.gate import gated, order_by_kl
from model_store.distill.polish import Clock, train
from model_store.distill.warm_start import fit_by_least_squares, fit_layer
from model_store.opening import in_windows, opening

if TYPE_CHECKING:
    from model_store.distill.job import DistillJob
    from model_store.evaluate.chat import Generate
    from model_store.pair import Pair

_FIT_TOKENS, _TOKENS = 50_000, 150_000  # of text that is enough for a fit, and for minutes of training
_CHOICE_ROWS, _SCORED_ROWS, _ORDER_ROWS, _TOLD_ROWS = 16, 6, 12, 4
_GATE_SHARE, _GATE_ROWS = 8, 16  # the gate gets one row of so many, and at most so many
_SHARE = 0.2  # of the layers that are taken away by default
_CALIBRATION = Path(__file__).parents[1] / "calibration.txt"
_PROMPT, _AT_ONCE = 24, 32  # tokens of that text that the teacher goes on from, and how many texts at once
_FITTED = ("self_attn.o_proj", "mlp.down_proj")  # what a fit changes in families whose students can be differences
_RANK = 256
_SHARES = {"text": 0.1, "blocks": 0.2, "fit": 0.25, "training": 0.97}  # of the work, when each is done


def run_quick(
    job: DistillJob, generator: Callable[[DistillJob], Generate] | None = None,
    nested: Callable[[Pair], Path] | None = None,
) -> int:  # fmt: skip
    """Make the student and write the pair, to --out or to its place in the store. ValueError if no size passes the
    gate. `nested` makes nested codes of a pair, where the store has those of the teacher."""
    if job.background:
        _retire()
    making = _Making(job, nested)
    if making.place is None:
        making.run(generator)
        return 0
    before = made.newest(making.place)
    with made.only_one(making.place):
        if made.newest(making.place) == before or (making.work / "state.pt").is_file():
            making.run(generator)
    return 0


@contextlib.contextmanager
def _fast_products() -> Iterator[None]:
    """float32 products in bfloat16 where processors have them: half of the time of a fit, which is as good."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _retire() -> None:
    """No longer life than the process that started this one, and the lowest priority there is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: holds for stopped processes, too
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(19)


class _Making:
    """One student in the making. What is done is kept in `work`, for a run that goes on from it."""

    def __init__(self, job: DistillJob, nested: Callable[[Pair], Path] | None) -> None:
        from transformers import AutoTokenizer

        from model_store import lowrank
        from model_store.pair import made_folder
        from model_store.published import DEFAULT_TEACHER
        from model_store.sources import default_teacher, resolve

        self.job, self.nested = job, nested
        self.teacher_path = resolve(job.teacher, job.store) if job.teacher else default_teacher(job.store)
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher_path, local_files_only=True)
        self.config = AutoConfig.from_pretrained(self.teacher_path)
        self.is_low_rank = self.config.model_type in lowrank.FAMILIES
        self.rank = job.rank or job.store_rank or _RANK
        self.place = None if job.out else made_folder(job.teacher or DEFAULT_TEACHER, job.store)
        self.work = made.work_folder(self.place) if self.place else Path(job.out or "") / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.clock = Clock()
        self.kl: dict[int, float] = {}

    def tell(self, stage: str, share: float) -> None:
        """Let others know how far it is."""
        if self.place is not None:
            made.write_progress(self.place, made.Progress(stage, share, self.kl))

    def run(self, generator: Callable[[DistillJob], Generate] | None) -> None:
        job, state = self.job, self._saved()
        self.tell("the teacher's own text", state.get("share", 0.0))
        if "rows" not in state:
            state["rows"] = _text(job, self.tokenizer, self.teacher_path, generator)
            self._save(state, _SHARES["text"])
        rows = state["rows"]
        num_gate = min(_GATE_ROWS, max(1, len(rows) // _GATE_SHARE))
        rows, gate = rows[:-num_gate], rows[-num_gate:]
        if len(rows) < 4:
            raise ValueError(
                f"--data gives {len(rows)} rows of {job.row_tokens} tokens: too few to fit and to measure on"
            )
        model = self._fitted(state, rows)
        seconds = 60 * job.minutes * _SHARES["training"] - state["seconds"]
        if seconds > 0:
            if not (self.work / "training.pt").is_file():
                self._first(model, gate, state)
            self._train(model, rows, gate, seconds)
        self._publish(model, gate, rows.numel(), job.minutes > 0 and seconds > 0)
        self.tell("finished", 1.0)
        shutil.rmtree(self.work, ignore_errors=True)

    # --- steps

    def _teacher(self) -> Any:
        from model_store.distill.cpu_attention import use_matmul_attention
        from model_store.distill.from_pair import load_transformers

        teacher = load_transformers(self.teacher_path, torch.float32, self.job.store)
        use_matmul_attention(teacher, self.job.row_tokens)
        return teacher

    def _fitted(self, state: dict[str, Any], rows: torch.Tensor) -> ElasticModel:
        """The student as the closed form has it, in its patch order."""
        teacher, num_layers = self._teacher(), self.config.num_hidden_layers
        if "kept" not in state:
            self.tell("choosing blocks", _SHARES["text"])
            costs = lambda: block_costs(teacher, rows[:_CHOICE_ROWS], self._judged(rows, _SCORED_ROWS), _say)  # noqa: E731
            with _fast_products():
                state["kept"] = _kept(self.job, num_layers, costs)
            self._save(state, _SHARES["blocks"])
        kept = state["kept"]
        model = ElasticModel(teacher, Elasticity.last_to_first(num_layers, kept))
        if "student" in state:
            model.student.load_state_dict(state["student"])
            model.elasticity = Elasticity(num_layers, kept, state["thresholds"])
            return model
        self.tell("fitting", _SHARES["blocks"])
        enough = rows[: max(1, _FIT_TOKENS // rows.shape[1])]
        _say(f"the student keeps {len(kept)} of {num_layers} layers; fitting on {enough.numel():,} tokens")
        with _fast_products():
            fit_by_least_squares(model, list(enough.split(8)), progress=_say, fits_attention=True)
        if self.is_low_rank:
            round_to_rank(model, self._rank_of(is_trained=False))
        with _fast_products():
            order_by_kl(model, self._judged(rows, _ORDER_ROWS))
        state["student"], state["thresholds"] = model.student.state_dict(), list(model.elasticity.thresholds)
        self._save(state, _SHARES["fit"])
        return model

    def _judged(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """So many rows of text by which blocks are compared: of --data, else of what people wrote. In the teacher's own
        text blocks look equal of which one costs an encyclopaedia twice as much as the other."""
        if self.job.data:
            return rows[:count]
        text = _in_rows(
            self.tokenizer(_CALIBRATION.read_text(), add_special_tokens=False).input_ids, self.tokenizer, rows.shape[1]
        )
        return text[:: max(1, len(text) // count)][:count]

    def _first(self, model: ElasticModel, gate: torch.Tensor, state: dict[str, Any]) -> None:
        """Offer what the fit alone is worth, while the training goes on from it."""
        if self.place is None or state.get("is_published"):
            return
        try:
            self._publish(model, gate, _FIT_TOKENS, is_trained=False)
        except ValueError as error:
            _say(f"before training, {error}")
        state["is_published"] = True
        self._save(state, _SHARES["fit"])

    def _train(self, model: ElasticModel, rows: torch.Tensor, gate: torch.Tensor, seconds: float) -> None:
        """Train in bfloat16 where that is worth it; the model is left as it was, but for the student."""
        from model_store.distill.order import kl_of_paths
        from model_store.distill.processes import has_bf16

        teacher = self._teacher().to(torch.bfloat16 if has_bf16(on_cpu=True) else torch.float32)
        trained = ElasticModel(teacher, model.elasticity, dict(_layers(model)))
        own, first = model.elasticity, _SHARES["fit"]
        with tqdm(total=100, desc="training", unit="%", file=sys.stderr) as bar:

            def report(phase: str, share: float) -> None:
                divergence = kl_of_paths(trained, [gate[:_TOLD_ROWS]])
                self.kl = {size: divergence(own.path(size).teacher_stations) for size in own.sizes[:-1]}
                self.tell(f"training {phase}", first + share * (_SHARES["training"] - first))
                bar.set_postfix_str("KL " + ", ".join(f"{size}L {kl:.3f}" for size, kl in self.kl.items()))
                bar.update(round(100 * share) - bar.n)

            train(trained, rows, self.rank, seconds, self.work / "training.pt", report, self.job.seed)
            bar.update(100 - bar.n)
        if self.is_low_rank:
            round_to_rank(model, self._rank_of(is_trained=True))

    def _rank_of(self, is_trained: bool) -> Callable[[str], int]:
        return lambda name: self.rank if is_trained or name in _FITTED else 1

    def _publish(self, model: ElasticModel, gate: torch.Tensor, num_tokens: int, is_trained: bool) -> None:
        """Write the pair of the sizes that pass. ValueError if none does."""
        from model_store.distill.write import write_full, write_low_rank, write_manifest
        from model_store.evaluate import store_quality
        from model_store.pair import open_pair

        job = self.job
        self.tell("measuring", _SHARES["training" if is_trained else "fit"])
        model, figures = gated(model, gate, job.max_kl, _say)
        self.kl = {size: kl for size, kl in figures.items() if kl}
        model.eval()
        out = self.work / "pair" if self.place else Path(job.out or "")
        if self.place:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        if self.is_low_rank:
            write_low_rank(out, model, self._rank_of(is_trained), None, True)
        else:
            write_full(out, model)
            self.tokenizer.save_pretrained(out)
        seconds = round(self.clock.spent)
        manifest = {
            "name": _name_of(self.teacher_path) if self.place else out.name,
            "teacher": job.teacher or "HuggingFaceTB/SmolLM2-135M-Instruct",
            "patch_order": "thresholds", "command": "boomerang distill --quick",
            "data": [path.name for path in job.data], "tokens": num_tokens, "is_trained": is_trained,
            "max_kl": job.max_kl, "seconds": seconds,
        }  # fmt: skip
        if job.licence:
            manifest["licence"] = job.licence
        write_manifest(out, model, manifest)
        pair = open_pair(self.teacher_path, out, store=job.store)
        text = f"held back from the fit, {len(gate)} rows of {job.row_tokens} tokens"
        store_quality(pair, {size: {"kl": kl} for size, kl in figures.items()}, {"text": text})
        sizes = ", ".join(f"{size}L {kl:.3f}" for size, kl in figures.items())
        name = job.teacher or self.teacher_path
        if self.place is None:
            print(f"wrote {out} in {seconds} s: KL {sizes}\nserve it: boomerang serve --teacher {name} --student {out}")
            return
        self._nest(out)
        out = made.publish(self.place, out)
        print(f"wrote {out}: KL {sizes}\nserve it: boomerang serve --teacher {name} --student make", flush=True)

    def _nest(self, student: Path) -> None:
        """Codes of the pair, where the store has those of the teacher: a server that reads them needs the student's."""
        from model_store.nested_store import has_nested
        from model_store.pair import NO_STUDENT, open_pair
        from model_store.store import store_root

        store = self.job.store
        if self.nested and has_nested(open_pair(self.teacher_path, NO_STUDENT, store=store), store_root(store)):
            self.nested(open_pair(self.teacher_path, student, store=store))

    # --- what is kept

    @property
    def _key(self) -> str:
        """What a state must have been made for."""
        job = self.job
        data = [(str(path), path.stat().st_mtime_ns) for path in job.data]
        asked = (job.tokens, job.row_tokens, job.keep, job.seed, job.temperature, self.rank, job.minutes > 0)
        return repr((str(self.teacher_path), data, asked))

    def _saved(self) -> dict[str, Any]:
        file = self.work / "state.pt"
        state = torch.load(file, weights_only=True) if file.is_file() else {}
        if state.get("key") == self._key:
            _say(f"going on from {self.work}")
            return state
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return {"key": self._key, "seconds": 0.0}

    def _save(self, state: dict[str, Any], share: float) -> None:
        state["seconds"], state["share"] = state["seconds"] + self.clock.spent, share
        self.clock = Clock()
        part = self.work / "state.part"
        torch.save(state, part)
        os.replace(part, self.work / "state.pt")


def _layers(model: ElasticModel) -> list[tuple[int, nn.Module]]:
    """The student's layers by station: the same modules, so that whoever trains them trains these."""
    return [(int(key), layer) for key, layer in model.student.items()]


def _name_of(path: Path) -> str:
    return path.name.rsplit("--", 1)[-1].lower()


def _text(
    job: DistillJob, tokenizer: Any, teacher_path: Path, generator: Callable[[DistillJob], Generate] | None
) -> torch.Tensor:
    """Rows of token ids [rows, row_tokens]: of --data, else what the teacher says itself.

    Half of that goes on from a text, half from one token, any of the vocabulary: without these, blocks that an
    encyclopaedia needs look cheap (docs/log/2026-11-30-sizes-that-appear.md).
    """
    wanted, first = int(min(job.tokens, _TOKENS if job.minutes else _FIT_TOKENS)), opening(tokenizer)
    if job.data:
        from model_store.distill.data import pack, read_documents

        documents = [document for path in job.data for document in read_documents(path)]
        return pack(documents, tokenizer, wanted, job.row_tokens, "all", job.seed, first).ids
    from model_store.distill.elastic import ElasticModel as Model
    from model_store.distill.from_pair import load_transformers
    from model_store.evaluate import end_tokens
    from model_store.evaluate.chat import transformers_generate

    prompt = tokenizer(_CALIBRATION.read_text(), add_special_tokens=False).input_ids
    rng, special = random.Random(job.seed), {*tokenizer.all_special_ids}
    words = [token for token in range(tokenizer.vocab_size) if token not in special]
    pieces = [prompt[at : at + _PROMPT] for at in range(0, len(prompt) - _PROMPT, _PROMPT)]
    num_layers = AutoConfig.from_pretrained(teacher_path).num_hidden_layers
    if generator is not None:
        generate = generator(job)
    else:
        teacher = load_transformers(teacher_path, torch.float32, job.store)
        model = Model(teacher, Elasticity.of_teacher(num_layers), {})
        generate = transformers_generate(model, end_tokens(model, tokenizer))
    stream: list[int] = []
    step = job.row_tokens - len(first)
    with tqdm(total=wanted, desc="the teacher's own text", unit="token", file=sys.stderr) as bar:
        while len(stream) < wanted:
            asked = [pieces[(len(stream) + i) % len(pieces)] if i % 2 else [rng.choice(words)] for i in range(_AT_ONCE)]
            said = generate(num_layers, [[*first, *piece] for piece in asked], step - _PROMPT, job.temperature)
            new = [token for one, more in zip(asked, said, strict=True) for token in (*one, *more)]
            stream += new
            bar.update(len(new))
    rows = _in_rows(stream[:wanted], tokenizer, job.row_tokens)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed))]


def _in_rows(ids: list[int], tokenizer: Any, row_tokens: int) -> torch.Tensor:
    """Token ids in rows [n, row_tokens], each with the tokenizer's opening; the remainder is dropped."""
    return torch.tensor(in_windows(ids, row_tokens, opening(tokenizer)))


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
def block_costs(
    teacher: Any, rows: torch.Tensor, judged: torch.Tensor, say: Callable[[str], None] = lambda line: None
) -> list[float]:
    """By first layer: KL to the teacher, in nats per token of `judged`, where a block of two layers is its first one,
    fitted on `rows`; token ids [rows, tokens] both."""
    num_layers = teacher.config.num_hidden_layers
    every = ElasticModel(teacher, Elasticity(num_layers, range(num_layers - 1), [num_layers] * (num_layers - 1)), {})
    states = [every.embed(torch.cat((rows, judged)))]
    rope = every.rope(states[0])
    for layer in every.body.layers:
        states.append(every.run_layer(layer, states[-1], rope))
    fitted, scored = slice(0, len(rows)), slice(len(rows), None)
    reference = F.log_softmax(every.logits(states[-1][scored]).float(), -1)
    costs = []
    for first in tqdm(range(num_layers - 1), desc="blocks", file=sys.stderr):
        layer = copy.deepcopy(every.body.layers[first]).float()
        fit_layer(every, layer, [([states[first][fitted]], 1.0)], [states[first + 2][fitted]], [rope], 3e-3)
        hidden = every.run_layer(layer, states[first][scored], rope)
        for after in every.body.layers[first + 2 :]:
            hidden = every.run_layer(after, hidden, rope)
        ours = F.log_softmax(every.logits(hidden).float(), -1)
        costs.append(float((reference.exp() * (reference - ours)).sum(-1).mean()))
    say(f"cost of a block by its first layer: {' '.join(f'{cost:.3f}' for cost in costs)}")
    return costs


def round_to_rank(model: ElasticModel, rank: Callable[[str], int]) -> None:
    """Make the student's layers what write_low_rank stores of them, so that what is measured is what is served."""
    from model_store.distill.write import low_rank_factors, quantise_rows

    for key, layer in model.student.items():
        base = model.body.layers[model.elasticity.stations[int(key)].start]
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            ours, theirs = linear.weight, base.get_submodule(name).get_parameter("weight")
            factors = low_rank_factors(ours.detach().float() - theirs.detach().float(), rank(name))
            a, b = (values.float() * scale[:, None] for values, scale in map(quantise_rows, factors))
            with torch.no_grad():
                ours.copy_(theirs.float() + b @ a)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
