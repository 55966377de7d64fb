"""Starting and stopping replicas: the interface, and a driver that runs them as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

__all__ = ["Driver", "DriverUnavailable", "GateDriver", "ProcessDriver", "Replica", "ReplicaStatus"]

ReplicaStatus = Literal["starting", "ready", "unhealthy", "draining", "exited"]


class DriverUnavailable(Exception):
    """The engine that runs the replicas cannot be reached or refused a call."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One server as the driver sees it.

    `started`: seconds since the epoch, of its latest start. `is_managed`: started by the autoscaler (these go first).
    `is_stale`: made from a template that has been replaced since (an update, new keys).
    `is_open`: serves without keys although what is to replace it has some, and that could not start.
    """

    id: str
    status: ReplicaStatus
    started: float
    is_managed: bool = True
    address: str = ""
    is_stale: bool = False
    is_open: bool = False


class Driver(Protocol):
    """What the controller needs. Every method may raise DriverUnavailable; all are safe to repeat."""

    def replicas(self) -> list[Replica]: ...

    def start(self) -> str:
        """Starts one more replica and returns its id without waiting for it to be ready."""

    def drain(self, replica_id: str) -> None:
        """Tells a replica to take no new work, finish what it has and exit (SIGTERM)."""

    def remove(self, replica_id: str) -> None:
        """Ends a replica at once if it still runs, and forgets it."""


@dataclass(slots=True)
class GateDriver:
    """Replicas as containers, through the service that alone reaches the Docker Engine (`deploy.autoscaler.gate`)."""

    url: str
    timeout: float = 15.0  # seconds

    def replicas(self) -> list[Replica]:
        return [Replica(**fields) for fields in self._call("GET", "/replicas")]

    def start(self) -> str:
        return self._call("POST", "/replicas")["id"]

    def drain(self, replica_id: str) -> None:
        self._call("DELETE", f"/replicas/{replica_id}")

    def remove(self, replica_id: str) -> None:
        self._call("DELETE", f"/replicas/{replica_id}?now")

    def _call(self, method: str, path: str) -> Any:
        try:
            response = httpx.request(method, self.url.rstrip("/") + path, timeout=self.timeout, trust_env=False)
            value = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise DriverUnavailable(f"{type(error).__name__}: {error}") from error
        if response.is_success or (method == "DELETE" and response.status_code == 404):  # it is gone: as was asked
            return value
        raise DriverUnavailable(f"{response.status_code}: {value.get('error')}")


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen
    host: str
    port: int
    created: float
    was_ready: bool = False
    is_draining: bool = False


@dataclass(slots=True)
class ProcessDriver:
    """Replicas as child processes.

    `command` is the argument list of one server; `{host}`, `{port}` and `{index}` in it are filled in. With `port` set
    every replica gets its own loopback address (127.0.0.`first_host`...) and the same port, so that one DNS name can
    stand for all of them as in a container network; otherwise replicas share 127.0.0.1 and take free ports.
    `on_change` is called with the addresses of the live replicas whenever that list changes; `targets_path` receives
    them as a Prometheus file_sd list.
    """

    command: Sequence[str]
    port: int | None = None
    first_host: int = 2
    log_directory: Path | None = None
    targets_path: Path | None = None
    on_change: Callable[[list[str]], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    health_timeout: float = 1.0
    _processes: dict[str, _Process] = field(default_factory=dict)
    _num_started: int = 0
    _published: list[str] = field(default_factory=lambda: ["never published"])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def replicas(self) -> list[Replica]:
        found = [
            Replica(name, self._status(process), process.created, address=f"{process.host}:{process.port}")
            for name, process in tuple(self._processes.items())
        ]
        self._publish()
        return found

    def start(self) -> str:
        index = self._num_started
        host, port = self._address()
        command = [part.format(host=host, port=port, index=index) for part in self.command]
        try:
            with open(self.log_directory / f"replica-{index}.log" if self.log_directory else os.devnull, "ab") as log:
                popen = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **self.environment},
                    start_new_session=True,  # a Ctrl-C in the terminal is for the autoscaler, which then drains them
                )
        except OSError as error:
            raise DriverUnavailable(f"cannot start {shlex.join(command)}: {error}") from error
        self._num_started += 1
        name = f"replica-{index}"
        self._processes[name] = _Process(popen, host, port, time.time())
        self._publish()
        return name

    def drain(self, replica_id: str) -> None:
        process = self._processes.get(replica_id)
        if process and not process.is_draining:
            process.is_draining = True
            with contextlib.suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGTERM)

    def remove(self, replica_id: str) -> None:
        process = self._processes.pop(replica_id, None)
        if process and process.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.popen.kill()
            process.popen.wait()
        self._publish()

    def pid(self, replica_id: str) -> int:
        return self._processes[replica_id].popen.pid

    def close(self, timeout: float = 10.0) -> None:
        """Drains all, waits up to `timeout` seconds, ends what is left."""
        for name in list(self._processes):
            self.drain(name)
        deadline = time.monotonic() + timeout
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
        for name in list(self._processes):
            self.remove(name)

    def _status(self, process: _Process) -> ReplicaStatus:
        if process.popen.poll() is not None:
            return "exited"
        if process.is_draining:
            return "draining"
        try:
            response = httpx.get(
                f"http://{process.host}:{process.port}/health", timeout=self.health_timeout, trust_env=False
            )
            is_healthy = response.status_code == 200
        except httpx.TimeoutException:
            is_healthy = process.was_ready  # busy is not gone; the load balancer judges that for itself
        except httpx.HTTPError:
            is_healthy = False
        process.was_ready = process.was_ready or is_healthy
        return "ready" if is_healthy else "starting"

    def _address(self) -> tuple[str, int]:
        if self.port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                return "127.0.0.1", probe.getsockname()[1]
        used = {process.host for process in self._processes.values()}
        for last in range(self.first_host, 255):
            if (host := f"127.0.0.{last}") not in used:
                return host, self.port
        raise DriverUnavailable("no loopback address left")

    def _publish(self) -> None:
        """Tells service discovery which addresses exist (draining ones too: their metrics still count)."""
        with self._lock:  # other threads may look at the replicas while the autoscaler acts
            processes = tuple(self._processes.values())
            live = sorted(f"{p.host}:{p.port}" for p in processes if p.popen.poll() is None)
            if live == self._published:
                return
            self._published = live
            if self.targets_path:
                partial = self.targets_path.with_suffix(".tmp")
                partial.write_text(json.dumps([{"targets": live, "labels": {}}]))
                partial.replace(self.targets_path)
            if self.on_change:
                self.on_change(live)
