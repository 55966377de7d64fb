"""A minimal Docker Engine API on a Unix socket: the calls that the driver makes, with Docker's shapes and statuses."""

from __future__ import annotations

import datetime
import json
import secrets
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

SERVICE_LABELS = {
    "com.docker.compose.project": "boomerang",
    "com.docker.compose.service": "server",
    "com.docker.compose.oneoff": "False",
    "com.docker.compose.container-number": "1",
    "com.docker.compose.config-hash": "aaaa",
}


def container(name: str, labels: dict[str, str], status: str = "running", **host_config) -> dict:
    return {
        "Id": secrets.token_hex(32),
        "Name": "/" + name,
        "Created": "2026-01-02T03:04:05.123456789Z",
        "Image": "sha256:1111",
        "State": {"Status": status, "Health": {"Status": "healthy"}, "StartedAt": "2026-01-02T03:04:06.5Z"},
        "Config": {
            "Image": "boomerang-serve:cpu",
            "Env": ["BOOMERANG_PORT=8000"],
            "Cmd": ["serve"],
            "Labels": labels,
            "Hostname": "never-copied",
            "StopTimeout": 320,
        },
        "HostConfig": {
            "Binds": ["boomerang_store:/store:rw"],
            "NetworkMode": "boomerang_default",
            "RestartPolicy": {"Name": "unless-stopped", "MaximumRetryCount": 0},
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            **host_config,
        },
        "NetworkSettings": {"Networks": {"boomerang_default": {"IPAddress": "10.0.0.2", "Aliases": ["abc", "server"]}}},
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class FakeEngine:
    """State in `containers`; every request line in `calls`; the next status codes to fail with in `failures`."""

    def __init__(self, path: Path) -> None:
        first = container("boomerang-server-1", SERVICE_LABELS)
        other = container("boomerang-haproxy-1", {**SERVICE_LABELS, "com.docker.compose.service": "haproxy"})
        self.containers = {item["Id"]: item for item in (first, other)}
        self.first, self.other = first["Id"], other["Id"]
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        self.path = path
        self.server: Server | None = None
        self.open()

    def open(self) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self):
                return "unix"

            def log_message(self, *args):
                pass

            def handle_any(self):
                if engine.server is None:  # closed, and this connection is one of those that clients keep
                    self.close_connection = True
                    return
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                status, answer = engine.answer(self.command, self.path, body)
                data = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = handle_any

        self.server = Server(str(self.path), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """The daemon goes away; its containers stay for the next `open`."""
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.path.unlink()
            self.server = None

    def answer(self, method: str, target: str, body: dict | None) -> tuple[int, object]:
        url = urlsplit(target)
        parts = [part for part in url.path.split("/") if part]
        if parts and parts[0].startswith("v1."):
            parts = parts[1:]
        query = parse_qs(url.query)
        action = f"{method} {parts[-1] if len(parts[-1]) != 64 else '{id}'}"
        self.calls.append(action)
        if action in self.failures:
            return self.failures.pop(action), {"message": f"{action} fails"}
        if parts == ["version"]:
            return 200, {"ApiVersion": "1.47", "MinAPIVersion": "1.24", "Version": "27.0"}
        if action == "GET json" and len(parts) == 2:
            wanted = json.loads(query["filters"][0])["label"]
            return 200, [self._summary(c) for c in self.containers.values() if self._has(c, wanted)]
        if action == "POST create":
            return 201, {"Id": self._create(query["name"][0], body), "Warnings": []}
        item = self.containers.get(parts[1]) if len(parts) > 1 else None
        if item is None:
            return 404, {"message": f"No such container: {parts[1]}"}
        if action == "GET json":
            return 200, item
        if action == "POST start":
            item["State"] = {"Status": "running", "Health": {"Status": "starting"}, "StartedAt": _now()}
            return 204, None
        if action == "POST kill":
            if item["State"]["Status"] != "running":
                return 409, {"message": "container is not running"}
            item["signal"] = query["signal"][0]
            return 204, None
        if action == "DELETE {id}":
            del self.containers[parts[1]]
            return 204, None
        return 404, {"message": "page not found"}

    def _create(self, name: str, body: dict) -> str:
        new = container(name, body["Labels"], status="created")
        new["Created"] = "2026-01-02T04:00:00Z"
        new["body"] = body
        new["Image"] = body["Image"]
        new["Config"] = {key: value for key, value in body.items() if key not in ("HostConfig", "NetworkingConfig")}
        self.containers[new["Id"]] = new
        return new["Id"]

    def _summary(self, item: dict) -> dict:
        created = int(datetime.datetime.fromisoformat(item["Created"][:19]).timestamp())
        return {"Id": item["Id"], "Names": [item["Name"]], "Labels": item["Config"]["Labels"], "Created": created}

    def _has(self, item: dict, wanted: list[str]) -> bool:
        return all(item["Config"]["Labels"].get(k) == v for k, v in (label.split("=", 1) for label in wanted))
