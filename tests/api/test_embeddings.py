"""/v1/embeddings and Ollama's two routes, asked by their own clients."""

import base64
import math

import httpx
import numpy as np
import ollama
import openai
import pytest

from tests.api.asking import post
from tests.api.tiny import NAME, QUICK, RunningServer

MODEL = f"{NAME}:5L"
WIDTH = 64


@pytest.fixture(scope="module")
def client(plain):
    return openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)


def vectors(plain, status=200, **fields):
    answer = post(plain.url, "/v1/embeddings", {"model": MODEL, **fields}, status)
    return answer if status != 200 else [item["embedding"] for item in answer["data"]]


def test_openais_client(plain, client):
    texts = ["The quick brown fox", "Grüße aus Köln", "The quick brown fox"]
    answer = client.embeddings.create(model=MODEL, input=texts)  # asks for base64 by itself
    assert answer.model == MODEL and answer.size["layers"] == 5 and [item.index for item in answer.data] == [0, 1, 2]
    found = [item.embedding for item in answer.data]
    assert all(len(one) == WIDTH and math.isclose(np.linalg.norm(one), 1, abs_tol=1e-5) for one in found)
    assert np.dot(found[0], found[1]) < 0.999
    as_numbers = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    ids = [post(plain.url, "/tokenize", {"prompt": text})["tokens"] for text in texts]
    as_ids = client.embeddings.create(model=MODEL, input=ids)
    one_by_one = [client.embeddings.create(model=MODEL, input=text).data[0].embedding for text in texts]
    for other in ([i.embedding for i in as_numbers.data], [i.embedding for i in as_ids.data], one_by_one):
        assert np.allclose(other, found, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


def test_base64_is_the_same_numbers(plain):
    text = vectors(plain, input="hi", encoding_format="base64")[0]
    assert (
        np.frombuffer(base64.b64decode(text), "<f4").tolist()
        == np.array(vectors(plain, input="hi")[0], np.float32).tolist()
    )


def test_fewer_dimensions_are_the_first_ones_scaled(plain):
    whole, short = np.array(vectors(plain, input="hi")[0]), vectors(plain, input="hi", dimensions=10)[0]
    assert np.allclose(short, whole[:10] / np.linalg.norm(whole[:10]), atol=1e-6)
    error = vectors(plain, 400, input="hi", dimensions=WIDTH + 1)["error"]
    assert error["param"] == "dimensions" and str(WIDTH) in error["message"]


def test_sizes_differ_and_the_default_is_the_largest(plain):
    answers = {
        size: post(plain.url, "/v1/embeddings", {"input": "hi", **fields})
        for size, fields in ((6, {}), (5, {"max_size": "5L"}), (4, {"size": "student"}))
    }
    for size, answer in answers.items():
        assert answer["model"] == f"{NAME}:{size}L" and answer["size"]["layers"] == size
    found = [np.array(answer["data"][0]["embedding"]) for answer in answers.values()]
    assert found[0] @ found[1] < 0.9999 and found[1] @ found[2] < 0.9999
    assert answers[6]["size"]["reason"] == answers[5]["size"]["reason"] == "default"
    error = vectors(plain, 400, input="hi", size_schedule=[{"size": "5L"}])["error"]
    assert error["param"] == "size_schedule"


@pytest.mark.parametrize(
    "value, named",
    [("", "input"), ([], "input"), ([[]], "input"), ([10**6], "input"), (["a", 1], "input"), ("hi " * 600, "input"),
     (7, "input"), (["a"] * 1025, "input")],
)  # fmt: skip
def test_inputs_that_are_refused(plain, value, named):
    assert vectors(plain, 400, input=value)["error"]["param"] == named
    assert vectors(plain, 400)["error"]["param"] == "input"


def test_the_whole_context_and_many_texts_at_once(plain):
    ids = [index % 300 for index in range(256)]
    assert len(vectors(plain, input=ids)[0]) == WIDTH
    many = vectors(plain, input=[ids[: 1 + index % 20] for index in range(200)])
    assert len(many) == 200 and np.allclose(many[3], many[23], atol=1e-5)


def test_they_count_as_inference_and_leave_nothing_behind(pair):
    limits = ("--api-key", "one", "--max-tokens-per-minute-per-key", "10", "--max-num-queued-reqs", "4")
    with RunningServer(pair, *limits, *QUICK) as server:
        headers = {"authorization": "Bearer one"}
        statuses = [
            httpx.post(server.url + "/v1/embeddings", json={"input": [5] * 6}, headers=headers).status_code
            for _ in "ab"
        ]
        assert statuses == [200, 429]
        load = httpx.get(server.url + "/load", headers=headers).json()
        assert load["num_running"] == load["num_waiting"] == load["server_load"] == 0 and load["kv_usage"] == 0
        assert httpx.post(server.url + "/v1/embeddings", json={"input": "x"}).status_code == 401
    assert '"POST /v1/embeddings" 200' in "".join(server.log)


def test_ollamas_client(plain):
    client = ollama.Client(plain.url)
    expected = vectors(plain, input=["hi", "ho"])
    answer = client.embed(MODEL, ["hi", "ho"])
    assert np.allclose(answer.embeddings, expected, atol=1e-6) and answer.prompt_eval_count == 3
    assert client.embed(MODEL, "hi", dimensions=5).embeddings[0] == vectors(plain, input="hi", dimensions=5)[0]
    assert client.embeddings(MODEL, "hi").embedding == expected[0]
    assert client.embed(MODEL, "").embeddings == [] and client.embeddings(MODEL).embedding == []
    long = "hi " * 600
    assert client.embed(MODEL, long).prompt_eval_count == 256
    for refused in (lambda: client.embed(MODEL, long, truncate=False), lambda: client.embeddings(MODEL, long)):
        with pytest.raises(ollama.ResponseError, match="256") as error:
            refused()
        assert error.value.status_code == 400
