#!/usr/bin/env bash
# tokenizers 0.23.3: DecodeStream(ids=...) gives its prefill back as output when the prefill ends inside a character.
#
# The stream is documented as primed with ids that were shown already. It takes a prefix as settled only if its text does
# not end in U+FFFD. Primed with a prompt that ends after the first byte of a two-byte character, the first step that
# completes the character returns the whole prompt. At every other cut it returns the new text alone.
# Met by a server that streams: a client that sends token ids, or a prompt cut to a length, gets its prompt as answer.
#
# Seen on 29 November 2026, Python 3.11, x86-64:
#   primed with 'secret ' -> 'é!'
#   primed with 'secret \ufffd' (one byte of é) -> 'secret é!'
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

# One token per byte, so that a prompt can end at any byte.
vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
ids = tokenizer.encode("secret é!").ids


def streamed(cut: int) -> str:
    stream = DecodeStream(ids=ids[:cut])
    return "".join(text for index in ids[cut:] if (text := stream.step(tokenizer, index)))


whole, inside = len("secret "), len("secret ") + 1
print(f"primed with {tokenizer.decode(ids[:whole])!r} -> {streamed(whole)!r}")
print(f"primed with {tokenizer.decode(ids[:inside])!a} (one byte of é) -> {streamed(inside)!r}")
assert streamed(whole) == "é!", "changed: a prefill of whole characters"
assert streamed(inside) == "secret é!", "changed: a prefill that ends inside a character is not repeated any more"
PYTHON
