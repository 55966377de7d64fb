"""Shared by all tests."""

import os

# The models here are tiny: a second thread only adds barriers, and test machines are small. Set before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
