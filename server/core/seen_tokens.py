"""What a request has seen of tokens, for its penalties."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class SeenTokens:
    """Of one request: the tokens of its prompt, and how often it has generated which."""

    prompt: Any = None  # unique, an array where the logits lie; None until a repetition penalty asks for them
    generated: array = field(default_factory=lambda: array("i"))  # unique, in order of appearance
    counts: array = field(default_factory=lambda: array("i"))  # parallel to `generated`
    places: dict[int, int] = field(default_factory=dict)  # token -> where it stands in `generated`
    num_counted: int = 0

    def update(self, output_token_ids: list[int]) -> None:
        """Count what was generated since the last time."""
        for token in output_token_ids[self.num_counted :]:
            place = self.places.setdefault(token, len(self.generated))
            if place == len(self.generated):
                self.generated.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self.num_counted = len(output_token_ids)
