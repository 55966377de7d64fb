"""LiteLLM, LangChain and Ollama's JavaScript client as people configure them, for `make test-clients`."""

import json

import httpx
import pytest

from tests.api.tiny import NAME, QUICK, ROOT, RunningServer, make_pair
from tests.clients import javascript
from tests.clients.__main__ import main, scripts

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunningServer(make_pair(tmp_path_factory.mktemp("clients")), "--api-key", "secret", *QUICK) as running:
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


OLLAMA_JS = """
import { Ollama } from 'ollama';
const client = new Ollama({ host: process.argv[2], headers: { authorization: 'Bearer secret' } });
const model = 'tiny:5L', messages = [{ role: 'user', content: 'hi' }], options = { temperature: 0, num_predict: 6 };
const names = (await client.list()).models.map((model) => model.name);
const shown = await client.show({ model });
const whole = await client.chat({ model, messages, options });
const parts = [];
for await (const part of await client.chat({ model, messages, options, stream: true })) parts.push(part);
const text = (await client.generate({ model, prompt: 'The quick', raw: true, options })).response;
const schema = { type: 'object', properties: { on: { type: 'boolean' } }, required: ['on'],
  additionalProperties: false };
const formed = await client.chat({ model, messages, format: schema, options: { temperature: 0 } });
let error;
try {
  await client.chat({ model: 'nope', messages });
} catch (failure) {
  error = [failure.status_code, failure.message];
}
console.log(JSON.stringify({ names, blocks: shown.model_info['llama.block_count'], whole: whole.message.content,
  streamed: parts.map((part) => part.message.content).join(''), counted: parts.at(-1).eval_count, text,
  formed: JSON.parse(formed.message.content), error }));
"""


@javascript.needs_npm
def test_ollamas_javascript_client(server, tmp_path):
    done = javascript.run(OLLAMA_JS, ["ollama@0.6"], server.url, tmp_path)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["names"] == [f"{NAME}:{tag}" for tag in ("latest", "4L", "5L", "6L")] and got["blocks"] == 5
    assert got["whole"] == got["streamed"] and got["counted"] == 6 and got["text"]
    assert isinstance(got["formed"]["on"], bool)
    assert got["error"][0] == 404 and "not found" in got["error"][1]


def test_the_page_has_every_client_and_all_of_them_work():
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs" / "clients.md").read_text().splitlines() if " yes " in line
    ]
    assert [row[0].strip() for row in rows] == list(scripts())
    assert all(cell.strip() in ("yes", "") for row in rows for cell in row[2:])


def test_without_npm_its_clients_are_skipped_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(javascript.shutil, "which", lambda tool: None)
    monkeypatch.setattr("sys.argv", ["clients", "vercel-ai"])
    assert main() == 1, "it was asked for by name"
    assert capsys.readouterr().err == "vercel-ai is skipped: it needs npm and node (https://nodejs.org).\n"
