"""LiteLLM and LangChain as people configure them. Needs the extra `clients`; skipped without it."""

import httpx
import pytest

from tests.api.tiny import NAME, RunningServer, make_pair

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunningServer(make_pair(tmp_path_factory.mktemp("clients")), "--api-key", "secret") as running:
        yield running


@pytest.fixture(scope="module")
def litellm():
    pytest.importorskip("litellm", reason="pip install boomerang-serve[clients]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of prices
        import litellm

        yield litellm


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_litellm(server, litellm, provider):
    arguments = {"api_base": server.url + "/v1", "api_key": "secret", "max_tokens": 6, "temperature": 0}
    model = f"{provider}/{NAME}:5L"
    whole = litellm.completion(model=model, messages=HELLO, **arguments)
    assert whole.usage.completion_tokens == 6 and whole.choices[0].message.content
    chunks = litellm.completion(model=model, messages=HELLO, stream=True, **arguments)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model=f"{provider}/nope", messages=HELLO, **arguments)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model=model, messages=HELLO, **arguments | {"api_key": "wrong"})


def test_litellm_text_completion(server, litellm):
    answer = litellm.text_completion(
        model=f"text-completion-openai/{NAME}", prompt="The quick", max_tokens=4, api_base=server.url + "/v1",
        api_key="secret", temperature=0,
    )  # fmt: skip
    assert answer.choices[0].text and answer.usage.completion_tokens == 4


def test_langchain_chat(server):
    langchain = pytest.importorskip("langchain_openai", reason="pip install boomerang-serve[clients]")
    model = langchain.ChatOpenAI(
        base_url=server.url + "/v1", api_key="secret", model=NAME, temperature=0, max_tokens=6, stream_usage=True,
        extra_body={"size": "5L"}, max_retries=0,
    )  # fmt: skip
    whole = model.invoke("hi")
    assert whole.content and whole.usage_metadata["output_tokens"] == 6
    assert whole.response_metadata["model_name"] == f"{NAME}:5L"
    chunks = list(model.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 6


def test_langchain_tools_and_structured_output(server):
    langchain = pytest.importorskip("langchain_openai", reason="pip install boomerang-serve[clients]")
    from pydantic import BaseModel, ConfigDict

    class Light(BaseModel):
        model_config = ConfigDict(extra="forbid")
        on: bool

    headers = {"authorization": "Bearer secret"}
    newline = httpx.post(server.url + "/tokenize", json={"prompt": "\n"}, headers=headers).json()["tokens"][0]
    model = langchain.ChatOpenAI(
        base_url=server.url + "/v1", api_key="secret", model=NAME, temperature=0, max_tokens=70, max_retries=0,
        extra_body={"logit_bias": {str(newline): -100}},  # a random model would fill its short context with blanks
    )  # fmt: skip
    assert isinstance(model.with_structured_output(Light, method="json_schema").invoke("hi").on, bool)
    assert isinstance(model.with_structured_output(Light, method="function_calling").invoke("hi").on, bool)


def test_langchain_completions(server):
    langchain = pytest.importorskip("langchain_openai", reason="pip install boomerang-serve[clients]")
    model = langchain.OpenAI(
        base_url=server.url + "/v1", api_key="secret", model=NAME, temperature=0, max_tokens=5, max_retries=0
    )
    assert model.invoke("The quick") == "".join(model.stream("The quick"))
