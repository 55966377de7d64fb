"""Without a GPU, Triton's interpreter runs the CUDA kernels; it has to be asked before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
