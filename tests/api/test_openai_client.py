"""openai-python against a real server: the documented calls, streaming, sizes and errors."""

import openai
import pytest

from tests.api.tiny import NAME


@pytest.fixture(scope="module")
def client(plain):
    return openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)


def test_models(client):
    ids = [model.id for model in client.models.list()]
    assert ids == [NAME, f"{NAME}:4L", f"{NAME}:5L", f"{NAME}:6L"]
    card = client.models.retrieve(f"{NAME}:5L")
    assert card.layers == 5 and card.parameters > 0 and card.kv_bytes_per_token > 0


@pytest.mark.parametrize("how", [{"model": f"{NAME}:5L"}, {"model": NAME, "extra_body": {"size": "5L"}}])
def test_completion_says_which_size_answered(client, how):
    raw = client.completions.with_raw_response.create(prompt="The quick", max_tokens=5, temperature=0, **how)
    answer = raw.parse()
    assert answer.model == f"{NAME}:5L" and raw.headers["x-boomerang-size"] == "5L"
    assert answer.size["layers"] == 5 and answer.size["reason"] == "requested"
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"


def test_the_same_text_streamed_and_not(client):
    arguments = {"model": f"{NAME}:4L", "prompt": "A server that", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0].text
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices


def test_seed_n_and_several_prompts(client):
    arguments = {"model": NAME, "prompt": ["a", "b"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 5}
    one, two = (client.completions.create(**arguments) for _ in range(2))
    assert [c.index for c in one.choices] == [0, 1, 2, 3]
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    assert one.choices[0].text != one.choices[1].text


def test_stop_strings_and_bias(client):
    free = client.completions.create(model=NAME, prompt="The", max_tokens=20, temperature=0).choices[0]
    stop = free.text[6:8]
    cut = client.completions.create(model=NAME, prompt="The", max_tokens=20, temperature=0, stop=stop).choices[0]
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.index(stop)] and cut.stop_reason == stop
    biased = {"logit_bias": {"42": 100}, "logprobs": 1}
    only = client.completions.create(model=NAME, prompt="The", max_tokens=4, temperature=0, **biased)
    assert len(set(only.choices[0].logprobs.tokens)) == 1


def test_echo_with_logprobs_scores_the_prompt(client):
    scoring = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answer = client.completions.create(model=NAME, prompt=[[5, 6, 7, 8]], **scoring)
    scores = answer.choices[0].logprobs
    assert len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.tokens) == 5
    assert scores.token_logprobs[0] is None
    for value, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert value <= max(top.values()) and value in top.values()


def test_chat_and_streamed_chat(client):
    arguments = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == 8 and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert (
        client.chat.completions.create(
            model=NAME, messages=arguments["messages"], max_completion_tokens=3
        ).usage.completion_tokens
        == 3
    )


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"model": f"{NAME}:77L"}, openai.BadRequestError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": [[]]}, openai.BadRequestError, "prompt"),
        ({"prompt": "x " * 400}, openai.BadRequestError, "prompt"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"size": "99L"}}, openai.BadRequestError, "size"),
        ({"extra_body": {"min_size": "6L", "max_size": "4L"}}, openai.BadRequestError, "min_size"),
        ({"extra_body": {"memory_budget_mb": 0.001}}, openai.BadRequestError, "memory_budget_mb"),
        ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError, "use_beam_search"),
    ],
)
def test_errors_name_the_parameter(client, changes, error, param):
    with pytest.raises(error) as caught:
        client.completions.create(**({"model": NAME, "prompt": "x"} | changes))
    assert caught.value.body["param"] == param and caught.value.body["message"]


def test_memory_budget_picks_the_largest_that_fits(client):
    cards = {model.id: model for model in client.models.list()}
    five = cards[f"{NAME}:5L"].bytes / (1 << 20)
    answer = client.completions.create(
        model=NAME, prompt=[5, 6], max_tokens=2, extra_body={"memory_budget_mb": five + 0.02}
    )
    assert answer.size["layers"] == 5 and answer.size["reason"] == "memory_budget"
