"""What a checkpoint folder's tokenizer files say, as transformers understands them.

`tokenizer.json` is the tokenizer. Tokens can also be named in four other files; then transformers is asked once what it
makes of them all, and its answer is kept in the store, under a digest of the files, so that a warm start imports none
of it. It is asked as PreTrainedTokenizerFast, which leaves the pipeline in tokenizer.json alone: some of the classes
that AutoTokenizer picks by a name in the config replace it (GPT2Tokenizer drops the digits of SmolLM2's).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model_store.files import FileError, read_json, read_json_if_there
from model_store.store import StoreError, scratch_folder, store_root

logger = logging.getLogger(__name__)

TEMPLATE_FILE, TEMPLATE_DIR = "chat_template.jinja", "additional_chat_templates"
_CONFIG, _JSON, _MAP, _ADDED = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer and what goes with it."""

    backend: Tokenizer
    config: dict[str, Any]  # of tokenizer_config.json, the special tokens of the other files included
    templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is the ordinary one
    eos_token_ids: frozenset[int] = frozenset()


def read_tokenizer_files(folder: Path, store: Path | str | None = None, num_rows: int | None = None) -> TokenizerFiles:
    """Read a folder. `num_rows`: rows of the model's embedding, beyond which no text may lead.

    StoreError or FileError names the file that is missing, damaged or at odds with the model.
    """
    config = read_json_if_there(folder / _CONFIG)
    for name, value in read_json_if_there(folder / _MAP).items():
        config.setdefault(name, value)
    backend = _backend(folder, config, store)
    if num_rows is not None:
        backend = _within(backend, num_rows, folder)
    ends = _end_ids(folder, backend, config)
    if num_rows is not None and (beyond := sorted(end for end in ends if not 0 <= end < num_rows)):
        logger.warning(
            "%s: eos_token_id names %d, which the model has no row for: it never ends a text", folder, beyond[0]
        )
        ends -= {*beyond}
    return TokenizerFiles(backend, config, read_templates(folder, config), ends)


def read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files of their own win over tokenizer_config.json, as in transformers."""
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / TEMPLATE_DIR).glob("*.jinja"))}
    if files:
        return {name: _text(file) for name, file in files.items()}
    value = config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise StoreError(f"{folder / _CONFIG}: chat_template is neither a text nor texts with names")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} cannot be read as text: {error}") from error


def _end_ids(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> frozenset[int]:
    """What ends an answer: generation_config.json's ids, else config.json's; and the tokenizer's eos token."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json_if_there(folder / name).get("eos_token_id")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values):
            raise StoreError(f"{folder / name}: eos_token_id is {value!r}, neither a token id nor a list of them")
        ends = set(values)
        break
    eos = backend.token_to_id(text_of(config.get("eos_token")) or "")
    return frozenset(ends | (set() if eos is None else {eos}))


def text_of(token: Any) -> str | None:
    """A special token is a text or {"content": text}; None for anything else."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


# --- the tokenizer


def _backend(folder: Path, config: dict[str, Any], store: Path | str | None) -> Tokenizer:
    file = folder / _JSON
    if not file.is_file():
        return _kept(folder, store)
    try:
        added = {token["content"]: token for token in read_json(file).get("added_tokens") or []}
        backend = Tokenizer.from_file(str(file))
    except FileError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise StoreError(f"{file} is not a tokenizer that can be read: {error}") from error
    if all(name in added and _agrees(flags, added[name]) for name, flags in _named_elsewhere(folder, config)):
        return backend
    return _kept(folder, store)


def _agrees(flags: dict[str, Any], token: dict[str, Any]) -> bool:
    return all(token.get(name, value) == value for name, value in flags.items())


def _named_elsewhere(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tokens that files beside tokenizer.json name, with what they say about them."""
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(
        str(i).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for i, token in decoder.items()
    ):
        raise StoreError(f"{folder / _CONFIG}: added_tokens_decoder does not give a token for each id")
    yield from ((token["content"], {**token, "id": int(i)}) for i, token in decoder.items())
    values = [config.get(name) for name in _NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name) or []
        if not isinstance(extra, list | dict):
            raise StoreError(f"{folder / _CONFIG}: {name} is no list of tokens")
        values += extra.values() if isinstance(extra, dict) else extra
    values += [value for name, value in config.items() if name.endswith("_token") and name not in _NAMED]
    for value in values:
        if isinstance(content := text_of(value), str):
            yield content, {"special": True}
    if not decoder:
        yield from ((content, {"id": i}) for content, i in read_json_if_there(folder / _ADDED).items())


