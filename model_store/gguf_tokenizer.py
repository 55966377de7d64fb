"""The tokenizer that a GGUF file describes, as tokenizer.json: the tokens that llama.cpp makes of the same file.

transformers converts such tokenizers too, into those of the models' authors as far as it can tell, with another prefix
rule for sentencepiece and GPT-2's way of cutting text for every name it does not know. Which differences llama.cpp
makes was read in its src/llama-vocab.cpp (`impl::load`, `impl::tokenize`) and is held by tests against it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model_store.gguf_file import GgufError, GgufFile
from model_store.gguf_pretokenizers import BY_NAME, PreTokenizer

logger = logging.getLogger(__name__)

_SPACE = "▁"  # sentencepiece's way of writing a blank
# Tokens that end a text wherever they occur in a vocabulary, whatever the file says they are.
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip
# Parts of code with a gap in it: control tokens too, and those that fill up or begin another file end a text.
_GAP_ENDS = {
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
}  # fmt: skip
_GAPS = _GAP_ENDS | {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
    "<|prefix|>", "<|suffix|>", "<|middle|>",
}  # fmt: skip
_LONGEST = 1024  # characters of a sentencepiece token, which is tried at every cut
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Vocabulary:
    """Tokens by id, what kind each is, and the special ones."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.metadata = file.name, file.metadata
        self.kind: str = self._get("model", str)
        tokens: list[str] = self._get("tokens", list)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            token = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise GgufError(f"{self.file} has the token {token!r} twice in tokenizer.ggml.tokens")
        self.types = self._per_token("token_type", int(TokenType.NORMAL))
        defaults = {"bos": 1, "eos": 2, "unk": 0} if self.kind == "llama" else {}  # LLaMA's own
        self.special: dict[str, int] = {}
        for name, key in _SPECIAL.items():
            value = self._id(key, defaults.get(name))
            if value is not None and 0 <= value < len(self.tokens):
                self.special[name] = value

    def _id(self, key: str, default: int | None = None) -> int | None:
        return self._typed(f"{key}_token_id", int, default)

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            wanted = {int: "a token id", bool: "true or false"}[kind]
            raise GgufError(f"{self.file}: the metadata key tokenizer.ggml.{key} is {value!r:.60}, not {wanted}")
        return value

    def _get(self, key: str, kind: type) -> Any:
        value: Any = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, kind) or (kind is list and not _are_texts(value)):
            raise GgufError(f"{self.file} has no tokenizer that can be read: tokenizer.ggml.{key} is missing or odd")
        return value

    def _per_token(self, key: str, default: Any) -> list:
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, list) or len(values) < len(self.tokens):
            raise GgufError(f"{self.file}: tokenizer.ggml.{key} has fewer entries than there are tokens")
        if any(type(value) is not type(default) for value in values):
            raise GgufError(f"{self.file}: tokenizer.ggml.{key} holds other things than numbers of its kind")
        return values

    @property
    def scores(self) -> list[float]:
        if "tokenizer.ggml.scores" not in self.metadata:
            raise GgufError(f"{self.file} has a sentencepiece tokenizer without tokenizer.ggml.scores")
        return self._per_token("scores", 0.0)

    @property
    def merges(self) -> list[tuple[str, str]]:
        ids, merges = self.ids, []
        for text in self._get("merges", list):
            cut = text.find(" ", 1)
            pair = (text[:cut], text[cut + 1 :])
            if cut < 0 or any(part not in ids for part in (*pair, "".join(pair))):
                raise GgufError(f"{self.file}: the merge {text!r} joins to no token of tokenizer.ggml.tokens")
            merges.append(pair)
        return merges

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, bool, default)

    @property
    def end_ids(self) -> list[int]:
        """What ends an answer: eos first, then eot and eom, then every token that is known to be an end."""
        ids = self.ids
        named = [self.special.get("eos")]
        named += [self._id(key) for key in ("eot", "eom")]
        ends = [end for end in named if end is not None and 0 <= end < len(self.tokens)]
        ends += [ids[token] for token in sorted((_ENDS | _GAP_ENDS) & ids.keys(), key=ids.__getitem__)]
        texts = {self.tokens[end] for end in ends}
        if {"<|return|>", "<|call|>"} <= texts or {"<|call|>", "<|flush|>"} <= texts:  # there it ends a message only
            ends = [end for end in ends if self.tokens[end] != "<|end|>"]
        return list(dict.fromkeys(ends))

    def added(self) -> list[AddedToken]:
        """Tokens that are found in text as they are, before anything else."""
        found = []
        for i, token in enumerate(self.tokens):
            is_control = self.types[i] in (TokenType.CONTROL, TokenType.UNKNOWN) or token in _ENDS | _GAPS
            if is_control or self.types[i] == TokenType.USER_DEFINED:
                found.append(AddedToken(token, special=is_control, normalized=False))
        return found


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def read_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any], list[int]]:
    """The tokenizer, the content of its tokenizer_config.json, and the ids that end an answer.

    GgufError names the key of what is missing or not supported.
    """
    vocabulary = _Vocabulary(file)
    if vocabulary.kind == "gpt2":
        tokenizer, adds_bos = _byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise GgufError(f"{file.name}: tokenizer.ggml.model {vocabulary.kind!r} is not supported (gpt2 and llama are)")
    tokenizer.add_tokens(vocabulary.added())
    special = vocabulary.special
    first_asked, last_asked = vocabulary.flag("add_bos_token", adds_bos), vocabulary.flag("add_eos_token", False)
    first = special.get("bos") if first_asked else None
    last = special.get("eos") if last_asked else None
    for name, i, is_asked in (("bos", first, first_asked), ("eos", last, last_asked)):
        if is_asked and i is None:
            raise GgufError(f"{file.name} wants {name} added to every text, and has no tokenizer.ggml.{name}_token_id")
    tokens = {i: vocabulary.tokens[i] for i in (first, last) if i is not None}
    if tokens:
        template = [tokens[i] for i in (first,) if i is not None] + ["$A"]
        template += [tokens[i] for i in (last,) if i is not None]
        pair = [*template, *["$B:1" if part == "$A" else f"{part}:1" for part in template]]
        text = processors.TemplateProcessing(template, pair, [(token, i) for i, token in tokens.items()])
        own = tokenizer.post_processor
        tokenizer.post_processor = text if own is None else processors.Sequence([own, text])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": vocabulary.tokens[i] for name, i in special.items()}
    for key, value in file.metadata.items():
        if re.match(r"tokenizer\.chat_template($|\.)", key) and not isinstance(value, str):
            raise GgufError(f"{file.name}: the metadata key {key} is {value!r:.60}, not a text")
    if template_text := _chat_template(file.metadata):
        config["chat_template"] = template_text
    return tokenizer, config, vocabulary.end_ids


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or those with names (tokenizer.chat_template.<name>) in tokenizer_config.json's form."""
    start = "tokenizer.chat_template."
    named = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    default = metadata.get("tokenizer.chat_template")
    if not named:
        return default
    if default is not None:
        named = {"default": default, **named}
    return [{"name": name, "template": template} for name, template in named.items()]


