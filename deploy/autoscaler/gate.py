"""`python -m deploy.autoscaler.gate`: the only process that reaches the Docker Engine, and what it can be asked for.

Whoever can send the Engine a body of their own owns the host. So nobody can: this service knows four calls, reads no
body and no header, and composes the Engine's calls itself from the container that Compose made.

    GET    /replicas                 the replicas of the service
    POST   /replicas                 one more
    DELETE /replicas/{id}            one fewer: this one finishes its work and leaves
    DELETE /replicas/{id}?now        this one is removed, with what it was doing

An id counts only if it is one of the service's own. Answers are JSON; 400 for any other request, 409 where there are as
many as allowed, 503 with the reason while the Engine is away or refuses.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deploy.autoscaler.docker_driver import DockerDriver
from deploy.autoscaler.drivers import DriverUnavailable
from deploy.autoscaler.environment import check_environment

__all__ = ["Gate"]

log = logging.getLogger("boomerang.gate")

_ONE = re.compile(r"/replicas/([0-9a-f]{64})(\?now)?")


class Gate(ThreadingHTTPServer):
    """Serves `driver` on `address` (host, port); at most `max_replicas` containers of the service that still run."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], driver: DockerDriver, max_replicas: int) -> None:
        self.driver, self.max_replicas = driver, max_replicas
        self.lock = threading.Lock()  # one call at a time: two starts must not count the same replicas
        super().__init__(address, _Handler)

    def answer(self, method: str, target: str) -> tuple[int, Any]:
        """(status, JSON value) of one request line."""
        one = _ONE.fullmatch(target)
        with self.lock:
            if target == "/health" and method == "GET":
                return 200, {"status": "ok"}
            if target == "/replicas" and method == "GET":
                return 200, [asdict(replica) for replica in self.driver.replicas()]
            if target == "/replicas" and method == "POST":
                running = [replica for replica in self.driver.replicas() if replica.status != "exited"]
                if len(running) >= self.max_replicas:
                    return 409, {"error": f"{len(running)} replicas run; {self.max_replicas} are allowed"}
                return 201, {"id": self.driver.start()}
            if one and method == "DELETE":
                if one[1] not in {replica.id for replica in self.driver.replicas()}:
                    return 404, {"error": "not a replica of the service"}
                (self.driver.remove if one[2] else self.driver.drain)(one[1])
                return 200, {"id": one[1]}
        return 400, {"error": "no such call"}


class _Handler(BaseHTTPRequestHandler):
    timeout = 10
    server: Gate

    def _handle(self) -> None:
        try:
            if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
                status, value = 400, {"error": "no call takes a body"}
            else:
                status, value = self.server.answer(self.command, self.path)
        except DriverUnavailable as error:
            status, value = 503, {"error": str(error)}
        if status != 200:
            log.info("%s %s: %d %s", self.command, json.dumps(self.path[:200]), status, value)
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser("deploy.autoscaler.gate", description=__doc__)
    environ = os.environ.get
    parser.add_argument("--host", default=environ("BOOMERANG_GATE_HOST") or "0.0.0.0")
    parser.add_argument("--port", type=int, default=environ("BOOMERANG_GATE_PORT") or 2380)
    parser.add_argument("--service", default=environ("BOOMERANG_GATE_SERVICE") or "server")
    parser.add_argument("--project", default=environ("BOOMERANG_GATE_PROJECT") or "", help="empty: this container's")
    socket = environ("BOOMERANG_GATE_DOCKER_URL") or environ("DOCKER_HOST") or "unix:///var/run/docker.sock"
    parser.add_argument("--docker-url", default=socket)
    parser.add_argument("--max-replicas", type=int, default=environ("BOOMERANG_GATE_MAX_REPLICAS") or 16)
    check_environment(parser, "BOOMERANG_GATE_")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    gate = Gate((args.host, args.port), DockerDriver(args.service, args.project, args.docker_url), args.max_replicas)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=gate.shutdown).start())
    gate.serve_forever()


if __name__ == "__main__":
    main()
