"""`python -m server.engine.extras.grammar_trial`: compiles grammars that somebody sent, apart from the server.

llguidance is native code, and a few grammars overflow its stack, which would end the server. So every new grammar is
compiled here first, in a process with a small stack and little memory: what ends this process never reaches the server.

One JSON value per line, in and out. First in: {"tokenizer", "vocab_size", "eos_token_ids", "memory"}, answered by null
when all is ready; `memory` bytes may be taken from there on. Then sources of grammars (`grammar_source`); the answer to
each is [grammar, null] or [null, what is wrong with it]. The process ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading

import numpy as np
import psutil

from server.engine.extras.grammar import Grammar, GrammarCompiler, GrammarError
from server.engine.extras.grammar_source import convert

# A quarter of what threads of the server have, so that whatever passes here has room there.
_STACK_BYTES = 2 << 20
_STEPS = 32


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_serve)
    worker.start()
    worker.join()


def _serve() -> None:
    setup = json.loads(sys.stdin.readline())
    compiler = GrammarCompiler(setup["tokenizer"], setup["vocab_size"], frozenset(setup["eos_token_ids"]))
    with contextlib.suppress(ValueError, OSError):
        most = psutil.Process().memory_info().vms + setup["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print("null", flush=True)
    for line in sys.stdin:
        try:
            grammar, problem = convert(json.loads(line)), None
            _walk(compiler.compile(grammar))
        except GrammarError as error:
            grammar, problem = None, str(error)
        print(json.dumps([grammar, problem]), flush=True)


def _walk(grammar: Grammar) -> None:
    """The first steps of a text that follows the grammar: the parser has come to life."""
    for step in range(_STEPS):
        allowed = np.flatnonzero(np.unpackbits(grammar.bitmask().view(np.uint8), bitorder="little"))
        if not len(allowed) or not grammar.accept(int(allowed[step * 7919 % len(allowed)])) or grammar.is_terminated():
            return


if __name__ == "__main__":
    main()
