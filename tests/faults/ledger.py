"""What clients were promised and what they got: answered, told of a failure, or lost (neither).

With BOOMERANG_FAULT_REPORT=FILE the rows go there as lines of the table in docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx


@dataclass
class Ledger:
    """Counts what became of requests. `lost` must stay empty: a request without an answer and without an error."""

    answered: int = 0
    told: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    texts: dict[Any, str] = field(default_factory=dict)

    def tell(self, what: str) -> None:
        self.told[what] = self.told.get(what, 0) + 1

    def record(self, fault: str, after: str) -> None:
        told = ", ".join(f"{count} x {what}" for what, count in sorted(self.told.items())) or "none"
        total = self.answered + sum(self.told.values()) + len(self.lost)
        line = f"| {fault} | {total} | {self.answered} | {told} | {len(self.lost)} | {after} |"
        if target := os.environ.get("BOOMERANG_FAULT_REPORT"):
            with Path(target).open("a") as file:
                file.write(line + "\n")
        assert not self.lost, self.lost

    async def ask(self, client: httpx.AsyncClient, body: dict[str, Any], key: Any = None, **kwargs: Any) -> int:
        """One request to its end; returns the HTTP status (0 for a connection that broke)."""
        try:
            if body.get("stream"):
                return await self._stream(client, body, key, **kwargs)
            response = await client.post("/v1/completions", json=body, **kwargs)
        except httpx.TransportError as error:
            # A connection refused was never accepted; one that breaks in the middle of an answer tells by breaking.
            self.tell("connection refused" if isinstance(error, httpx.ConnectError) else "connection broken")
            return 0
        if response.status_code == 200:
            self.answered += 1
            self.texts[key] = response.json()["choices"][0]["text"]
        else:
            assert response.json()["error"]["message"]
            self.tell(str(response.status_code))
        return response.status_code

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any], key: Any, **kwargs: Any) -> int:
        text, end = "", ""
        async with client.stream("POST", "/v1/completions", json=body, **kwargs) as response:
            if response.status_code != 200:
                self.tell(str(response.status_code))
                return response.status_code
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    end = end or "done"
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        end = "error event"
                    else:
                        text += event["choices"][0]["text"]
        if end == "done":
            self.answered += 1
            self.texts[key] = text
        elif end:
            self.tell(end)
        else:
            self.lost.append(f"a stream ended without [DONE] or an error: {text[:80]!r}")
        return 200


def gather(url: str, work) -> Any:
    """Run `work(client)` on a client of `url`."""

    async def run() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())
