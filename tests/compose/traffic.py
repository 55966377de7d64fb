"""Requests through the load balancer while something happens, and what came of them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import httpx

from tests.compose.project import URL
from tests.faults.ledger import Ledger

# Seconds long: what comes in the middle of it does.
STREAM = {"prompt": "The quick", "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stream": True}


@contextlib.contextmanager
def probing(key: str = "") -> Iterator[Ledger]:
    """Asks through the load balancer all the time; what came of it."""
    ledger = Ledger()
    stop = threading.Event()

    def probe() -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        while not stop.wait(0.1):
            body = {"prompt": "x", "max_tokens": 1}
            try:
                status = httpx.post(URL + "/v1/completions", json=body, headers=headers, timeout=30).status_code
            except httpx.TransportError as error:
                ledger.tell("connection refused" if isinstance(error, httpx.ConnectError) else "connection broken")
                continue
            if status == 200:
                ledger.answered += 1
            else:
                ledger.tell(str(status))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield ledger
    finally:
        stop.set()
        thread.join()


def stream(ledger: Ledger, after_four: Callable[[], object] = lambda: None, key: str = "") -> None:
    """One streamed answer to its end; `after_four` is called in the middle of it."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    lines: list[str] = []
    try:
        with httpx.stream("POST", URL + "/v1/completions", json=STREAM, headers=headers, timeout=120) as answer:
            if answer.status_code != 200:
                return ledger.tell(str(answer.status_code))
            for line in answer.iter_lines():
                lines += [line] if line else []
                if len(lines) == 4:
                    after_four()
    except httpx.TransportError:
        return ledger.tell("connection broken")
    if lines[-1] == "data: [DONE]":
        ledger.answered += 1
    elif "error" in lines[-1]:
        ledger.tell("error event")
    else:
        ledger.lost.append(f"a stream ended with {lines[-1]!r}")
    return None


def under_streams(ledger: Ledger, fault: Callable[[], object]) -> None:
    """Sixteen streams to their ends; `fault` comes when half of them have begun."""
    begun = itertools.count(1)
    after_four = lambda: next(begun) == 8 and fault()  # noqa: E731
    threads = [threading.Thread(target=stream, args=(ledger, after_four)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def prometheus(query: str) -> float | None:
    """The value of the first series."""
    answer = httpx.get("http://127.0.0.1:19090/api/v1/query", params={"query": query}).json()
    return next((float(series["value"][1]) for series in answer["data"]["result"]), None)


def probe_once(url: str = URL) -> str:
    with contextlib.suppress(httpx.HTTPError):
        return str(httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=10).status_code)
    return ""
