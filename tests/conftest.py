"""Shared by all tests."""

import gc
import os

# The models here are tiny: a second thread only adds barriers, and test machines are small. Set before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton interprets the CUDA kernels. It reads this when it is imported, which any test may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not look at it."""
    gc.freeze()
