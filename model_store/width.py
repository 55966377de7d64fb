"""Widths: at how many bits a product reads a matrix. No torch."""

from __future__ import annotations

EXACT = 16  # as it was loaded, whatever bits that takes
