"""Steps that raise, run out of memory or yield NaN; an engine thread that dies. Who pays for it?"""

import asyncio
import time

import httpx
import pytest

from tests.faults.ledger import Ledger, gather

POISON = 77
PROMPTS = [[5 + i, 9, 20 + i] for i in range(6)]


def body(prompt, **changes) -> dict:
    # Token 77 is what makes requests poisonous here, so nobody else may happen to generate it.
    fixed = {"temperature": 0, "ignore_eos": True, "max_tokens": 30, "logit_bias": {str(POISON): -100}}
    return {"prompt": prompt} | fixed | changes


async def ask_all(client: httpx.AsyncClient, ledger: Ledger, extra=()) -> list[int]:
    asks = [
        ledger.ask(client, body(prompt, size=f"{4 + i % 3}L", stream=i % 2 == 0), i) for i, prompt in enumerate(PROMPTS)
    ]
    return await asyncio.gather(*asks, *(ledger.ask(client, request) for request in extra))


def quiet_texts(url: str) -> dict:
    ledger = Ledger()

    async def one_by_one(client):
        for i, prompt in enumerate(PROMPTS):
            await ledger.ask(client, body(prompt, size=f"{4 + i % 3}L"), i)

    gather(url, one_by_one)
    assert ledger.answered == len(PROMPTS)
    return ledger.texts


@pytest.mark.parametrize(
    ("fault", "row"),
    [({"fail": 1}, "one step raises, once"), ({"memory": 4}, "steps of more than 4 tokens run out of memory")],
)
def test_a_passing_fault_costs_nobody_anything(enduring, fault, row):
    server = enduring
    expected = quiet_texts(server.url)
    server.inject(**fault)
    ledger = Ledger()
    gather(server.url, lambda client: ask_all(client, ledger))
    server.inject()
    assert ledger.answered == len(PROMPTS) and ledger.texts == expected
    ledger.record(row, "healthy, answers unchanged")
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("kind", ["poison", "nan"])
def test_a_poison_request_fails_alone_and_is_refused_afterwards(enduring, kind):
    server = enduring
    expected = quiet_texts(server.url)
    server.inject(**{kind: POISON})
    poison = body([8, POISON, len(kind)], logit_bias=None, size="5L")  # one that this server has not met
    ledger = Ledger()
    statuses = gather(server.url, lambda client: ask_all(client, ledger, [poison]))
    assert statuses[-1] == 500 and ledger.told == {"500": 1}
    assert ledger.answered == len(PROMPTS) and ledger.texts == expected

    again = httpx.post(server.url + "/v1/completions", json=poison)
    assert again.status_code == 400 and "not tried again" in again.json()["error"]["message"]
    ledger.tell("400")
    name = "raise" if kind == "poison" else "yield NaN"
    ledger.record(f"a poison request makes its steps {name}, then comes again", "healthy, others' answers unchanged")
    assert httpx.get(server.url + "/health").status_code == 200
    load = httpx.get(server.url + "/load").json()
    assert load["kv_usage"] == 0 and load["num_running"] == 0
    server.inject()


@pytest.mark.parametrize(
    ("fault", "row"), [({"broken": True}, "every step raises"), ({"kill": True}, "the engine thread is killed")]
)
def test_a_broken_engine_tells_everybody_and_exits(faulty, fault, row):
    server = faulty()
    ledger = Ledger()

    async def break_in_the_middle(client):
        server.inject(sleep=0.03)
        asking = asyncio.ensure_future(ask_all(client, ledger))
        await asyncio.sleep(0.4)
        server.inject(**fault)
        await asking

    gather(server.url, break_in_the_middle)
    assert ledger.answered == 0 and sum(ledger.told.values()) == len(PROMPTS)
    deadline = time.monotonic() + 20
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.process.poll() == 1, "".join(server.log)
    ledger.record(row, "exits with status 1, to be restarted")
