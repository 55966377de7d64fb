"""`python -m tests.faults.fragile serve ...`: the real server, whose trial processes end when a grammar says so."""

from __future__ import annotations

import os
import sys

from server.api.generate import grammar_trial as client
from server.engine.extras import grammar_trial

client.MODULE = "tests.faults.fragile"


def convert(source: str) -> str:
    if "end yourself" in source:
        os.abort()
    return _convert(source)


_convert, grammar_trial.convert = grammar_trial.convert, convert

if __name__ == "__main__":
    if sys.argv[1:]:
        from server.cli import main

        sys.exit(main())
    grammar_trial.main()