def _kept(folder: Path, store: Path | str | None) -> Tokenizer:
    """What transformers makes of the folder's files, asked once per content."""
    names = (_JSON, _CONFIG, _MAP, _ADDED, *_VOCABULARIES)
    digest = hashlib.sha256()
    for file in (folder / name for name in (*names, "config.json")):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    target = store_root(store) / "tokenizers" / digest.hexdigest()[:24] / _JSON
    if target.is_file():
        return Tokenizer.from_file(str(target))
    backend = _ask_transformers(folder, [name for name in names if (folder / name).is_file()])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            backend.save(f"{scratch}/{_JSON}")
            Path(scratch, _JSON).replace(target)
    except (OSError, Exception) as error:  # a read-only store asks again each time; the library raises bare Exceptions
        logger.info("the tokenizer of %s is not kept: %s", folder, error)
    return backend


def _ask_transformers(folder: Path, names: list[str]) -> Tokenizer:
    if not set(names) & {_JSON, *_VOCABULARIES}:
        raise StoreError(f"{folder} has no tokenizer: no tokenizer.json, and nothing that one can be made of")
    if not {_JSON, "vocab.json", "vocab.txt"} & set(names):
        raise StoreError(
            f"{folder} has its tokenizer only as tokenizer.model: make a tokenizer.json of it with transformers' "
            "convert_slow_tokenizer, or take a conversion of the model that has one"
        )
    import transformers

    kind = transformers.PreTrainedTokenizerFast if _JSON in names else transformers.AutoTokenizer
    with scratch_folder() as scratch:  # a copy: the library looks for further files, also on the hub
        for name in (*names, "config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, scratch / name)
        try:
            converted = kind.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = str(error).replace(str(scratch), str(folder)).strip().splitlines() or [type(error).__name__]
            raise StoreError(f"the tokenizer of {folder} cannot be read: {reason[0]}") from error
    return converted.backend_tokenizer


def _within(backend: Tokenizer, num_rows: int, folder: Path) -> Tokenizer:
    """Without added tokens that the model has no row for: their text is text again. StoreError if it needs others."""
    if backend.get_vocab_size(with_added_tokens=True) <= num_rows and not any(
        i >= num_rows for i in backend.get_added_tokens_decoder()
    ):
        return backend
    content = json.loads(backend.to_str())
    beyond = [token for token in content["added_tokens"] if token["id"] >= num_rows]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_rows]
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        for token in beyond:  # a tokenizer may have its added tokens in the vocabulary as well
            vocabulary.pop(token["content"], None)
    try:
        capped = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise StoreError(
            f"{folder}: its tokenizer has more tokens than the model has rows ({num_rows}): {error}"
        ) from error
    ids = [*capped.get_vocab(with_added_tokens=True).values(), *capped.encode("", add_special_tokens=True).ids]
    if (largest := max(ids, default=0)) >= num_rows:
        raise StoreError(
            f"{folder}: its tokenizer goes up to token {largest} and the model has rows for {num_rows}: they do "
            "not belong together"
        )
    if beyond:
        some = ", ".join(repr(token["content"]) for token in beyond[:5])
        logger.warning(
            "%s: the tokenizer has %d added tokens beyond the %d rows of the model, which it cannot know: they are "
            "read as ordinary text (%s)", folder, len(beyond), num_rows, some,
        )  # fmt: skip
    return capped
