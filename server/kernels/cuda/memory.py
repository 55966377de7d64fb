"""How much device memory a server needs beside weights and KV cache: an estimate from the shapes, rounded up."""

from __future__ import annotations

from model_store.spec import ModelSpec

# What libraries and recorded graphs keep for themselves.
_RESERVE = 512 << 20
# Copies of a row of logits in float32 that sampling and log-probabilities may hold at once.
_LOGITS_COPIES = 3


def workspace_bytes(
    spec: ModelSpec, *, max_tokens: int, max_num_seqs: int, table_entries: int, bytes_per_value: int
) -> int:
    """`max_tokens`: of a step at the smallest size, which may take more of them; `table_entries`: of block tables."""
    attention = 2 * spec.hidden_size + 3 * spec.q_size + 2 * spec.kv_size
    mlp = 2 * spec.hidden_size + spec.intermediate_size * (3 if spec.gated_mlp else 2)
    activations = max_tokens * max(attention, mlp) * bytes_per_value
    logits = max_num_seqs * spec.vocab_size * (2 * bytes_per_value + 4 * _LOGITS_COPIES)
    return activations + logits + 4 * table_entries + _RESERVE
