"""Budgets over HTTP: what the key file, headers, body and server say, who is refused, and who waits for whom.

Limits are either out of reach (a thousandth of a millisecond) or no limits (hours): no assertion depends on speed.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.api.tiny import NAME, RunningServer

NEVER, ALWAYS = 0.001, 1e7  # milliseconds
KEYS = f"""
- {{key: gold, tenant: gold, weight: 3, min_size: 5L}}
- {{key: free, tenant: free, weight: 1, max_size: 5L}}
- {{key: rushed, tenant: rushed, min_size: 5L, slo_ttft_ms: {NEVER}, slo_tpot_ms: {NEVER}}}
- {{key: strict, tenant: strict, slo_tpot_ms: {NEVER}, slo_policy: strict}}
- {{key: plain, tenant: plain}}
"""


# One for all: to make a client takes longer than an answer here.
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Of both servers, so that only the first calibrates."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "keys.yaml").write_text(KEYS)
    return folder


@pytest.fixture(scope="module")
def server(pair, store):
    """Room for all that most tests send."""
    flags = ["--store", str(store), "--size-policy", "auto", "--api-key-file", str(store / "keys.yaml")]
    with RunningServer(pair, *flags, "--max-num-seqs", "8", "--max-num-queued-reqs", "16") as running:
        yield running


@pytest.fixture(scope="module")
def single(pair, store):
    """One request at a time, so that the queue alone decides who is next; a limit and bounds from flags."""
    flags = ["--store", str(store), "--size-policy", "auto", "--api-key-file", str(store / "keys.yaml")]
    flags += ["--max-num-seqs", "1", "--max-num-queued-reqs", "12", "--max-num-queued-tokens", "400"]
    with RunningServer(pair, *flags, "--slo-tpot-ms", str(NEVER), "--min-size", "5L") as running:
        yield running


def post(server, key="", headers=None, **body) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | (headers or {})
    body = {"prompt": "The quick", "max_tokens": 4, "temperature": 0, "ignore_eos": True} | body
    return CLIENT.post(server.url + "/v1/completions", json=body, headers=headers)


def served(answer: httpx.Response) -> tuple[str, str]:
    """(size, reason) of an answer; the id, the object and the headers say the same."""
    assert answer.status_code == 200, answer.text
    content, size = answer.json(), answer.json()["size"]
    name = f"{size['layers']}L"
    assert content["model"] == f"{NAME}:{name}" and answer.headers["x-boomerang-size"] == name
    assert answer.headers["x-boomerang-size-reason"] == size["reason"]
    return name, size["reason"]


def refused(answer: httpx.Response, status: int, param: str | None) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
    return error["message"]


def best(message: str) -> float:
    """The figure that a 400 says could be reached, in milliseconds."""
    found = re.search(
        r"expected to reach for this request, idle and at its fastest, is ([0-9.]+) \(at (\d)L\)", message
    )
    assert found, message
    return float(found[1])


@contextlib.contextmanager
def busy(server, count: int, **body):
    """`count` long answers to one request of `plain`, of which the first runs."""
    body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": count} | body
    headers = {"authorization": "Bearer plain"}
    with CLIENT.stream("POST", server.url + "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()  # which closes the connection when nobody holds it
        next(lines)
        yield


def wait_queued(server, count: int) -> None:
    _wait(server, lambda load: load["num_waiting"] >= count)


def wait_idle(server) -> None:
    """Those who left are forgotten."""
    _wait(server, lambda load: not load["server_load"] and not load["num_waiting"] and not load["num_running"])


def _wait(server, is_met: Callable[[dict], bool]) -> None:
    for _ in range(5000):
        load = CLIENT.get(server.url + "/load", headers={"authorization": "Bearer plain"}).json()
        if is_met(load):
            return
    raise AssertionError(load)


# --- where limits come from


def test_floors_and_ceilings_of_keys(server):
    assert served(post(server, "plain")) == ("6L", "auto")
    assert served(post(server, "free")) == ("5L", "tenant_ceiling")
    assert served(post(server, "free", size="4L")) == ("4L", "requested")
    assert served(post(server, "gold", max_size="5L"))[0] == "5L"
    for key, body in (("free", {"size": "6L"}), ("gold", {"size": "4L"}), ("free", {"min_size": "6L"})):
        message = refused(post(server, key, **body), 400, next(iter(body)))
        assert "5L" in message  # what is served to this key


def test_limits_of_a_key_are_goals_that_the_request_may_replace(server):
    assert served(post(server, "rushed")) == ("5L", "floor")  # its own floor, not the pair's
    free = {"slo": {"ttft_ms": ALWAYS, "tpot_ms": ALWAYS}}
    assert served(post(server, "rushed", **free)) == ("6L", "auto")
    headers = {"x-slo-ttft-ms": str(ALWAYS), "x-slo-tpot-ms": str(ALWAYS)}
    assert served(post(server, "rushed", headers)) == ("6L", "auto")
    assert served(post(server, "rushed", {"x-slo-ttft-ms": str(ALWAYS)})) == ("5L", "floor")  # the other one stays


def test_a_strict_key_refuses_what_it_cannot_keep(server):
    assert best(refused(post(server, "strict"), 400, "slo.tpot_ms")) > NEVER
    assert served(post(server, "strict", slo_policy="best_effort")) == ("4L", "floor")
    assert served(post(server, "strict", slo={"tpot_ms": ALWAYS})) == ("6L", "auto")


def test_defaults_of_the_server(single):
    assert served(post(single, "plain")) == ("5L", "floor")
    best(refused(post(single, "plain", slo_policy="strict"), 400, "slo.tpot_ms"))
    assert post(single, "plain", {"x-slo-tpot-ms": str(ALWAYS)}, slo_policy="strict").status_code == 200
    refused(post(single, "plain", size="4L"), 400, "size")


@pytest.mark.parametrize("limit", ["ttft", "tpot", "e2e"])
def test_the_impossible_is_400_with_the_best_figure(server, limit):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="plain", max_retries=0)
    arguments = {"model": NAME, "prompt": "The quick", "max_tokens": 8}
    strict = {"slo_policy": "strict"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**arguments, extra_body={"slo": {f"{limit}_ms": NEVER}} | strict)
    assert caught.value.param == f"slo.{limit}_ms" and caught.value.response.headers["x-should-retry"] == "false"
    if limit != "e2e":
        by_header = post(server, "plain", {f"x-slo-{limit}-ms": str(NEVER)}, max_tokens=8, **strict)
        assert refused(by_header, 400, f"slo.{limit}_ms") == caught.value.body["message"]
    figure = best(caught.value.message)
    if figure:  # what is said to be possible is accepted, or refused as something to try again
        answer = post(server, "plain", max_tokens=8, slo={f"{limit}_ms": figure * 1.1}, ignore_eos=False, **strict)
        assert answer.status_code in (200, 503)


@pytest.mark.parametrize("limit", ["ttft", "tpot", "e2e"])
def test_best_effort_is_always_served_and_says_how(server, limit):
    assert served(post(server, "plain", slo={f"{limit}_ms": NEVER}))[1] == "floor"
    assert served(post(server, "plain", slo={f"{limit}_ms": NEVER}, size="5L")) == ("5L", "floor")


def test_a_memory_budget_narrows_the_sizes(server):
    message = refused(post(server, "plain", memory_budget_mb=0.001), 400, "memory_budget_mb")
    need = float(re.search(r"needs ([0-9.]+) MiB", message)[1])
    assert served(post(server, "plain", memory_budget_mb=need + 0.06)) == ("4L", "memory_budget")


# --- what cannot be met now


def test_strict_is_refused_and_best_effort_served_at_its_floor(single):
    impossible = post(single, "plain", slo={"ttft_ms": NEVER}, slo_policy="strict")
    figure = best(refused(impossible, 400, "slo.ttft_ms"))
    limit = {"slo": {"ttft_ms": 2 * figure, "tpot_ms": ALWAYS}}  # idle: easily; behind 960 steps: not
    with concurrent.futures.ThreadPoolExecutor() as pool, busy(single, 4):
        strict = pool.submit(post, single, "plain", slo_policy="strict", **limit)
        effort = pool.submit(post, single, "plain", **limit)
        concurrent.futures.wait([strict, effort])
    message = refused(strict.result(), 503, None)
    assert "slo_policy is strict" in message and 1 <= int(strict.result().headers["retry-after"]) <= 60
    assert served(effort.result()) == ("5L", "floor")


def test_a_burst_beyond_the_queue_is_503_with_a_time_to_wait(single):
    hasty, patient = (
        openai.OpenAI(base_url=single.url + "/v1", api_key="plain", max_retries=retries) for retries in (0, 20)
    )
    arguments = {"model": NAME, "prompt": "x", "max_tokens": 2}
    with busy(single, 24):  # so many that the queue stays full while some of them end
        with pytest.raises(openai.InternalServerError) as caught:
            hasty.completions.create(**arguments)
        error = caught.value
        assert error.status_code == 503 and error.code == "server_overloaded" and error.type == "overloaded_error"
        assert re.search(r"\d\d requests are waiting", error.message)
        assert 1 <= int(error.response.headers["retry-after"]) <= 30
        assert served(post(single, "gold", max_tokens=1))[0] in ("5L", "6L")  # another's burst is not its own
    wait_idle(single)
    with busy(single, 8, max_tokens=160, prompt=[5] * 90):
        long = post(single, "plain", prompt=[5] * 90)
        assert re.search(r"\d\d\d prompt tokens are waiting", refused(long, 503, None))
        assert 1 <= int(long.headers["retry-after"]) <= 30
    assert patient.completions.create(**arguments).usage.completion_tokens == 2
    metrics = CLIENT.get(single.url + "/metrics").text
    for bound in ("reqs", "tokens"):
        assert re.search(rf"\w+:\w*reject\w*\{{.*max_num_queued_{bound}.*\}} [1-9]", metrics)


# --- tenants


def test_a_flood_from_one_key_neither_starves_nor_shrinks_another(server):
    """Also at the bound of the queue: a flood fills it up for itself alone."""
    order: list[str] = []

    def run(key: str, **body) -> httpx.Response:
        answer = post(server, key, **body)
        if answer.status_code == 200:
            order.append(key)
        return answer

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        flood = [pool.submit(run, "plain", max_tokens=200) for _ in range(8)]
        _wait(server, lambda load: load["num_running"] >= 8)  # or some that could run would still fill the queue
        flood += [pool.submit(run, "plain", max_tokens=200) for _ in range(40)]
        wait_queued(server, 8)
        calm = run("gold")
        answers = [attempt.result() for attempt in flood]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 24
    assert served(calm) == ("6L", "auto")
    assert len(order) - order.index("gold") > 4  # eight waited when it came, and it did not queue behind them


def test_the_queue_goes_by_weight(single):
    """Three of gold for one of free; both ask for the same."""
    order: list[str] = []
    body = {"prompt": "x", "size": "5L", "max_tokens": 16, "ignore_eos": True, "stream": True, "n": 4}

    def run(key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        with CLIENT.stream("POST", single.url + "/v1/completions", json=body, headers=headers) as answer:
            order.extend(key for line in answer.iter_lines() if '"finish_reason":"length"' in line)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with busy(single, 2):
            runs = [pool.submit(run, key) for key in ("free", "gold")]
            wait_queued(single, 8)
        for attempt in runs:
            attempt.result()
    assert sorted(order) == ["free"] * 4 + ["gold"] * 4
    assert order[:4].count("gold") == 3
