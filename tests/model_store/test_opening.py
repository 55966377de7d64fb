"""Models that learned texts with a token in front of them get it in front of every text, window and row."""

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from model_store.distill.data import Document, pack
from model_store.distill.job import DistillJob
from model_store.distill.quick import _text
from model_store.evaluate.measure import windows
from model_store.opening import opening, put_around
from tests.api.tiny import make_pair


def test_what_is_put_around_texts(tmp_path):
    teacher, _ = make_pair(tmp_path)
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    assert put_around(tokenizer) == ([], []) and opening(tokenizer) == []
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=[
        (name, tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")])  # fmt: skip
    first, last = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    assert put_around(tokenizer) == ([first], [last])
    tokenizer.save(str(teacher / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(teacher)
    assert opening(theirs) == [first]

    assert [list(window) for window in windows(range(10, 19), 4, None, [first])] == [
        [first, 10, 11, 12], [first, 13, 14, 15], [first, 16, 17, 18]
    ]  # fmt: skip
    rows = pack([Document(text="one two three four five " * 20)], theirs, 40, 8, "all", 0, [first])
    assert rows.ids.shape == (5, 8) and (rows.ids[:, 0] == first).all() and not rows.mask[:, 0].any()
    plain = pack([Document(text="one two three four five " * 20)], theirs, 40, 8, "all", 0)
    assert torch.equal(rows.ids[:, 1:].flatten()[:28], plain.ids.flatten()[:28])

    asked = []

    def generate(size, prompts, num_new, temperature):
        asked.extend(prompts)
        return [[7] * num_new for _ in prompts]

    job = DistillJob(teacher=str(teacher), quick=True, out=tmp_path / "out", tokens=1024, row_tokens=64)
    own = _text(job, theirs, teacher, lambda job: generate)
    assert own.shape == (16, 64) and (own[:, 0] == first).all()
    assert all(prompt[0] == first for prompt in asked) and {len(prompt) for prompt in asked} == {2, 25}
