"""Text to token ids and back, and everything the tokenizer's folder knows: special tokens, chat templates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model_store.tokenizer_files import read_tokenizer_files, text_of
from server.api.generate.chat_template import ChatTemplate

# Below this a tokenisation takes less than the hop to a thread and back.
_INLINE_CHARACTERS = 2000


class ServingTokenizer:
    """One tokenizer, shared by all requests; safe to use from several threads."""

    def __init__(
        self,
        backend: Tokenizer,
        config: dict[str, Any],
        *,
        templates: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
    ) -> None:
        """`config` is the content of tokenizer_config.json; `templates` are chat templates by name ("default" is the
        ordinary one); `vocab_size` the rows of the model's embedding. TemplateError for one that is not valid."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config
        self.vocab_size = vocab_size or backend.get_vocab_size()
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        texts = ((name, text_of(config.get(name))) for name in names)
        self.special_tokens = {name: text for name, text in texts if text is not None}
        eos = self.special_tokens.get("eos_token")
        eos_id = backend.token_to_id(eos) if eos else None
        self.eos_token_ids = eos_token_ids | (frozenset() if eos_id is None else {eos_id})
        bos = self.special_tokens.get("bos_token")
        self.bos_token_id = backend.token_to_id(bos) if bos else None
        self.template_names = sorted(templates or ())
        used = {name: source for name, source in (templates or {}).items() if name in ("default", "tool_use")}
        named = {name: ChatTemplate(source, self.special_tokens) for name, source in used.items()}
        self.chat_template = named.get("default")
        self.tool_template = named.get("tool_use", self.chat_template)  # where a conversation has tools
        # A byte-level vocabulary writes each byte as a printable character; knowing the map gives exact bytes.
        self._byte_of = _byte_level_map() if _is_byte_level(backend) else None
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.longest_token = max(map(len, backend.get_vocab()), default=1)
        self.token_text = lru_cache(maxsize=1 << 17)(self._token_text)
        self.token_bytes = lru_cache(maxsize=1 << 17)(self._token_bytes)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        chat_template: str | None = None,
        vocab_size: int | None = None,
        store: str | Path | None = None,
    ) -> ServingTokenizer:
        """Load a checkpoint folder's; `chat_template` (a text, or the name of one of the folder's) overrides its own.

        StoreError names a file that is missing, damaged or does not fit `vocab_size`.
        """
        files = read_tokenizer_files(Path(folder), store, vocab_size)
        templates = files.templates
        if chat_template is not None:
            templates = {"default": templates.get(chat_template, chat_template)}
        return cls(
            files.backend,
            files.config,
            templates=templates,
            eos_token_ids=files.eos_token_ids,
            vocab_size=vocab_size,
        )

    # --- text -> ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As `encode_many`."""
        return (await self.encode_many([text], add_special_tokens))[0]

    async def encode_many(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """In a thread unless they are short all together, so that long texts do not hold up everybody's streams.

        UnicodeError for what JSON can name and no text can hold (half of a surrogate pair).
        """
        try:
            if sum(map(len, texts)) <= _INLINE_CHARACTERS:
                return [self.encode(text, add_special_tokens) for text in texts]
            return await asyncio.to_thread(self._encode_batch, texts, add_special_tokens)
        except TypeError as error:  # the library's word for it
            raise UnicodeError(str(error)) from None

    def _encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # `encode` holds the interpreter while it works, so that a thread would not help the event loop; this does not.
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)]

    # --- ids -> text

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def special_marks(self, texts: Iterable[str]) -> dict[int, str]:
        """Those of `texts` that are special tokens here, by id."""
        ids = {self.backend.token_to_id(text): text for text in texts}
        return {token_id: text for token_id, text in ids.items() if token_id in self.special_token_ids}

    def _token_text(self, token_id: int) -> str:
        return self.backend.decode([token_id], skip_special_tokens=False)

    def _token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, exact even where the token is a part of a character."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return []
        if self._byte_of is not None and not self._is_added(token_id):
            known = [self._byte_of[character] for character in piece if character in self._byte_of]
            if len(known) == len(piece):
                return known
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # sentencepiece byte fallback
            return [int(piece[3:5], 16)]
        return list(self.token_text(token_id).encode())

    @lru_cache(maxsize=1)  # noqa: B019 - one tokenizer lives as long as the process
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    def _is_added(self, token_id: int) -> bool:
        return token_id in self._added_tokens()

    def info(self) -> dict[str, Any]:
        """What `/tokenizer_info` answers: lm-eval's remote tokenizer reads the special tokens and the template."""
        return {
            "tokenizer_class": self.config.get("tokenizer_class", "PreTrainedTokenizerFast"),
            **{name: self.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
            "eos_token_ids": sorted(self.eos_token_ids),
            "vocab_size": self.backend.get_vocab_size(),
            "model_max_length": self.config.get("model_max_length"),
            "add_bos_token": self.config.get("add_bos_token", False),
            "chat_template": self.chat_template.source if self.chat_template else None,
        }


def _is_byte_level(backend: Tokenizer) -> bool:
    # The decoder's own state: serialising the whole tokenizer, vocabulary and all, takes a fifth of a second.
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def _byte_level_map() -> dict[str, int]:
    """GPT-2's printable character for every byte, inverted (Radford et al. 2019, encoder.py `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    mapping.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return mapping
