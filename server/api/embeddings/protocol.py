"""Body of `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.api.completions.protocol import Prompt
from server.api.generate.protocol import CacheSalt, ScheduledSize, SizeFields

Dimensions = Annotated[int, Field(ge=1, lt=2**31)]


class VectorFields(SizeFields):
    """What every route that embeds takes. Vectors of different sizes cannot be compared, so a request has one size."""

    dimensions: Dimensions | None = Field(
        default=None, description="keep so many numbers of each vector; default: the model's width"
    )
    cache_salt: CacheSalt | None = Field(default=None, description="as for chat")
    size_schedule: Annotated[list[ScheduledSize], Field(max_length=0)] | None = Field(
        default=None, description="not offered: a vector has one size"
    )


class EmbeddingsRequest(VectorFields):
    model: str | None = Field(default=None, description="NAME, or NAME:24L for a size")
    input: Prompt = Field(description="text, texts, token ids, or lists of token ids")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: little-endian float32; default float"
    )
    user: str | None = Field(default=None, description="ignored")
