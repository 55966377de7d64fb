"""Prompts in any of four forms -> token ids, and the echoed text on the way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from server.api.completions.protocol import CompletionRequest
from server.api.generate.answer_parts import Text
from server.api.generate.conversation import Piece
from server.api.generate.detokenizer import Detokenizer
from server.api.generate.generation import Delta, Generation
from server.api.generate.grammar import grammar_factory
from server.api.generate.serving import read_prompts, truncate
from server.api.generate.submission import Caller, OutputLimits, PromptInput, Submission
from server.api.http.errors import invalid
from server.api.http.state import ServerState


class Continuation:
    """One request's prompts on their way in, and its text on the way back."""

    def __init__(self, state: ServerState, body: CompletionRequest) -> None:
        self.state = state
        self.body = body
        self.echo = bool(body.echo)
        self.default_max_tokens: int | None = 16  # None: what the context holds
        if body.max_tokens == 0 and not self.echo and body.prompt_logprobs is None:
            raise invalid("max_tokens must be at least 1 unless echo or prompt_logprobs is asked for.", "max_tokens")

    async def generation(self, caller: Caller, answer_id: str) -> Generation:
        """Everything checked and tokenised, ready to start."""
        body, state = self.body, self.state
        state.admission.check(caller.tenant)
        prompts = await self._prompts()
        limits = OutputLimits(
            max_tokens=body.max_tokens,
            default=self.default_max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )
        grammar = await grammar_factory(body, state, tenant=caller.tenant, num_prompts=len(prompts))
        submission = Submission.build(state, caller, body, prompts, answer_id=answer_id, limits=limits, grammar=grammar)
        generation = Generation(state, submission)
        if self.echo:  # echoed text comes first, and offsets of generated tokens count from its beginning
            for sequence in generation.sequences:
                sequence.text_start = len(self.prompt_text(sequence.prompt))
                await asyncio.sleep(0)  # there may be a thousand prompts of a thousand ids
        return generation

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer as it comes."""
        async for delta in generation.deltas():
            yield self.read(delta)

    def read(self, delta: Delta) -> Piece:
        return Piece(delta.index, [Text(delta.text)] if delta.text else [], delta, delta.finish_reason)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Likeliest tokens wanted at prompt positions, for either field."""
        body = self.body
        if self.echo and body.logprobs is not None:
            return max(body.logprobs, body.prompt_logprobs or 0) if body.logprobs >= 0 else -1
        return body.prompt_logprobs

    # --- prompts

    async def _prompts(self) -> list[PromptInput]:
        """Tokenised, and cut where that is asked for."""
        body, state = self.body, self.state
        is_cut = None if body.truncate_prompt_tokens is None else body.truncation_side or "left"
        special = body.add_special_tokens is not False
        prompts = await read_prompts(body.prompt, state, "prompt", special, is_cut)
        kept = [truncate(prompt.token_ids, body, state.catalog.max_model_len) for prompt in prompts]
        return [
            prompt if len(ids) == len(prompt.token_ids) else PromptInput(ids)
            for prompt, ids in zip(prompts, kept, strict=True)
        ]

    # --- echo

    def prompt_text(self, prompt: PromptInput) -> str:
        """The prompt as it is echoed: the caller's own text, or what the ids decode to."""
        if prompt.text is None:
            skip = self.body.skip_special_tokens is not False
            prompt.text = self.state.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)
        return prompt.text

    def prompt_offsets(self, prompt: PromptInput) -> list[int]:
        """Where each token of the prompt begins in the echoed text."""
        tokenizer, text = self.state.tokenizer, self.prompt_text(prompt)
        skip = self.body.skip_special_tokens is not False
        before = 0  # what the tokenizer has put in front of the caller's text
        full = tokenizer.decode(prompt.token_ids)
        if full != text and tokenizer.decode(prompt.token_ids, skip_special_tokens=skip) != text:
            before = len(full) - len(text) if full.endswith(text) else 0
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip and full != text and not before)
        offsets = []
        for token_id in prompt.token_ids:
            offsets.append(min(max(detokenizer.offset(token_id) - before, 0), len(text)))
            detokenizer.push(token_id)
        return offsets
