r"""How text is cut before byte-level BPE, by the name in `tokenizer.ggml.pre`, as llama.cpp does it.

From its src/llama-vocab.cpp (MIT), where the same names are given expressions that std::regex can run. Those are kept,
also where the model's authors had finer ones (tekken's upper and lower case are ASCII's): who opens the same file here
and there gets the same tokens. tests/model_store/test_gguf_tokenizers.py compares every name with llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
# "Upper case" is every letter but a to z, "lower case" every letter but A to Z.
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
_CASED_ENGLISH = rf"{_START}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_START}{_UPPER}+{_LOWER}*{_ENGLISH}?"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED}|\p{{N}}|{_SLASHED}|{_SPACES}"
_GPT4O = rf"{_CASED_ENGLISH}|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3 = (
    r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
    rf"{_PUNCTUATION}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)  # fmt: skip
# Some of these letters have others that look and normalise alike: those are written as numbers.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST = r"(?:(?!\s)[一-龥ࠀ-一가-퟿])+"  # blanks beyond ASCII are taken out of such ranges
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions applied one after another to what those before left whole; and what else comes with the name."""

    expressions: tuple[str, ...]
    adds_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise
    ignores_merges: bool = False  # a word that is a token is that token, whatever the merges make of it


_GROUPS: dict[PreTokenizer, str] = {
    # Also what a file without a name gets, with a warning.
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
    PreTokenizer((_LLAMA3,), adds_bos=True, ignores_merges=True):
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    PreTokenizer((_GPT2,)):
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
    PreTokenizer((r"\p{N}", _GPT2)): "starcoder refact command-r smollm codeshell exaone minerva-7b",
    PreTokenizer((_QWEN2,)): "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan",
    PreTokenizer((_TEKKEN,), adds_bos=True, ignores_merges=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2",
    PreTokenizer(_DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm",
    PreTokenizer((
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?(?:(?!\s)[!-/:-~！-／：-～‘-‟　-。])+", r"\s+$", _EAST,
        r"\p{N}+",
    )): "deepseek-llm",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((_BLOOM,)): "poro-chat bloom gpt3-finnish",
    PreTokenizer((_BLOOM, r"\p{N}")): "viking",
    PreTokenizer((
        rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    )): "seed-coder",
    PreTokenizer((
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORDS}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",
    )): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((
        r"\p{N}{1,3}", rf"{_ENGLISH}|{_WORDS}|\p{{N}}+|{_SYMBOLS}|{_SPACES}",
    ), ignores_merges=True): "minicpm5",
}  # fmt: skip
BY_NAME = {name: group for group, names in _GROUPS.items() for name in names.split()}