def cuts(group: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """What cuts text as the group says, and writes it in GPT-2's letters for bytes."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in group.expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if not name:
        logger.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre): it is cut as llama.cpp does then, which "
            "may not be how the model was trained",
            vocabulary.file,
        )
    group: PreTokenizer | None = BY_NAME.get(name or "default")
    if group is None:
        raise GgufError(f"{vocabulary.file}: tokenizer.ggml.pre {name!r} is not known; convert the original checkpoint")
    if vocabulary.flag("add_space_prefix", False):
        raise GgufError(f"{vocabulary.file}: tokenizer.ggml.add_space_prefix is not supported for tokenizers of bytes")
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges, ignore_merges=group.ignores_merges))
    tokenizer.pre_tokenizer = cuts(group)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, group.adds_bos


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """Every two neighbours that join to a token are a merge, the token with the highest score first."""
    ids, scores, types = vocabulary.ids, vocabulary.scores, vocabulary.types
    bytes_there = sum(f"<0x{byte:02X}>" in ids for byte in range(256))
    if bytes_there < 256:
        raise GgufError(f"{vocabulary.file} has a sentencepiece tokenizer with {bytes_there} of the 256 byte tokens")
    ranked = []
    for token, i in ids.items():
        if types[i] == TokenType.BYTE or len(token) < 2:
            continue
        if len(token) > _LONGEST:
            raise GgufError(f"{vocabulary.file}: the token {token[:20]!r}... has {len(token)} characters")
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if left in ids and right in ids:
                ranked.append((-scores[i], ids[left], ids[right], left, right))
            elif all(part in ids or len(part) == 1 for part in (left, right)) and types[i] == TokenType.NORMAL:
                raise GgufError(
                    f"{vocabulary.file}: the token {token!r} is made of {left!r} and {right!r}, which are not both "
                    "tokens; sentencepiece tokenizers of this kind are not supported"
                )
    ranked.sort(key=lambda entry: entry[:3])
    merges = [(left, right) for *_, left, right in ranked]
    unknown = vocabulary.tokens[vocabulary.special["unk"]] if "unk" in vocabulary.special else None
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = vocabulary.flag("add_space_prefix", True)
    blanks = normalizers.Replace(" ", _SPACE)
    # For every stretch of text between special tokens, as llama.cpp does.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), blanks]) if has_prefix else blanks
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def write_tokenizer(file: GgufFile, folder: Path) -> list[int]:
    """Write tokenizer.json and tokenizer_config.json into `folder`; returns the ids that end an answer."""
    tokenizer, config, ends = read_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = config.pop("chat_template", None)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
    return ends
