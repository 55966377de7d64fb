"""HAProxy, Prometheus and the autoscaler around server processes, with the very configuration that Compose uses.

Every replica gets its own loopback address and the same port, a small DNS server plays Docker's, so HAProxy finds
replicas through `server-template` exactly as in containers. `python -m deploy.local` runs it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from prometheus_client import start_http_server

from deploy.autoscaler.controller import Controller
from deploy.autoscaler.decision import ScalingPolicy
from deploy.autoscaler.drivers import ProcessDriver
from deploy.autoscaler.signals import PrometheusSource
from deploy.local.dns import ReplicaDns

__all__ = ["LocalStack", "free_port"]

DEPLOY = Path(__file__).parents[1]


def free_port() -> int:
    """A TCP port that is free on every loopback address at this moment."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return probe.getsockname()[1]


@dataclass(slots=True)
class LocalStack:
    """Starts everything on `__enter__`, ends everything on `__exit__`. Needs haproxy and prometheus on PATH.

    `command` is one server's command line with `{host}` and `{port}`. `folder` receives logs, Prometheus' data and the
    decisions. Ports of 0 are chosen by the system; the chosen ones are in `api_url`, `prometheus_url` and so on.
    """

    command: Sequence[str]
    folder: Path
    policy: ScalingPolicy = field(default_factory=ScalingPolicy)
    api_port: int = 0
    prometheus_port: int = 0
    stats_port: int = 0
    autoscaler_port: int = 0
    scrape_interval: float = 1.0  # seconds
    window: str = "10s"
    interval: float = 1.0  # of the autoscaler, seconds
    drain_timeout: float = 120.0
    is_dry_run: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    driver: ProcessDriver = field(init=False)
    controller: Controller = field(init=False)
    _children: list[subprocess.Popen] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def prometheus_url(self) -> str:
        return f"http://127.0.0.1:{self.prometheus_port}"

    def __enter__(self) -> LocalStack:
        missing = [tool for tool in ("haproxy", "prometheus") if not shutil.which(tool)]
        if missing:
            raise RuntimeError(f"not installed: {', '.join(missing)} (Debian: apt-get install haproxy prometheus)")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("api_port", "prometheus_port", "stats_port", "autoscaler_port"):
            setattr(self, name, getattr(self, name) or free_port())
        try:
            self._start()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _start(self) -> None:
        dns = ReplicaDns()
        self._cleanup.callback(dns.close)
        server_port = free_port()
        targets = self.folder / "replicas.json"
        targets.write_text("[]")
        self.driver = ProcessDriver(
            self.command,
            port=server_port,
            log_directory=self.folder,
            targets_path=targets,
            on_change=dns.set,
            environment=self.environment,
        )
        self._cleanup.callback(self.driver.close)
        self.controller = Controller(
            policy=self.policy,
            source=PrometheusSource(self.prometheus_url, self.window),
            driver=self.driver,
            interval=self.interval,
            drain_timeout=self.drain_timeout,
            is_dry_run=self.is_dry_run,
            decisions_path=self.folder / "decisions.jsonl",
        )
        self._start_haproxy(dns.address, server_port)
        self._start_prometheus(targets)
        server, thread = start_http_server(
            self.autoscaler_port, addr="127.0.0.1", registry=self.controller.metrics.registry
        )
        self._cleanup.callback(thread.join)
        self._cleanup.callback(server.server_close)
        self._cleanup.callback(server.shutdown)
        loop = threading.Thread(target=self.controller.run, args=(self._stop,), daemon=True)
        loop.start()
        self._cleanup.callback(loop.join)
        self._cleanup.callback(self._stop.set)

    def _start_haproxy(self, resolver: str, server_port: int) -> None:
        environment = {
            "BOOMERANG_RESOLVER": resolver,
            "BOOMERANG_BACKEND": f"server:{server_port}",
            "BOOMERANG_PROBE_PORT": str(server_port),
            "BOOMERANG_SLOTS": str(self.policy.max_replicas + 2),  # one that drains keeps its place
            "BOOMERANG_BIND": f"127.0.0.1:{self.api_port}",
            "BOOMERANG_STATS_BIND": f"127.0.0.1:{self.stats_port}",
        }
        self._spawn("haproxy", ["haproxy", "-db", "-f", str(DEPLOY / "haproxy/haproxy.cfg")], environment)

    def _start_prometheus(self, targets: Path) -> None:
        config = {
            "global": {
                "scrape_interval": f"{self.scrape_interval:g}s",
                "evaluation_interval": f"{self.scrape_interval:g}s",
            },
            "rule_files": [str(DEPLOY / "prometheus/rules/*.rules.yml")],
            "scrape_configs": [
                {
                    "job_name": "boomerang",
                    "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
                },
                {"job_name": "haproxy", "static_configs": [{"targets": [f"127.0.0.1:{self.stats_port}"]}]},
                {"job_name": "autoscaler", "static_configs": [{"targets": [f"127.0.0.1:{self.autoscaler_port}"]}]},
            ],
        }
        path = self.folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._spawn(
            "prometheus",
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={self.folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{self.prometheus_port}",
            ],
        )

    def _spawn(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        self._cleanup.callback(_end, child)

    def wait_ready(self, replicas: int = 1, timeout: float = 120.0) -> None:
        """Until the load balancer answers, that many replicas are ready, and Prometheus serves queries.

        Raises:
            TimeoutError: not within `timeout` seconds; the logs in `folder` say why.
        """
        deadline = time.monotonic() + timeout
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError):
                    is_up = client.get(self.api_url + "/health").status_code == 200
                    is_up = is_up and client.get(self.prometheus_url + "/-/ready").status_code == 200
                    if is_up and self.num_ready() >= replicas:
                        return
                for child in self._children:
                    if child.poll() is not None:
                        raise RuntimeError(f"{child.args[0]} ended with {child.returncode}; see {self.folder}")
                time.sleep(0.1)
        raise TimeoutError(f"not ready after {timeout:.0f} s; see the logs in {self.folder}")

    def num_ready(self) -> int:
        return sum(replica.status == "ready" for replica in self.driver.replicas())


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
        if child.poll() is None:
            child.kill()
            child.wait()
