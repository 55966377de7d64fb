"""/metrics, /health and /live on a port of their own, from a thread of their own.

What asks here is a balancer, a scraper or an orchestrator: it learns the truth even while the event loop is busy, and
metrics are not on the port that the world sees.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

from server.api.http.errors import APIError
from server.api.http.state import ServerState

_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class ProbeServer(ThreadingHTTPServer):
    """Serves `state` on `address` (host, port) until `close`."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], state: ServerState) -> None:
        self.routes: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/metrics": lambda: (_METRICS, state.metrics.render()),
            "/health": lambda: _ok(state.check_health),
            "/live": lambda: _ok(state.check_live),
        }
        super().__init__(address, _Handler)
        threading.Thread(target=self.serve_forever, name="probes", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A balancer's check may hang up without reading the answer: no traceback for that."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def _ok(check: Callable[[], None]) -> tuple[str, bytes]:
    check()
    return "application/json", orjson.dumps({"status": "ok"})


class _Handler(BaseHTTPRequestHandler):
    timeout = 10
    server: ProbeServer

    def do_GET(self) -> None:
        status, headers = 200, {}
        try:
            route = self.server.routes.get(self.path.partition("?")[0])
            if route is None:
                raise APIError("Not Found", status=404)
            kind, content = route()
        except APIError as error:
            status, headers = error.status, error.headers()
            kind, content = "application/json", orjson.dumps(error.body())
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
