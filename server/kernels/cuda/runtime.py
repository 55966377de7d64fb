"""How the kernels run here: compiled for a GPU, or interpreted on the CPU (TRITON_INTERPRET=1) to be checked."""

from __future__ import annotations

import triton

# Decided when Triton decorates the kernels, so it cannot change afterwards.
INTERPRETED: bool = triton.knobs.runtime.interpret
