"""A project of the compose file on a real Docker engine, as the tests here drive it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = "boomerang-test"
IMAGE = os.environ.get("BOOMERANG_IMAGE", "boomerang-serve:cpu")
UPDATED = "boomerang-test:cpu"  # the name that the project runs: the image, and later one made after it
URL = "http://127.0.0.1:18000"
KEYS = "/run/secrets/boomerang/api_keys"


def docker(*command: str, check: bool = True, stdin: str | None = None) -> str:
    result = subprocess.run(
        ["docker", *command], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=600, check=False
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout + ("" if result.returncode == 0 else result.stderr)


class Project:
    """A project of its own, whose ports on loopback end in `port`."""

    def __init__(self, secrets: Path, name: str = PROJECT, port: int = 0) -> None:
        self.secrets, self.name = secrets, name
        self.overlays: tuple[str, ...] = ()
        self.more: tuple[str, ...] = ()  # further files, in tests/compose
        self.variables = {
            "COMPOSE_PROJECT_NAME": name,
            "BOOMERANG_IMAGE": UPDATED,
            "BOOMERANG_TEACHER": "/store/tiny",
            "BOOMERANG_STUDENT": "/store/student",
            "BOOMERANG_NUM_THREADS": "1",
            "BOOMERANG_MIN_REPLICAS": "1",
            "BOOMERANG_MAX_REPLICAS": "3",
            "BOOMERANG_SECRETS": str(secrets),
            "BOOMERANG_PUBLISH": f"127.0.0.1:{18000 + port}",
            "BOOMERANG_PUBLISH_STATS": f"127.0.0.1:{18404 + port}",
            "BOOMERANG_PUBLISH_PROMETHEUS": f"127.0.0.1:{19090 + port}",
            "BOOMERANG_PUBLISH_GRAFANA": f"127.0.0.1:{13000 + port}",
        }

    def compose(self, *command: str, check: bool = True) -> str:
        os.environ.update(self.variables)
        files = [
            "docker-compose.yml",
            *(f"docker-compose.{name}.yml" for name in self.overlays),
            *(f"tests/compose/{name}.yml" for name in ("small", *self.more)),
        ]
        return docker("compose", *(part for name in files for part in ("-f", name)), *command, check=check)

    def create(self, pair: Path) -> None:
        """The first container and its store, with `pair` in it."""
        self.compose("create", "--no-build", "server")
        (container,) = self.compose("ps", "--all", "-q", "server").split()
        docker("cp", f"{pair}/.", f"{container}:/store/")

    def down(self) -> None:
        self.compose("down", "--remove-orphans", "--volumes", "--timeout", "5", check=False)

    def logs_name(self, what: str) -> bool:
        """Whether some replica said this of the file with the keys."""
        log = self.compose("logs", "--no-color", "--no-log-prefix", "server", check=False)
        return any(KEYS in line and what in line for line in log.splitlines())

    def replicas(self) -> dict[str, dict]:
        """Container id -> what `docker inspect` says, of all containers of the service that run."""
        labels = [f"com.docker.compose.project={self.name}", "com.docker.compose.service=server"]
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        found = (docker("inspect", id, check=False) for id in docker("ps", "-q", *filters).split())
        # One that has gone between the two calls is an empty list and a message.
        items = [json.loads(text)[0] for text in found if not text.startswith("[]")]
        return {item["Id"]: item for item in items}

    def wait_replicas(self, number: int, seconds: float = 120, without: tuple[str, ...] = ()) -> dict[str, dict]:
        def healthy() -> dict[str, dict]:
            found = self.replicas()
            return {id: item for id, item in found.items() if item["State"]["Health"]["Status"] == "healthy"}

        until(
            lambda: not set(without) & set(self.replicas()) and len(healthy()) == len(self.replicas()) == number,
            seconds,
            lambda: {id: item["State"] for id, item in self.replicas().items()},
        )
        return healthy()


def until(condition, seconds: float, state=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.5)


def is_clone(item: dict) -> bool:
    return "io.boomerang.autoscaler" in item["Config"]["Labels"]


def run_alone(*options: str, seconds: float = 90) -> tuple[int | None, str]:
    """(exit status, or None if it still runs ready, its log) of one container of the image, read-only as in Compose."""
    id = docker("run", "-d", "--read-only", "--cap-drop", "ALL", "--network", "none", *options, IMAGE, "serve").strip()
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = json.loads(docker("inspect", id))[0]["State"]
            if not state["Running"]:
                return state["ExitCode"], logs_of(id)
            if "after the process started" in logs_of(id):
                return None, logs_of(id)
            time.sleep(0.5)
        raise AssertionError(logs_of(id))
    finally:
        docker("rm", "-f", "-v", id)


def logs_of(id: str) -> str:
    return subprocess.run(["docker", "logs", id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
