"""Patch orders of a pair that exists: searched, compared, adopted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from model_store.assembly import Elasticity
from model_store.files import read_json, read_json_if_there

if TYPE_CHECKING:
    import torch

    from model_store.distill.elastic import ElasticModel
    from model_store.evaluate.job import EvaluateJob
    from model_store.pair import Pair


def open_with_order(job: EvaluateJob) -> tuple[Pair, bool]:
    """The pair in the order to be measured, and whether that is its own.

    A KLPatch order is known once `job.thresholds` is set; until then the pair has its own.
    """
    from model_store.pair import open_pair

    named = None if job.patch_order == "klpatch" else job.patch_order
    pair = open_pair(job.teacher, job.student, patch_order=named, thresholds=job.thresholds, store=job.store)
    if pair.student_path is None and (job.compare_orders or job.patch_order or job.calibration):
        raise ValueError("--patch-order, --compare-orders, --calibration: a teacher without a student has no order")
    own = open_pair(job.teacher, job.student, store=job.store).elasticity
    return pair, pair.elasticity.thresholds == own.thresholds


def search_order(model: ElasticModel, tokenizer: Any, job: EvaluateJob) -> Elasticity:
    """The KLPatch order on the first windows of every file of --calibration, found as `distill` finds it, or from the
    teacher down (--search), or for some places only (--search-places)."""
    import torch

    from model_store.distill.data import encode, read_documents
    from model_store.distill.order import greedy_order, kl_of_paths
    from model_store.evaluate.measure import windows
    from model_store.opening import opening

    found: list[torch.Tensor] = []
    separator = tokenizer("\n\n", add_special_tokens=False).input_ids
    for file in job.calibration or ():
        ids: list[int] = []
        for document in read_documents(file, "--calibration"):
            ids += [*(separator if ids else []), *encode(document, tokenizer, "all")[0]]
            if len(ids) >= job.calibration_windows * job.window_tokens:
                break
        found += windows(ids, job.window_tokens, job.calibration_windows, opening(tokenizer))
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    divergence = kl_of_paths(model, [torch.stack(found).to(model.device)])
    own = model.elasticity
    order = greedy_order(own, divergence, job.search, say, job.search_places)
    return Elasticity.from_order(own.num_teacher_layers, own.kept, order)


def compare_orders(
    model: ElasticModel, sizes: Sequence[int], held_out: Sequence[torch.Tensor], job: EvaluateJob,
    found: Elasticity | None,
) -> dict[str, dict[int, dict[str, float]]]:  # fmt: skip
    """Figures on windows of held-out text in the fixed orders and in the one that was `found`, by order and size."""
    from model_store.evaluate import measure_text

    own, measured = model.elasticity, {}
    orders = {name: getattr(Elasticity, name) for name in ("last_to_first", "first_to_last")}
    others = {name: make(own.num_teacher_layers, own.kept) for name, make in orders.items()}
    if found is not None:
        others["klpatch"] = found
    if job.patch_order is not None:
        others.pop(job.patch_order, None)  # measured already
    for name, order in others.items():
        model.elasticity = order
        shared = [size for size in sizes if size in order.sizes]  # blocks of unequal lengths give each order its own
        measured[name] = measure_text(model, shared, held_out)
    model.elasticity = own
    return measured


def adopt(pair: Pair, name: str) -> None:
    """Write the order of `pair`, called `name`, into its pair.json; figures of sizes in the one before are dropped."""
    from model_store.evaluate import QUALITY_FILE
    from model_store.weights import END_PARTS

    manifest_file, quality_file = pair.notes_path / "pair.json", pair.notes_path / QUALITY_FILE
    manifest = read_json_if_there(manifest_file)
    manifest = {key: value for key, value in manifest.items() if key.removesuffix("_threshold") not in END_PARTS}
    manifest |= {"patch_order": name, "thresholds": list(pair.elasticity.thresholds)}
    manifest_file.write_text(json.dumps(manifest, indent=1) + "\n")
    if quality_file.is_file():
        quality = read_json(quality_file) | {"measured": {}, "sizes": {}, "kinds": {}}
        quality_file.write_text(json.dumps(quality, indent=1) + "\n")
