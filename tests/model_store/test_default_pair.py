"""The real default pair, as imported: shapes, sharing, tokenizer, and that it still knows what it knew."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_store.pair import open_pair
from model_store.store import StoreError
from model_store.weight_form import WeightForm


@pytest.fixture(scope="module")
def pair():
    try:
        return open_pair()
    except StoreError as error:
        pytest.skip(f"the default teacher cannot be had here: {error}")


@pytest.fixture(scope="module")
def tokenizer(pair):
    return AutoTokenizer.from_pretrained(pair.tokenizer_path)


def test_sizes_and_bytes(pair):
    assert pair.name == "smollm2-135m-instruct"
    assert pair.elasticity.sizes == tuple(range(16, 31))
    rows = pair.size_table(WeightForm(torch.bfloat16))
    assert rows[-1]["parameters"] == 134_515_008  # what the model card of SmolLM2-135M says
    assert rows[0]["kv_bytes_per_token"] == 16 * 2 * 3 * 64 * 2
    loaded = pair.load(WeightForm(torch.bfloat16))
    assert loaded.num_bytes() == pair.union_bytes(pair.elasticity.sizes, WeightForm(torch.bfloat16))
    assert loaded.ends["student"] is loaded.ends["teacher"]
    small = pair.load(WeightForm(torch.bfloat16), memory_budget=300 << 20)
    assert 16 in small.sizes and 30 in small.missing_sizes and small.num_bytes() <= 300 << 20


def test_special_tokens_and_template(pair, tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    generation = json.loads((pair.tokenizer_path / "generation_config.json").read_text())
    ends = generation["eos_token_id"]  # from the hub, or all that llama.cpp ends at
    assert ends == 2 or (ends[0] == 2 and set(ends) <= {2, 0, 4})
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_becomes_the_tokens_it_was_trained_on(tokenizer):
    assert tokenizer("hello world").input_ids == [28120, 905]  # no BOS
    # Each digit is its own token, and the space before a number too (pre-tokenizer of the original: digits one by one).
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  2024").input_ids) == ["in", "ĠĠ", "2", "0", "2", "4"]
    texts = [
        "  12 apples\n\n\tx=1.5e-7",
        "naïve café — 你好, мир 👩‍👩‍👧‍👦 \u200b",
        "it's I'M we'll\r\n",
        "a\x00b\x7f",
        " ",
        "",
        "½ Ⅻ １２",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.inference_mode()
def test_the_teacher_knows_what_it_knew(pair, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(pair.teacher_path, dtype=torch.float32)
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is", return_tensors="pt").input_ids
    logits = model(ids).logits[0]
    assert tokenizer.decode(logits[-1].argmax()) == " Berlin"
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert loss < 3.0
