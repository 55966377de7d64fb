"""BOOMERANG_AUTOSCALER_* and BOOMERANG_GATE_*: a misspelt setting must not pass silently."""

from __future__ import annotations

import argparse
import difflib
import os

__all__ = ["check_environment"]


def check_environment(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Ends the program, naming the nearest flag, if a variable that begins with `prefix` is no flag of `parser`."""
    known = {prefix + action.dest.upper() for action in parser._actions}
    for name in sorted(name for name in os.environ if name.startswith(prefix) and name not in known):
        close = difflib.get_close_matches(name, known, 1)
        parser.error(f"there is no setting {name}" + (f"; did you mean {close[0]}?" if close else ""))
