"""The server's side of `server.engine.extras.grammar_trial`: processes in which new grammars are tried first."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from server.core.machine import available_memory

if TYPE_CHECKING:
    from server.api.generate.tokenizer import ServingTokenizer

logger = logging.getLogger(__name__)

# What a grammar may take: the server, which compiles it again and keeps it, has room for as much and for others.
_SHARE, _LEAST_MEMORY, _MOST_MEMORY = 16, 128 << 20, 1 << 30
_ROOT = Path(__file__).parents[3]
MODULE = "server.engine.extras.grammar_trial"
# All that a trial process gets to see of the server's environment: no key, no token.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS")


class Trial:
    """One process, started when it is first needed and again at once after a crash. One grammar at a time."""

    def __init__(self, tokenizer: ServingTokenizer, replicas: int = 1) -> None:
        """`replicas`: servers that divide the machine's memory."""
        self._tokenizer = tokenizer
        self._replicas = replicas
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None

    def warm(self) -> asyncio.Task[asyncio.subprocess.Process]:
        """Start the process unless it is there: it takes a second to be ready."""
        if self._starting is None or _has_ended(self._starting):
            self._starting = asyncio.ensure_future(self._start())
        return self._starting

    async def ready(self) -> asyncio.subprocess.Process:
        """Wait for the process: what its start takes is not the grammar's fault. OSError if it cannot be started."""
        return await asyncio.shield(self.warm())

    async def convert(self, source: str) -> str:
        """The grammar for a source (`server.engine.extras.grammar_source`), compiled and walked once.

        GrammarError if it is invalid, too complex, or crashes the parser. May be cancelled.
        """
        from server.engine.extras.grammar import GrammarError

        process, answer = await self.ready(), b""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(orjson.dumps(source) + b"\n")
            await process.stdin.drain()
            answer = await process.stdout.readline()
        except ConnectionError:  # it died before it had read everything
            pass
        finally:
            if not answer.endswith(b"\n"):  # dead, or still at it while its caller has given up
                self._replace()
        if not answer.endswith(b"\n"):
            logger.warning("a grammar crashed the parser's trial process and is refused")
            raise GrammarError("the parser cannot cope with it")
        grammar, problem = orjson.loads(answer)
        if problem is not None:
            raise GrammarError(problem)
        return grammar

    async def _start(self) -> asyncio.subprocess.Process:
        tokenizer = self._tokenizer
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE),
            cwd=_ROOT,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,  # a line of its answer holds a grammar
            start_new_session=True,  # Ctrl-C is for the server, which goes on until its requests are done
        )
        assert process.stdin is not None and process.stdout is not None
        setup = {
            "tokenizer": tokenizer.backend.to_str(),
            "vocab_size": tokenizer.vocab_size,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "memory": min(max(available_memory(self._replicas) // _SHARE, _LEAST_MEMORY), _MOST_MEMORY),
        }
        process.stdin.write(orjson.dumps(setup) + b"\n")
        await process.stdout.readline()  # it is ready, or dead: its first grammar will tell
        return process

    def _replace(self) -> None:
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.add_done_callback(_kill)
        self.warm()


def _has_ended(starting: asyncio.Task[asyncio.subprocess.Process]) -> bool:
    """Whether there never was a process, or something else than a grammar has ended it."""
    if not starting.done():
        return False
    return starting.cancelled() or starting.exception() is not None or starting.result().returncode is not None


def _kill(starting: asyncio.Task[asyncio.subprocess.Process]) -> None:
    if not starting.cancelled() and starting.exception() is None and starting.result().returncode is None:
        starting.result().kill()
