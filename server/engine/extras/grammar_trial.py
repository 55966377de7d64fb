"""`python -m server.engine.extras.grammar_trial`: compiles grammars that somebody sent, apart from the server.

llguidance is native code. A few grammars overflow its stack (an `enum` with the smallest 64-bit integer, thousands of
rules in a chain), and that would end the server. So every new grammar is compiled here first, in a process with a
small stack and little memory: what ends this process never reaches the server.

One JSON value per line, in and out. First in: {"tokenizer", "vocab_size", "eos_token_ids"}. Then grammars (texts); the
answer to each is null or what is wrong with it. The process ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading

import numpy as np

from server.engine.extras.grammar import Grammar, GrammarCompiler, GrammarError

# A quarter of what threads of the server have, so that whatever passes here has room there.
_STACK_BYTES = 2 << 20
_MEMORY_BYTES = 4 << 30
_STEPS = 32


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_serve)
    worker.start()
    worker.join()


def _serve() -> None:
    setup = json.loads(sys.stdin.readline())
    compiler = GrammarCompiler(setup["tokenizer"], setup["vocab_size"], frozenset(setup["eos_token_ids"]))
    for line in sys.stdin:
        problem = None
        try:
            _walk(compiler.start(compiler.compile(json.loads(line))))
        except GrammarError as error:
            problem = str(error)
        print(json.dumps(problem), flush=True)


def _walk(grammar: Grammar) -> None:
    """The first steps of a text that follows the grammar: the parser has come to life."""
    for step in range(_STEPS):
        allowed = np.flatnonzero(np.unpackbits(grammar.bitmask().view(np.uint8), bitorder="little"))
        if not len(allowed) or not grammar.accept(int(allowed[step * 7919 % len(allowed)])) or grammar.is_terminated():
            return


if __name__ == "__main__":
    main()
