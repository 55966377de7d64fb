"""/metrics, /health and /live on a port of their own, from a thread of their own.

What asks here is a balancer, a scraper or an orchestrator: it learns the truth even while the event loop is busy, and
metrics are not on the port that the world sees.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

from server.api.http.errors import APIError
from server.api.http.state import ServerState

logger = logging.getLogger(__name__)

_METRICS = "text/plain; version=0.0.4; charset=utf-8"


_MOST_AT_ONCE = 64  # connections, each with a thread
_SECONDS = 10.0  # for a whole request, however slowly its bytes come


class ProbeServer(ThreadingHTTPServer):
    """Serves `state` on `address` (host, port) until `close`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], state: ServerState) -> None:
        self.routes: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/metrics": lambda: (_METRICS, state.metrics.render()),
            "/health": lambda: _ok(state.check_health),
            "/live": lambda: _ok(state.check_live),
        }
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__(address, _Handler)
        threading.Thread(target=self.serve_forever, name="probes", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread; who comes when all are taken is hung up on, and nobody keeps one for long."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(_SECONDS, _hang_up, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A balancer's check may hang up without reading the answer: no traceback for that."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has gone already
        request.shutdown(socket.SHUT_RDWR)


def _ok(check: Callable[[], None]) -> tuple[str, bytes]:
    check()
    return "application/json", orjson.dumps({"status": "ok"})


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS
    server: ProbeServer

    def do_GET(self) -> None:
        status, headers = 200, {}
        try:
            route = self.server.routes.get(self.path.partition("?")[0])
            if route is None:
                raise APIError("Not Found", status=404)
            kind, content = route()
        except Exception as error:  # the engine's numbers change while they are read
            if not isinstance(error, APIError):
                logger.exception("a probe failed")
                error = APIError("The server failed to handle this request.", status=500)
            status, headers = error.status, error.headers()
            kind, content = "application/json", orjson.dumps(error.body())
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
