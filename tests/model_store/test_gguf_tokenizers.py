"""Tokenizers of GGUF files make the tokens that llama.cpp makes of the same file, for every name it knows them by."""

import gzip
import json

import pytest

from model_store.gguf_file import read_gguf
from model_store.gguf_tokenizer import read_tokenizer
from tests.model_store.llama_cpp import FORMS, REFERENCE, LlamaCpp, fields_of, write_vocabulary


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


@pytest.mark.parametrize("name", ["pre llama-bpe", "pre qwen2", "pre tekken", "no pre", "sentencepiece"])
def test_the_kept_answers_are_llama_cpps(name, reference, tmp_path):
    """With the package (make test-llamacpp); without it the kept answers stand."""
    pytest.importorskip("xllamacpp")
    write_vocabulary(tmp_path / "tiny.gguf", fields_of(name, reference["merges"], reference["pieces"]))
    server = LlamaCpp(tmp_path / "tiny.gguf")
    assert [server.tokenize(text) for text in reference["texts"]] == reference["ids"][name]
