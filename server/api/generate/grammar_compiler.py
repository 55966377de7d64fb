"""From the source of a grammar to constraints for the sampler."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from typing import TYPE_CHECKING

from server.api.generate.grammar_trial import Trial
from server.api.generate.recent import Recent
from server.api.http.errors import APIError, invalid
from server.config import Settings

if TYPE_CHECKING:
    from server.api.generate.tokenizer import ServingTokenizer
    from server.engine.extras.grammar import Grammar, GrammarCompiler

logger = logging.getLogger(__name__)

_KEPT_BYTES = 16 << 20  # of grammars' texts
_REFUSED = 1024
_COMPILE_SECONDS = 10.0
_TRIALS = 2
_MOST_WAITING = 16  # new grammars of one tenant
# Times that one request's grammar is compiled, at most, and characters in all: its other sequences share those lexers.
_MOST_LEXERS, _COMPILED_CHARACTERS = 16, 64 << 10


class Turns:
    """One at a time of each tenant."""

    def __init__(self) -> None:
        self.num_waiting: Counter[str] = Counter()  # with the one whose turn it is
        self._locks: dict[str, asyncio.Lock] = {}

    @contextlib.asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        self.num_waiting[tenant] += 1
        try:
            async with self._locks.setdefault(tenant, asyncio.Lock()):
                yield
        finally:
            self.num_waiting[tenant] -= 1
            if not self.num_waiting[tenant]:
                del self.num_waiting[tenant], self._locks[tenant]


class Compiler:
    """Compiles grammars off the event loop; keeps the texts of recent ones, and the reasons why others were refused.

    Each new one is converted and tried in one of two processes apart from the server; a tenant uses one at a time, so
    that what one of them sends cannot take both from the others. Then it is compiled anew for every request, in 0.2 to
    20 ms. Copies of a matcher share its lexer, and the states that any of them meets count towards the limit of all:
    one that was kept would fail for everybody once enough answers had followed it.
    """

    def __init__(self, tokenizer: ServingTokenizer, settings: Settings) -> None:
        self._tokenizer = tokenizer
        self._max_bytes = settings.max_grammar_bytes
        self._trials = [Trial(tokenizer, settings.max_replicas) for _ in range(_TRIALS)]
        self._idle: asyncio.Queue[Trial] = asyncio.Queue()
        for trial in self._trials:
            self._idle.put_nowait(trial)
        self._texts: Recent[str] = Recent(_KEPT_BYTES)
        self._refused: Recent[str] = Recent(_REFUSED)
        self._trying, self._compiling = Turns(), Turns()

    async def factory(self, source: str, param: str, tenant: str = "", count: int = 1) -> Callable[[], Grammar]:
        """A function that makes a fresh constraint for each of `count` sequences.

        400 if the grammar is too large, invalid or too complex.
        """
        from server.engine.extras.grammar import GrammarError

        if len(source) > self._max_bytes:
            raise invalid(f"{param} is too large: at most {self._max_bytes} bytes.", param)
        # Sources are long, and escapes may name what no text can hold.
        key = hashlib.blake2b(source.encode(errors="surrogatepass"), digest_size=32).digest()
        text = self._known(key, param)
        if text is None:
            if self._trying.num_waiting[tenant] >= _MOST_WAITING:
                raise APIError("Too many grammars of yours wait to be compiled.", param=param, status=503)
            async with self._trying.of(tenant):
                text = self._known(key, param) or await self._try(key, source, param)
        async with self._compiling.of(tenant):
            try:
                compiled = await asyncio.to_thread(self._compile, text, count)
            except GrammarError as error:
                raise invalid(f"{param} cannot be used: {error}", param) from None
        turns = itertools.cycle(compiled)
        return lambda: next(turns).copy()

    def _known(self, key: bytes, param: str) -> str | None:
        if (problem := self._refused.get(key)) is not None:
            raise invalid(f"{param} {problem}", param)
        return self._texts.get(key)

    async def _try(self, key: bytes, source: str, param: str) -> str:
        """The grammar's text, once a trial process has compiled it."""
        from server.engine.extras.grammar import GrammarError

        for trial in self._trials:
            trial.warm()
        trial = await self._idle.get()
        try:
            await trial.ready()
            async with asyncio.timeout(_COMPILE_SECONDS):
                text = await trial.convert(source)
        except (GrammarError, TimeoutError) as error:
            problem = f"cannot be used: {error}" if isinstance(error, GrammarError) else "is too complex to compile."
            self._refused.put(key, problem)
            raise invalid(f"{param} {problem}", param) from None
        except OSError as error:  # no process, no descriptor: that passes
            logger.warning("a grammar cannot be tried: %s", error)
            raise APIError("No grammar can be compiled now.", param=param, status=503) from None
        finally:
            self._idle.put_nowait(trial)
        self._texts.put(key, text, sys.getsizeof(text))
        return text

    def _compile(self, text: str, count: int) -> list[Grammar]:
        number = min(count, _MOST_LEXERS, max(_COMPILED_CHARACTERS // len(text), 1))
        return [self._compiler.compile(text) for _ in range(number)]

    @cached_property  # on first use: it takes a third of a second
    def _compiler(self) -> GrammarCompiler:
        from server.engine.extras.grammar import GrammarCompiler

        tokenizer = self._tokenizer
        return GrammarCompiler(tokenizer.backend.to_str(), tokenizer.vocab_size, tokenizer.eos_token_ids)
