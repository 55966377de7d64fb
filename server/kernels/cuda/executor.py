"""The CUDA executor: library products and Triton kernels, decode steps as CUDA graphs.

A decode step of one size is one graph over the whole path. With mixed sizes every station has one graph for each side;
the rows of both sides lie left-aligned in two buffers and move between them where the cut moves, so addresses never
change. A student kept as a difference runs in the teacher's products: its stations have one graph for all rows, in
batch order, and one for the layers that only the teacher's rows have. Steps with prompts in them are launched kernel
by kernel.

T = tokens of the step, R = requests, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import numpy as np
import torch

from model_store.pair import LoadedPair
from model_store.weight_form import Storage
from server.core.batch import ForwardBatch
from server.core.config import EngineConfig
from server.core.executor import GREEDY, Draw, Executor, Follows
from server.kernels.cuda.attention import PagedAttention
from server.kernels.cuda.draw import draw
from server.kernels.cuda.ends import Ends
from server.kernels.cuda.graphs import Graphs, bucket_of, buckets
from server.kernels.cuda.inputs import DecodeInputs, StepInputs
from server.kernels.cuda.layer import Difference, Lane, Layers
from server.kernels.cuda.logits import DeviceLogits
from server.kernels.cuda.staging import Download, Upload
from server.kernels.cuda.support import refusal
from server.kernels.cuda.tables import DeviceTables
from server.kernels.cuda.weights import bytes_per_weight, pack

logger = logging.getLogger(__name__)


def create(pair: LoadedPair, config: EngineConfig) -> CudaExecutor | str:
    """The executor, or the reason why this pair or this machine cannot have it."""
    return refusal(pair, config) or CudaExecutor(pair.in_torch(), config)


class CudaExecutor(Executor):
    """Library products, Triton kernels, and a graph for whatever repeats. Takes over the pair: its codes are packed."""

    name = "cuda"
    can_draw = can_launch = True
    logit_ops = DeviceLogits()

    def __init__(self, pair: LoadedPair, config: EngineConfig) -> None:
        self.spec, self.elasticity, self._ends = pair.spec, pair.elasticity, Ends(pair.spec, pair.ends)
        self.sizes = pair.sizes
        self.weight_form, self._kinds = pair.form, pair.kinds()
        self.shared_stations = pair.shared_stations if pair.low_rank else frozenset()
        sample = pair.ends["teacher"].final_norm_weight
        self.dtype, self.device = sample.dtype, sample.device
        self.page_size = config.page_size
        spec, device = self.spec, self.device
        pack(pair, device)
        self.widths = pair.widths
        self._bytes_per_weight = {width: bytes_per_weight(pair, width) for width in self.widths}
        self.bytes_per_weight = self._bytes_per_weight[self.widths[-1]]
        # Each guess is a row.
        max_rows = config.max_num_seqs * (1 + (config.num_speculative_tokens if config.speculates else 0))
        num_stations = len(self.elasticity.stations)
        self._attention = PagedAttention(
            num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            scale=spec.attention_scale, max_rows=max_rows, num_programs=2 * _num_processors(device),
            dtype=self.dtype, device=device,
        )  # fmt: skip
        # Drafts of a smaller size have tables of their own.
        num_slots = config.max_num_seqs * (1 if config.speculative_size is None else 2)
        num_blocks = -(-config.max_model_len // config.page_size)
        self._tables = DeviceTables(self.elasticity.num_global_layers, num_slots, num_blocks, device)
        self._layers = Layers(spec, pair.layers, self._attention, self._tables, config.max_model_len, device)
        self._graphs = Graphs(device, enabled=not config.enforce_eager)
        self._buckets = buckets(max_rows)
        self._student_slots = np.array(
            [
                (self.elasticity.student_layer(station.index) - station.start) * num_slots
                for station in self.elasticity.stations
            ]
        )  # from a row of the block tables of a station's first layer to the same row of its student layer's
        self._inputs = DecodeInputs(
            max_rows, num_stations, device, self.widths[-1], self._student_slots if self.shared_stations else None
        )
        self._students = {layer: Difference.of(delta) for layer, delta in pair.low_rank.items()}
        self._upload = Upload(8 * config.max_num_batched_tokens, np.int32, device)
        self._draw_upload = Upload(5 * max_rows, np.float64, device)
        self._no_limit = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)
        # Left-aligned hidden rows of both sides, and what a decode step leaves: zeroed, for padding is computed too.
        self._x = torch.zeros(2, max_rows, spec.hidden_size, dtype=self.dtype, device=device)
        self._hidden = torch.zeros(max_rows, spec.hidden_size, dtype=self.dtype, device=device)
        self._logits = torch.zeros(max_rows, spec.vocab_size, dtype=self.dtype, device=device)
        self._row_numbers = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._ready: torch.Tensor | None = None  # rows whose logits `_logits` holds

    # --- Executor

    def describe(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu (interpreted)"
        graphs = f"{len(self._graphs)} CUDA graphs" if self._graphs.enabled else "no CUDA graphs"
        kind = str(self.weight_form)
        if self.weight_form.storage in (Storage.CODES, Storage.NESTED):
            kind = f"{self.weight_form.dtype}, weights in codes ({self._kinds})"
        return f"Triton on {where}, {kind}, {graphs}, pages of {self.page_size} tokens"

    def bytes_per_weight_at(self, width: int) -> float:
        return self._bytes_per_weight[width]

    def page_bytes(self) -> int:
        return 2 * self.spec.num_kv_heads * self.page_size * self.spec.head_dim * self.dtype.itemsize

    def allocate_kv(self, num_pages: int) -> None:
        """Also records the graphs. ValueError if the memory is not there."""
        self._graphs.clear()
        try:
            self._layers.allocate(num_pages, self.page_size, self.dtype)
        except torch.OutOfMemoryError as error:
            need = num_pages * self.page_bytes() / 2**30
            raise ValueError(
                f"the KV cache of {need:.2f} GiB does not fit on the device: lower --kv-cache-memory or "
                f"--gpu-memory-utilization ({error})"
            ) from error
        if self._graphs.enabled:
            self._record()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        with self._undone_if_it_fails():
            return self._forward(batch)

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        if self._is_decode(batch) and self._width_of(batch) is not None:
            self._run_decode(batch)
            if len(batch.logits_rows) == batch.num_tokens:
                self._ready = self._hidden[: batch.num_tokens]
                return self._ready
            return self._hidden[torch.from_numpy(batch.logits_rows).to(self.device)]
        return self._run_any(batch)

    @torch.no_grad()  # not inference mode: the engine writes to them outside
    def logits(self, hidden: torch.Tensor, num_teacher: int, widths: np.ndarray | None = None) -> torch.Tensor:
        if hidden is self._ready:
            return self._logits[: len(hidden)].float()
        out = torch.empty(len(hidden), self.spec.vocab_size, dtype=self.dtype, device=self.device)
        self._ends.head(hidden, num_teacher, out, widths)
        return out.float()

    @torch.inference_mode()
    def greedy(self, hidden: torch.Tensor, num_teacher: int, widths: np.ndarray | None = None) -> list[int]:
        """The likeliest token of each row; -1 where no logit is a finite number."""
        if hidden is self._ready:
            logits = self._logits[: len(hidden)]
        else:
            logits = torch.empty(len(hidden), self.spec.vocab_size, dtype=self.dtype, device=self.device)
            self._ends.head(hidden, num_teacher, logits, widths)
        return self._draw(logits, [GREEDY] * len(logits)).wait()

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
        """One token per row of logits [S, V]."""
        return self._draw(logits, draws).wait()

    # --- without waiting

    @torch.inference_mode()
    def launch(self, batch: ForwardBatch, draws: list[Draw], *, follows: Follows | None = None) -> Download:
        """Run a step whose requests all take one token and draw the next one of each; nothing waits for the device.

        `follows`: the input ids are what a launch before drew in these rows, int32 [R]; the host need not know them
        yet. Waiting for the result gives a list of token ids, -1 where no logit is a finite number.
        """
        assert self._is_decode(batch) and len(batch.logits_rows) == batch.num_requests == len(draws)
        with self._undone_if_it_fails():
            logits = self._logits[: batch.num_requests]
            if self._width_of(batch) is None:
                hidden = self._run_any(batch, follows=follows)
                self._ends.head(hidden, batch.head_cut, logits, batch.widths)
            else:
                self._run_decode(batch, follows=follows)
            return self._draw(logits, draws)

    @contextlib.contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """After an error nobody knows what reached the block tables; and memory that ran out is given back."""
        try:
            yield
        except Exception as error:
            self._tables.forget()
            self._ready = None
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            raise

    # --- steps of any kind

    def _run_any(self, batch: ForwardBatch, *, follows: Follows | None = None) -> torch.Tensor:
        self._ready = None
        updates = self._tables.changes(batch, self.page_size)
        inputs = StepInputs.send(batch, updates, self._upload, self._attention.max_queries, self._no_limit)
        self._tables.apply(inputs.updates)
        if follows is not None:
            before, followed = follows
            assert isinstance(before, Download), "a step follows one of this executor's own"
            inputs.ids.copy_(before.ids(torch.from_numpy(followed).to(self.device)))
        x = torch.empty(batch.num_tokens, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        split = int(batch.query_start[batch.embed_cut])
        for end, rows in self._ends.sides(split, batch.num_tokens):
            self._ends.embed(end, inputs.ids[rows], inputs.positions[rows], x[rows])
        lanes: dict[tuple[int, int], Lane] = {}
        for segment in batch.program:
            key, hidden_rows = (segment.start, segment.stop), x[batch.tokens(segment.start, segment.stop)]
            if segment.split is not None:
                lane = inputs.joint_lane(*key, segment.split, int(self._student_slots[segment.station]))
                self._layers.run(hidden_rows, segment.layer, lane, student=self._student_of(segment.station))
                continue
            lane = lanes.get(key) or lanes.setdefault(key, inputs.lane(*key))
            self._layers.run(hidden_rows, segment.layer, lane)
        wanted = x.index_select(0, inputs.logits_rows)
        hidden = torch.empty_like(wanted)
        for end, rows in self._ends.sides(int(batch.logits_start[batch.norm_cut]), len(wanted)):
            self._ends.norm(end, wanted[rows], hidden[rows])
        return hidden

    # --- decode steps, recorded

    def _is_decode(self, batch: ForwardBatch) -> bool:
        return batch.num_tokens == batch.num_requests

    def _width_of(self, batch: ForwardBatch) -> int | None:
        """The width that all rows read; None if there are several."""
        if batch.widths is None:
            return self.widths[-1]
        first = int(batch.widths[0])
        return first if (batch.widths == first).all() else None

    def _run_decode(self, batch: ForwardBatch, *, follows: Follows | None = None) -> None:
        """Leaves final-normed rows in `_hidden` and their logits in `_logits`, in batch order."""
        width = self._width_of(batch)
        assert width is not None, "rows of several widths are launched kernel by kernel"
        self._ready = None
        updates = self._tables.changes(batch, self.page_size)
        before, followed = follows or (None, np.zeros(0, np.int32))
        assert before is None or isinstance(before, Download), "a step follows one of this executor's own"
        sent: list[torch.Tensor] = []
        if len(updates) or len(followed):
            sent = self._upload.send([updates, followed])
            self._tables.apply(sent[0])
        num, sizes = batch.num_requests, batch.sizes
        splits = np.searchsorted(-sizes, -np.asarray(self.elasticity.thresholds), side="right").astype(np.int32)
        self._inputs.send(batch, splits, width)
        if before is not None and sent:
            self._inputs.take_ids(before.ids(sent[1]))
        if sizes[0] == sizes[-1]:
            self._run_path(int(sizes[0]), bucket_of(num, self._buckets))
        elif self.shared_stations:
            self._run_joint(num, splits.tolist())
        else:
            self._run_sides(batch, splits.tolist())

    def _run_path(self, size: int, rows: int) -> None:
        path = self.elasticity.path(size)

        def run() -> None:
            x, lane = self._x[0, :rows], self._inputs.lane(0, rows, None)
            self._ends.embed(getattr(self._ends, path.embed_from), self._inputs.ids[0, :rows], lane.positions, x)
            for layer in path.layers:
                student = self._students.get(layer)
                own = layer if student is None else self.elasticity.kept[layer - self.elasticity.num_teacher_layers]
                self._layers.run(x, own, lane, kv_layer=layer, student=student)
            self._ends.norm(getattr(self._ends, path.norm_from), x, self._hidden[:rows])
            num_teacher = rows if path.head_from == "teacher" else 0
            self._ends.head(self._hidden[:rows], num_teacher, self._logits[:rows], self._inputs.widths(rows))

        self._graphs.run(("path", size, rows, self._inputs.width), run)

    def _run_sides(self, batch: ForwardBatch, splits: list[int]) -> None:
        num, cut = batch.num_requests, batch.embed_cut
        for side, count in enumerate((cut, num - cut)):
            if count:
                ids, positions = self._inputs.ids[side, :count], self._inputs.lane(side, count, None).positions
                self._ends.embed((self._ends.teacher, self._ends.student)[side], ids, positions, self._x[side, :count])
        for station, split in enumerate(splits):
            self._move(cut, split, num)
            cut = split
            for side, count in enumerate((cut, num - cut)):
                if count:
                    self._run_station(station, side, bucket_of(count, self._buckets))
        self._move(cut, batch.norm_cut, num)
        cut = batch.norm_cut
        if cut:
            self._ends.norm(self._ends.teacher, self._x[0, :cut], self._hidden[:cut])
        if cut < num:
            rows = self._x[1, : num - cut].flip(0)
            self._ends.norm(self._ends.student, rows, self._hidden[cut:num])
        self._ends.head(self._hidden[:num], batch.head_cut, self._logits[:num], batch.widths)

    def _run_station(self, index: int, side: int, rows: int) -> None:
        station = self.elasticity.stations[index]
        layers = range(station.start, station.stop) if side == 0 else (self.elasticity.student_layer(index),)

        def run() -> None:
            lane = self._inputs.lane(side, rows, index)
            for layer in layers:
                self._layers.run(self._x[side, :rows], layer, lane)

        self._graphs.run(("station", index, side, rows, self._inputs.width), run)

    def _run_joint(self, num: int, splits: list[int]) -> None:
        """Stations that both sides run together: all rows in batch order, the teacher's in front."""
        end = self._ends.teacher  # which a student kept as a difference has too
        self._ends.embed(end, self._inputs.ids[0, :num], self._inputs.lane(0, num, None).positions, self._x[0, :num])
        for station, split in enumerate(splits):
            if split == num:
                self._run_station(station, 0, bucket_of(num, self._buckets))
                continue
            self._run_shared_layer(station, bucket_of(num, self._buckets))
            if split:
                self._run_rest(station, bucket_of(split, self._buckets))
        self._ends.norm(end, self._x[0, :num], self._hidden[:num])
        self._ends.head(self._hidden[:num], num, self._logits[:num], self._inputs.widths(num))

    def _run_shared_layer(self, index: int, rows: int) -> None:
        def run() -> None:
            layer = self.elasticity.stations[index].start
            lane = self._inputs.joint_lane(rows, index)
            self._layers.run(self._x[0, :rows], layer, lane, student=self._student_of(index))

        self._graphs.run(("shared layer", index, rows, self._inputs.width), run)

    def _run_rest(self, index: int, rows: int) -> None:
        """The other layers of a station, on a copy: behind the teacher's rows lie the student's, not padding."""
        station = self.elasticity.stations[index]
        if station.stop - station.start == 1:
            return

        def run() -> None:
            x, copy, lane = self._x[0, :rows], self._x[1, :rows], self._inputs.lane(0, rows, index)
            copy.copy_(x)
            for layer in range(station.start + 1, station.stop):
                self._layers.run(copy, layer, lane)
            is_teacher = self._row_numbers[:rows] < lane.count
            torch.where(is_teacher[:, None], copy, x, out=x)

        self._graphs.run(("rest", index, rows, self._inputs.width), run)

    def _student_of(self, station: int) -> Difference | None:
        return self._students.get(self.elasticity.student_layer(station))

    def _move(self, old: int, new: int, num: int) -> None:
        """Requests between the cuts change sides: off the end of one buffer, onto the end of the other."""
        teacher, student = self._x
        if new > old:
            teacher[old:new] = student[num - new : num - old].flip(0)
        elif new < old:
            student[num - old : num - new] = teacher[new:old].flip(0)

    def _record(self) -> None:
        """Record what any mix of sizes needs, and whole paths of the ends of the dial; other paths when first used.
        Likewise narrower widths than the widest.

        Counts are 0 meanwhile, so nothing is written to the pages. Largest first, so that all share its memory.
        """
        started = time.monotonic()
        self.draw(self.logits(self._hidden[:1], 1), [GREEDY])  # compiles the kernel for logits in float32,
        self.draw(self._logits[:1], [GREEDY])  # and in the dtype of the decode graphs
        for rows in reversed(self._buckets):
            for size in {self.sizes[0], self.sizes[-1]}:
                self._run_path(size, rows)
            if len(self.sizes) > 1:
                for index, threshold in enumerate(self.elasticity.thresholds):
                    for side in range(2):
                        is_used = self.sizes[-1] >= threshold if side == 0 else self.sizes[0] < threshold
                        if not is_used:
                            continue
                        if side == 1 and self.shared_stations:
                            self._run_shared_layer(index, rows)
                            if self.sizes[-1] >= threshold:
                                self._run_rest(index, rows)
                        else:
                            self._run_station(index, side, rows)
        torch.cuda.synchronize(self.device)
        logger.info("recorded %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - started)

    # --- parts

    def _draw(self, logits: torch.Tensor, draws: list[Draw]) -> Download:
        # Rows of `settings`: the fields of `Draw`.
        (settings,) = self._draw_upload.send([np.asarray(draws, np.float64).reshape(-1, 5).T])
        tokens = torch.empty(len(draws), dtype=torch.int32, device=self.device)
        draw(logits, settings, tokens)
        return Download(tokens)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
