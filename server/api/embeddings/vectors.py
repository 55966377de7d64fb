"""Texts to vectors: the mean of the final hidden states of one size over the prompt, of length 1.

The mean, not the last token's state: of a model that was not trained to embed, that one says how a text ends, with a
full stop or without.
"""

from __future__ import annotations

import numpy as np

from server.api.embeddings.protocol import VectorFields
from server.api.generate.generation import Generation
from server.api.generate.protocol import SamplingFields, SizeFields
from server.api.generate.submission import Caller, OutputLimits, PromptInput, Submission
from server.api.http.errors import invalid
from server.api.http.state import ServerState


def embedding(
    state: ServerState,
    caller: Caller,
    model: str | None,
    body: VectorFields,
    prompts: list[PromptInput],
    param: str = "input",
) -> Generation:
    """Everything checked, ready to start; `param` is what the route calls its texts.

    Load does not choose the size: without one it is the largest allowed.
    """
    width = state.served.engine.spec.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise invalid(f"dimensions is {body.dimensions}; this model's vectors have {width}.", "dimensions")
    fields = {name: getattr(body, name) for name in SizeFields.model_fields}
    asked = SamplingFields.model_construct(model=model, cache_salt=body.cache_salt, **fields)
    limits = OutputLimits(max_tokens=0, param=param, prompt=param, pool=True)
    answer_id = f"embd-{caller.request_id}"
    return Generation(state, Submission.build(state, caller, asked, prompts, answer_id=answer_id, limits=limits))


async def vectors(generation: Generation, dimensions: int | None) -> list[np.ndarray]:
    """One per prompt: float32 of length 1, cut to its first `dimensions` before."""
    async for _ in generation.deltas():
        pass
    result = []
    for sequence in generation.sequences:
        assert sequence.pooled is not None, "the last output of a pooled request has its vector"
        vector = sequence.pooled[:dimensions]
        result.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
    return result
