"""Triton exists for Linux only."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_cuda_*.py"]
