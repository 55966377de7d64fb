"""What the engine needs to know at start. Frozen: run-time facts (pages, eos ids) are never written back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine. Token counts unless the name says bytes."""

    max_model_len: int = 8192
    max_num_seqs: int = 64  # running at once
    max_num_batched_tokens: int = 1024  # of one step, all requests together (chunked prefill)
    page_size: int = 32  # tokens of one layer in one page
    kv_cache_bytes: int = 1 << 30  # both K and V, all layers
    kv_cache_dtype: str = "auto"  # auto: K and V in the pair's dtype | int8: 8 bits, with scales per token and head
    state_bytes: int = 0  # of hidden states kept for changes of size; 0: none are kept
    enable_prefix_caching: bool = True
    executor: str = "auto"  # auto | cuda | native | torch: see server.model.executor
    enforce_eager: bool = False  # no CUDA graphs
    exact_activations: bool = False  # codes times floats instead of integers, slowly: what tests compare with
    compress_weights: bool = True  # bfloat16 in twelve bits, exactly, where the executor can
    speculative_size: int | None = None  # size that guesses tokens for larger ones; None: each for itself, if at all
    speculative_width: int | None = None  # bits that guesses read at most; None: as many as the request they are for
    num_speculative_tokens: int = 3  # guesses ahead, at most
    seed: int = 0
    num_threads: int | None = None  # of the native executor; None: as many as there are cores

    @property
    def speculates(self) -> bool:
        return self.speculative_size is not None or self.speculative_width is not None
