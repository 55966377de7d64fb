"""A real server with both dials: every answer says which layers and which bits made it."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server.cli import main
from tests.api.tiny import NAME, RunningServer, make_pair, noted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dials")


@pytest.fixture(scope="module")
def url(folder):
    pair = make_pair(folder)
    kind = {"sizes": {"4": {"kl": 0.5}, "5": {"kl": 0.2}}, "widths": {str(w): {"kl": 0.1 / w} for w in (8, 6, 5, 4)}}
    (pair[1] / "quality.json").write_text(json.dumps({"kinds": {"prose": kind, "code": kind}}))
    flags = ["--precision-dial", "on", "--exact", "on", "--dtype", "bfloat16", "--store", str(folder / "store")]
    with RunningServer(noted(*pair, folder / "store"), *flags, "--size-policy", "auto") as server:
        yield server.url


def ask(url: str, **body) -> httpx.Response:
    base = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=base | body, timeout=60)


def test_models_list_points_and_what_they_are_worth(url):
    cards = {card["id"]: card for card in httpx.get(f"{url}/v1/models").json()["data"]}
    assert cards[NAME]["precisions"] == ["exact", "q8", "q6", "q5", "q4"]
    assert {f"{NAME}:{size}L" for size in (4, 5, 6)} <= cards.keys() and len(cards) <= 1 + 15
    assert cards[f"{NAME}:6L"]["expected_kl"] == {"prose": 0.0, "code": 0.0}
    some = httpx.get(f"{url}/v1/models/{NAME}:4L-q5").json()
    assert (some["layers"], some["precision"], some["expected_kl"]["code"]) == (4, "q5", 0.52)
    assert some["bytes"] < cards[f"{NAME}:4L"]["bytes"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "6L"),
        ({"size": "5L"}, "5L"),
        ({"size": "5L-q6"}, "5L-q6"),
        ({"model": f"{NAME}:4L-q4"}, "4L-q4"),
        ({"size": "student", "precision": "q8"}, "4L-q8"),
        ({"max_precision": "q5", "seed": 1}, "6L-q5"),
        ({"precision": "exact", "workload": "code"}, "6L"),
    ],
)
def test_answers_and_headers_say_both(url, body, name):
    answer = ask(url, **body)
    content = answer.json()
    assert answer.status_code == 200, content
    assert content["model"] == f"{NAME}:{name}" and answer.headers["x-boomerang-size"] == name
    size = content["size"]
    assert size["name"] == name and size["precision"] == (name.partition("-")[2] or "exact")


def test_a_precision_changes_the_answer_and_the_same_one_does_not(url):
    texts = {name: ask(url, size=name, max_tokens=32).json()["choices"][0]["text"] for name in ("6L", "6L-q8", "6L-q4")}
    assert texts["6L"] != texts["6L-q4"]
    assert texts["6L-q4"] == ask(url, precision="q4", size="6L", max_tokens=32).json()["choices"][0]["text"]
    assert (
        ask(url, size="6L", max_tokens=32).json()["choices"][0]["text"] == texts["6L"]
    )  # no KV of fewer bits is taken


def test_all_points_at_once_each_keep_theirs(url):
    names = [f"{size}L{bits}" for size in (4, 5, 6) for bits in ("", "-q8", "-q6", "-q5", "-q4")]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(url, size=name, max_tokens=24).json(), names))
    assert [answer["size"]["name"] for answer in answers] == names
    assert all("precisions" not in answer["size"] for answer in answers)


def test_sizes_in_turn_name_their_precisions(url):
    legs = [{"size": "4L-q4", "tokens": 3}, {"size": "6L-q8", "tokens": 3}, {"size": "6L"}]
    size = ask(url, size_schedule=legs, max_tokens=9).json()["size"]
    assert size["precisions"] == {"q4": 3, "q8": 3, "exact": 3} and size["precision"] == "q4"
    assert [(change["layers"], change["precision"]) for change in size["changes"]] == [(4, "q4"), (6, "q8")]


def test_a_stream_says_what_makes_each_chunk(url):
    body = {"prompt": "The", "max_tokens": 6, "stream": True, "ignore_eos": True,
            "size_schedule": [{"size": "5L-q5", "tokens": 3}, {"size": "5L"}]}  # fmt: skip
    lines = httpx.post(f"{url}/v1/completions", json=body, timeout=60).text.splitlines()
    models = [json.loads(line[6:])["model"] for line in lines if line.startswith("data: {")]
    assert models[0] == f"{NAME}:5L-q5" and models[-1] == f"{NAME}:5L"


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"precision": "8"}, "precision", 400),
        ({"precision": 8}, "precision", 400),
        ({"size": "5L-q3"}, "size", 400),
        ({"model": f"{NAME}:5L-q7"}, "model", 404),
        ({"min_precision": "q8", "max_precision": "q6"}, "min_precision", 400),
        ({"workload": "poetry"}, "workload", 400),
    ],
)
def test_what_is_not_served_is_refused_by_name(url, body, param, status):
    answer = ask(url, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_the_table_of_sizes_shows_what_the_server_found(url, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pair = ["--teacher", str(folder / NAME), "--student", str(folder / "student"), "--store", str(folder / "store")]
    assert main(["sizes", *pair]) == 0
    printed = capsys.readouterr().out
    assert "KL, prose" in printed and "one request" in printed and "nothing beats it for" in printed
    assert main(["sizes", *pair, "--json"]) == 0
    points = {point["name"]: point for point in json.loads(capsys.readouterr().out)["points"]}
    assert len(points) == 15 and points["6L"]["best_in"] and points["6L"]["kl_is_measured"]


def test_metrics_say_both(url):
    ask(url, size="5L-q6")
    text = httpx.get(f"{url}/metrics").text
    assert 'boomerang:size_decisions_total{model_name="tiny",precision="q6",reason="requested",size="5"}' in text
    assert 'boomerang:generation_tokens_at_total{model_name="tiny",precision="q6"}' in text
    assert "boomerang:running_expected_kl" in text and "boomerang:served_expected_kl_total" in text
