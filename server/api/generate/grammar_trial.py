"""The server's side of `server.engine.extras.grammar_trial`: a process in which new grammars are tried first."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from server.api.generate.tokenizer import ServingTokenizer

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[3]


class Trial:
    """Starts the process on first use and again after a crash. One grammar at a time: its caller holds a lock."""

    def __init__(self, tokenizer: ServingTokenizer) -> None:
        self._tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, grammar: str) -> None:
        """GrammarError if the grammar is invalid, too complex, or crashes the parser. May be cancelled."""
        from server.engine.extras.grammar import GrammarError

        process = self._process or await self._start()
        assert process.stdin is not None and process.stdout is not None
        answer = b""
        try:
            process.stdin.write(orjson.dumps(grammar) + b"\n")
            await process.stdin.drain()
            answer = await process.stdout.readline()
        except ConnectionError:  # it died before it had read everything
            pass
        finally:
            if not answer.endswith(b"\n"):  # dead, or still at it while its caller has given up
                self._stop()
        if not answer.endswith(b"\n"):
            logger.warning("a grammar crashed the parser's trial process and is refused")
            raise GrammarError("the parser cannot cope with it")
        if problem := orjson.loads(answer):
            raise GrammarError(problem)

    async def _start(self) -> asyncio.subprocess.Process:
        tokenizer = self._tokenizer
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.engine.extras.grammar_trial"),
            cwd=_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which goes on until its requests are done
        )
        assert process.stdin is not None
        setup = {
            "tokenizer": tokenizer.backend.to_str(),
            "vocab_size": tokenizer.vocab_size,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
        }
        process.stdin.write(orjson.dumps(setup) + b"\n")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
