"""Tokenizers of GGUF files make the tokens that llama.cpp makes of the same file, for every name it knows them by."""

import gzip
import json

import pytest

from model_store.gguf_file import read_gguf
from model_store.gguf_tokenizer import read_tokenizer
from tests.model_store.llama_cpp import FORMS, REFERENCE, fields_of, write_vocabulary


@pytest.fixture(scope="module")
def reference():
    return json.loads(gzip.decompress(REFERENCE.read_bytes()))


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_llama_cpps(name, reference, tmp_path):
    write_vocabulary(tmp_path / "tiny.gguf", fields_of(name, reference["merges"], reference["pieces"]))
    tokenizer, _, _ = read_tokenizer(read_gguf(tmp_path / "tiny.gguf"))
    ours = [tokenizer.encode(text).ids for text in reference["texts"]]
    differing = [
        (text, mine, theirs)
        for text, mine, theirs in zip(reference["texts"], ours, reference["ids"][name], strict=True)
        if mine != theirs
    ]
    assert not differing, differing[:3]
