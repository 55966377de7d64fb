"""What every client's script does: ask the server of the command line, and print its version and what worked as one
line of JSON."""

import asyncio
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

URL = sys.argv[1]
MODEL = "tiny:5L"
QUESTION = "Weather?"
# A random model says one of these, so that a loop is closed after some tries.
CALL = {"name": "weather", "parameters": {"city": "Bern"}}
SAYS_CALL_OR_DONE = {"structured_outputs": {"choice": [json.dumps(CALL), "done"]}}


def report(**checks: Callable[[], object]) -> None:
    """Run each check (a coroutine function, or a plain one): it passes unless it raises or returns False."""
    package = re.search(r'dependencies = \["([\w-]+)', Path(sys.argv[0]).read_text())[1]
    results = {"version": version(package)}
    for name, check in checks.items():
        try:
            passed = asyncio.run(check()) if inspect.iscoroutinefunction(check) else check()
            results[name] = "no" if passed is False else "yes"
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    print(json.dumps(results))


def closes_a_loop(run: Callable[[list[str]], object], tries: int = 40) -> bool:
    """Whether a run calls the tool (which appends to the list it is given) and then ends by itself."""
    for _ in range(tries):
        cities: list[str] = []
        try:
            run(cities)
        except Exception:  # of a random model, some runs end in what is no answer
            if len(cities) == 0:
                continue
            raise
        if cities:
            return all(city == "Bern" for city in cities)
    raise AssertionError("the model never called the tool")
