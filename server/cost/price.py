"""What a step that does not exist yet would take: the cost model's formula for whoever decides, in plain numbers.

A step's time is its time in the model, times the cost model's correction for its kind, plus what lies between steps.
The correction was learned from times in the model, and what lies between steps has a learner of its own: the one
never multiplies the other. Tokens and rows come by size (layers): `rows[24]` requests run 24 layers. `width` is what
all rows of a step read (`server.core.width`); left out, the widest.

`Outlook` and `Forecaster` keep copies of parts of this in their loops, where a call for each size costs too much
(`benchmarks/decision_cost.py`); `tests/sizing/test_price.py` holds each of them to this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from server.cost.features import Union, union
from server.cost.model import CostModel

HEADROOM = 0.9  # share of a TPOT limit that a step is filled up to, when it is asked how much one can carry


@dataclass(slots=True, kw_only=True)
class Step:
    """A step to be priced. Sums as in `server.cost.features`."""

    tokens: Sequence[float]  # by size
    head_rows: Sequence[float]  # rows whose logits are wanted, by size
    decode_context: float = 0.0
    prefill_context: float = 0.0
    request_layers: float = 0.0
    num_requests: float = 0
    width: int | None = None


class StepPrice:
    """Prices by the coefficients and corrections that the cost model has at the moment."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        profile, elasticity = cost.profile, cost.profile.elasticity
        self.top, self.widest = elasticity.sizes[-1], profile.widths[-1]
        self.path_weights = profile.path_weights()
        joint, teacher, student = (weights.tolist() for weights in profile.station_weights())
        self.joint_weight = sum(joint)  # of what every row runs, whatever its size
        # By station, in patch order, so that those where a size runs the teacher's block come first: how far the
        # station's threshold lies below the largest size, the weight of the teacher's side, and of the student's.
        order = sorted(zip(elasticity.thresholds, teacher, student, strict=True))
        self.stations = [(self.top - threshold, *sides) for threshold, *sides in order]
        # Sizes below this one use a head of their own; None if there is one head only.
        self.head_threshold = None if profile.shared_head else elasticity.head_threshold

    # --- parts, in seconds before any correction

    def segments(self, tokens: Sequence[float]) -> list[tuple[float, float]]:
        """(tokens, layer weight) of what runs together: all rows, the teacher's side and the student's by station."""
        at_least = list(accumulate(reversed(tokens)))  # tokens of the largest size, of the two largest, ...
        total = at_least[-1]
        found = [(total, self.joint_weight)]
        for reach, teacher, student in self.stations:
            above = at_least[reach]
            found += (above, teacher), (total - above, student)
        return found

    def runs(self, tokens: Mapping[int, Sequence[float]]) -> dict[Union, float]:
        """Layer weight by what runs together, where `tokens` are by width and size."""
        found: dict[Union, float] = {}
        for parts in zip(*(self.segments(by_size) for by_size in tokens.values()), strict=True):
            for run in union({width: count for width, (count, _) in zip(tokens, parts, strict=True)}):
                found[run] = found.get(run, 0.0) + parts[0][1]
        return found

    def layers(self, tokens: Sequence[float], width: int | None = None) -> float:
        """All layers over so many tokens of each size."""
        segments, layer = self.segments(tokens), self.cost.layers[width or self.widest]
        total = segments[0][0]
        curve = layer.upto(total) if isinstance(total, int) else layer
        return sum([weight * curve[count] for count, weight in segments], 0.0)

    def heads(self, rows: Sequence[float]) -> tuple[float, float]:
        """Rows at the teacher's head and at the student's; all at the teacher's where both are one."""
        own = 0 if self.head_threshold is None else sum(rows[: self.head_threshold])
        return sum(rows) - own, own

    def head(self, rows: Sequence[float], width: int | None = None) -> float:
        """Norm, head and sampling of so many rows of each size."""
        teacher, student = self.heads(rows)
        head = self.cost.heads[width or self.widest]
        return head(teacher) + head(student)

    def between(self, num_requests: float) -> float:
        """Seconds between a step of `num_requests` and the next."""
        return self.cost.overhead + self.cost.overhead_per_request * num_requests

    def token_rate(self, rows: float, tokens: float, width: int | None = None) -> float:
        """Seconds per token and layer of `tokens` more tokens in a step that has `rows` already, corrected."""
        layer = self.cost.layers[width or self.widest]
        return (layer(rows + tokens) - layer(rows)) / max(tokens, 1.0) * self.cost.prompt_scale(rows)

    # --- steps

    def model_seconds(self, step: Step) -> float:
        """Time in the model, before any correction."""
        cost = self.cost
        return (
            cost.fixed
            + self.layers(step.tokens, step.width)
            + self.head(step.head_rows, step.width)
            + cost.decode_context * step.decode_context
            + cost.prefill_context * step.prefill_context
            + cost.request_layers * step.request_layers
        )

    def seconds(self, step: Step, kind: str) -> float:
        """Time of a whole step of a kind (`server.core.step_times.KINDS`), from its start to the next one's."""
        return self.model_seconds(step) * self.cost.correction[kind] + self.between(step.num_requests)

    def decode_step(self, rows: Sequence[float], layer_context: float = 0.0, width: int | None = None) -> Step:
        """The step in which `rows[size]` requests get one token each; `layer_context`: sum of layers x context."""
        layers = sum(size * count for size, count in enumerate(rows))
        return Step(
            tokens=rows, head_rows=rows, decode_context=layer_context, request_layers=layers, num_requests=sum(rows),
            width=width,
        )  # fmt: skip

    def decode_seconds(self, rows: Sequence[float], layer_context: float = 0.0, width: int | None = None) -> float:
        return self.seconds(self.decode_step(rows, layer_context, width), "decode")

    def point_seconds(self, size: int, width: int, rows: float, tokens: float = 0.0, context: float = 64.0) -> float:
        """A step of `rows` that decode at one point, and `tokens` of a prompt beside them, before any correction."""
        cost = self.cost
        layers = self.path_weights[size] * cost.layers[width](rows + tokens)
        attention = cost.decode_context * context * rows + cost.prefill_context * 0.5 * tokens**2
        return cost.fixed + layers + cost.heads[width](rows or 1.0) + size * (attention + cost.request_layers * rows)

    def is_cheaper_mixed(self, tokens: Mapping[int, int], wide: int) -> bool:
        """Whether a step with tokens by width is cheaper as it is than with all of them at `wide`."""
        return self._layer(tokens) < 0.99 * self._layer({wide: sum(tokens.values())})

    def _layer(self, rows: Mapping[int, float]) -> float:
        """One layer of weight 1 over tokens by width."""
        layers = self.cost.layers
        return sum([layers[width](upto) - layers[width](above) for width, upto, above in union(rows)], 0.0)

    def full_size_seconds(self, rows: float) -> float:
        """A decode step of so many requests of the largest size, however short their texts: weights and products."""
        cost = self.cost
        in_model = cost.fixed + cost.layer(rows) * self.path_weights[self.top]
        return in_model * cost.correction["decode"] + cost.overhead

    def rows_within(self, seconds: float) -> float:
        """The inverse of `full_size_seconds`, at least 1."""
        cost = self.cost
        in_model = (seconds - cost.overhead) / cost.correction["decode"] - cost.fixed
        return max(cost.layer.inverse(in_model / self.path_weights[self.top]), 1.0)

    def alone(self, size: int, num_prompt: int, max_tokens: int, width: int | None = None) -> tuple[float, float]:
        """(TTFT, TPOT) of one request on an idle server whose steps take `max_tokens` tokens of the largest size.

        The budget of a step is in layer-tokens: a smaller size gets longer chunks.
        """
        per_step = max(max_tokens * self.top // size, 1)
        num_whole, last = divmod(num_prompt - 1, per_step)
        done = num_whole * per_step
        ttft = 0.0
        if num_whole:
            context = size * done * done / 2 / num_whole  # of one of them, in the mean
            ttft = num_whole * self.seconds(self._chunk(size, per_step, 0, width, prefill_context=context), "prefill")
        tokens = last + 1
        if tokens == 1:
            ttft += self.seconds(self._chunk(size, 1, 1, width, decode_context=size * num_prompt), "decode")
        else:
            context = size * tokens * (done + tokens / 2)
            ttft += self.seconds(self._chunk(size, tokens, 1, width, prefill_context=context), "prefill")
        return ttft, self.seconds(self._chunk(size, 1, 1, width, decode_context=size * (num_prompt + 1)), "decode")

    def _chunk(self, size: int, num_tokens: int, num_head_rows: int, width: int | None, **context: float) -> Step:
        """One request's part of a step, with nobody beside it."""
        tokens, head_rows = [0] * (self.top + 1), [0] * (self.top + 1)
        tokens[size], head_rows[size] = num_tokens, num_head_rows
        return Step(tokens=tokens, head_rows=head_rows, request_layers=size, num_requests=1, width=width, **context)
