"""Text is bytes: what a server sends is decode(prompt + output) less decode(prompt), wherever tokens cut characters."""

import httpx
import pytest

from tests.api import asking
from tests.api.asking import events, post


def common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def ids_of(url, text):
    return post(url, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_never_comes_back(plain, stream):
    bang = ids_of(plain.url, "!")
    for prompt, wanted in (("secret \ufffd", "!"), (ids_of(plain.url, "secret 🫠")[:-1], "🫠")):
        forced = bang if isinstance(prompt, str) else ids_of(plain.url, "secret 🫠")[-1:]
        body = {"prompt": prompt, "max_tokens": 1, "allowed_token_ids": forced, "ignore_eos": True}
        if stream:
            chunks = events(plain.url, "/v1/completions", body)
            text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        else:
            text = post(plain.url, "/v1/completions", body)["choices"][0]["text"]
        assert text == wanted


def test_an_answer_that_is_continued_inside_a_character(plain):
    """The assistant's own words come back as a prefill; a client that keeps token ids may cut anywhere."""
    whole = ids_of(plain.url, "Bonjour 你好 世界 🌶🌶 fin")
    for cut in range(1, len(whole)):
        body = {"prompt": whole[:cut], "max_tokens": 1, "allowed_token_ids": [whole[cut]]}
        prompt, both = (post(plain.url, "/detokenize", {"tokens": whole[:n]})["prompt"] for n in (cut, cut + 1))
        text = post(plain.url, "/v1/completions", body)["choices"][0]["text"]
        assert text == both[common(prompt, both) :]


def test_offsets_point_into_the_text(plain):
    body = {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "max_tokens": 1, "echo": True, "logprobs": 0}
    for prompt in (body["prompt"], ids_of(plain.url, body["prompt"])):
        choice = post(plain.url, "/v1/completions", body | {"prompt": prompt, "skip_special_tokens": False})["choices"][
            0
        ]
        logprobs = choice["logprobs"]
        for offset, token in zip(logprobs["text_offset"][:-1], logprobs["tokens"], strict=False):
            assert choice["text"][offset:].startswith(token)
    shown = post(plain.url, "/v1/completions", body)["choices"][0]
    assert shown["logprobs"]["text_offset"][:2] == [0, 12]
    form = {"prompt": "x", "max_tokens": 20, "logprobs": 0, "structured_outputs": {"choice": ["a\ufffd\ufffdb"]}}
    choice = post(plain.url, "/v1/completions", form)["choices"][0]
    assert choice["text"][choice["logprobs"]["text_offset"][-1]] == "b"


def test_lines_of_a_stream_are_lines_for_everybody(plain):
    text = "a\u2028b\u2029c\u0085d"
    for path, body in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 20}),
        ("/v1/chat/completions", {"messages": asking.MESSAGES, "max_tokens": 20}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 20}),
    ):
        got = []
        for event in events(plain.url, path, body | {"structured_outputs": {"choice": [text]}}):
            got += [
                choice.get("text") or choice.get("delta", {}).get("content") or ""
                for choice in event.get("choices", ())
            ]
            got += [event["delta"]] if event.get("type") == "response.output_text.delta" else []
        assert "".join(got) == text
    raw = httpx.post(plain.url + "/v1/completions", json={
        "prompt": "x", "max_tokens": 20, "stream": True, "structured_outputs": {"choice": [text]},
    }).text  # fmt: skip
    assert all(line == "" or line.startswith("data: ") for line in raw.splitlines())


def test_seeds_differ_and_minus_one_is_none(plain):
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 1.5, "ignore_eos": True, "size": "5L"}

    def texts(**fields):
        return [choice["text"] for choice in post(plain.url, "/v1/completions", body | fields)["choices"]]

    many = [text for seed in (0, 1, 2, -2, -3, -(2**63), 2**64 - 1) for text in texts(seed=seed, n=3)]
    assert len(set(many)) == len(many)
    assert texts(seed=1, n=3) == texts(seed=1, n=3) and texts(seed=-2) == texts(seed=-2)
    assert len(set(texts(seed=-1) + texts(seed=-1) + texts() + texts(seed=-1, n=2))) == 5


def test_a_seed_gives_the_same_text_beside_others(plain):
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "size": "5L"}
    for seed in range(100, 106):
        alone = post(plain.url, "/v1/completions", body | {"seed": seed})["choices"][0]["text"]
        first = post(plain.url, "/v1/completions", body | {"seed": seed, "n": 4})["choices"][0]["text"]
        assert alone == first
