"""The compose file on a real Docker engine: `make test-compose`. The tests build on each other, in order.

Needs images (`docker compose build`), `docker` with Compose v2, and the ports of this project's own on loopback. The
engine is the machine's, or whatever DOCKER_HOST says.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.tiny import make_pair

pytestmark = [
    pytest.mark.skipif(not os.environ.get("BOOMERANG_TEST_COMPOSE"), reason="make test-compose"),
    pytest.mark.timeout(1800),
]

ROOT = Path(__file__).parents[2]
PROJECT = "boomerang-test"
URL = "http://127.0.0.1:18000"
BODY = {"prompt": "The quick", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def docker(*command: str, check: bool = True) -> str:
    result = subprocess.run(["docker", *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout + ("" if result.returncode == 0 else result.stderr)


class Project:
    def __init__(self, secrets: Path) -> None:
        self.secrets = secrets
        self.overlays: tuple[str, ...] = ()
        self.variables = {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "BOOMERANG_TEACHER": "/store/tiny",
            "BOOMERANG_STUDENT": "/store/student",
            "BOOMERANG_NUM_THREADS": "1",
            "BOOMERANG_MIN_REPLICAS": "2",
            "BOOMERANG_MAX_REPLICAS": "3",
            "BOOMERANG_SECRETS": str(secrets),
            "BOOMERANG_PUBLISH": "127.0.0.1:18000",
            "BOOMERANG_PUBLISH_STATS": "127.0.0.1:18404",
            "BOOMERANG_PUBLISH_PROMETHEUS": "127.0.0.1:19090",
            "BOOMERANG_PUBLISH_GRAFANA": "127.0.0.1:13000",
        }

    def compose(self, *command: str, check: bool = True) -> str:
        os.environ.update(self.variables)
        files = [
            "docker-compose.yml",
            *(f"docker-compose.{name}.yml" for name in self.overlays),
            "tests/compose/small.yml",
        ]
        return docker("compose", *(part for name in files for part in ("-f", name)), *command, check=check)

    def replicas(self) -> dict[str, dict]:
        """Container id -> what `docker inspect` says, of all containers of the service that run."""
        labels = [f"com.docker.compose.project={PROJECT}", "com.docker.compose.service=server"]
        ids = docker("ps", "-q", "--no-trunc", *(part for label in labels for part in ("--filter", f"label={label}")))
        return {item["Id"]: item for item in json.loads(docker("inspect", *ids.split()))} if ids.split() else {}

    def wait_replicas(self, number: int, seconds: float = 120, without: tuple[str, ...] = ()) -> dict[str, dict]:
        def healthy() -> dict[str, dict]:
            found = self.replicas()
            return {id: item for id, item in found.items() if item["State"]["Health"]["Status"] == "healthy"}

        until(lambda: len(healthy()) == number and not set(without) & set(self.replicas()), seconds, self.replicas)
        return healthy()


def until(condition, seconds: float, state=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.5)


def is_clone(item: dict) -> bool:
    return "io.boomerang.autoscaler" in item["Config"]["Labels"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("compose")
    (folder / "secrets").mkdir()
    project = Project(folder / "secrets")
    make_pair(folder / "pair")
    subprocess.run(["chmod", "-R", "a+rX", str(folder / "pair")], check=True)  # for the user in the image
    project.compose("create", "--no-build", "server")
    (container,) = project.compose("ps", "--all", "-q", "server").split()
    docker("cp", f"{folder}/pair/.", f"{container}:/store/")
    yield project
    project.compose("logs", "--no-color", "--tail", "50", check=False)
    project.compose("down", "--remove-orphans", "--volumes", "--timeout", "5", check=False)


@contextlib.contextmanager
def probing(key: str = "") -> Iterator[Counter[str]]:
    """Asks through the load balancer all the time; what came of it, by status or kind of failure."""
    seen: Counter[str] = Counter()
    stop = threading.Event()

    def probe() -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        while not stop.wait(0.1):
            try:
                body = {"prompt": "x", "max_tokens": 1}
                seen[str(httpx.post(URL + "/v1/completions", json=body, headers=headers, timeout=30).status_code)] += 1
            except httpx.HTTPError as error:
                seen[type(error).__name__] += 1

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_up_and_scaled_by_the_autoscaler(project):
    project.compose("up", "-d", "--no-build")
    project.wait_replicas(2)  # one that Compose made, one that the autoscaler added through the gate
    assert sorted(map(is_clone, project.replicas().values())) == [False, True]
    until(lambda: "200" in probe_once(), 60)
    services = [json.loads(line) for line in project.compose("ps", "--format", "json").splitlines()]
    assert {s["Service"] for s in services} >= {"gate", "autoscaler", "haproxy", "prometheus", "grafana"}
    assert httpx.get(URL + "/metrics").status_code == 404
    assert httpx.get("http://127.0.0.1:18404/health").status_code == 200
    until(lambda: '"up"' in httpx.get("http://127.0.0.1:19090/api/v1/query", params={"query": "up"}).text, 30)


def probe_once() -> str:
    with contextlib.suppress(httpx.HTTPError):
        return str(httpx.post(URL + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=10).status_code)
    return ""


def test_a_clone_is_what_compose_made(project):
    clone, made = sorted(project.replicas().values(), key=is_clone, reverse=True)
    for part in ("ReadonlyRootfs", "CapDrop", "SecurityOpt", "Privileged", "Binds", "Mounts", "LogConfig", "Tmpfs"):
        assert clone["HostConfig"].get(part) == made["HostConfig"].get(part), part
    assert clone["Config"]["Env"] == made["Config"]["Env"] and clone["Image"] == made["Image"]


def test_nobody_but_the_gate_reaches_the_engine(project):
    sockets = {}
    for id in project.compose("ps", "-q").split():
        (item,) = json.loads(docker("inspect", id))
        if any("docker.sock" in mount["Source"] for mount in item["Mounts"]):
            sockets[item["Config"]["Labels"]["com.docker.compose.service"]] = item
    assert list(sockets) == ["gate"]
    ask = (
        "import httpx,sys; r = httpx.post('http://gate:2380' + sys.argv[1], content=sys.argv[2]); print(r.status_code)"
    )
    for path, body in (("/containers/create", '{"Image": "x"}'), ("/replicas", '{"HostConfig": {"Privileged": true}}')):
        assert project.compose("exec", "-T", "autoscaler", "python", "-c", ask, path, body).strip() == "400"


def test_up_leaves_what_the_autoscaler_added(project):
    before = set(project.replicas())
    project.compose("up", "-d", "--no-build")
    assert set(project.replicas()) == before


def test_haproxy_reloads_without_losing_a_stream(project):
    lines = []
    with httpx.stream("POST", URL + "/v1/completions", json=BODY | {"stream": True}, timeout=60) as stream:
        for number, line in enumerate(stream.iter_lines()):
            if number == 4:
                project.compose("kill", "-s", "USR2", "haproxy")
            lines.append(line)
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
    until(lambda: probe_once() == "200", 20)


def test_a_killed_replica_comes_back_and_costs_only_its_own_streams(project):
    (made,) = [id for id, item in project.replicas().items() if not is_clone(item)]
    with probing() as seen:
        time.sleep(2)
        pid = json.loads(docker("inspect", made))[0]["State"]["Pid"]
        os.kill(pid, 9)  # not `docker kill`, which counts as a stop on purpose
        time.sleep(15)
    print("kill -9 of a replica:", dict(seen))
    project.wait_replicas(2)
    assert seen["200"] > 20 and sum(seen.values()) - seen["200"] <= 1


def test_a_frozen_replica_holds_up_only_what_it_was_serving(project):
    (frozen,) = [id for id, item in project.replicas().items() if is_clone(item)]
    with probing() as seen:
        time.sleep(2)
        docker("pause", frozen)
        time.sleep(12)
    docker("unpause", frozen, check=False)  # the autoscaler may have replaced it by now
    print("a replica frozen:", dict(seen))
    assert seen["200"] > 20 and sum(seen.values()) - seen["200"] <= 1
    project.wait_replicas(2)


def test_a_stop_under_load_waits_for_its_answers(project):
    """A clone that is told to go finishes the streams that it has; new requests go elsewhere."""
    ended: list[bool] = []

    def stream() -> None:
        with httpx.stream("POST", URL + "/v1/completions", json=BODY | {"stream": True}, timeout=60) as answer:
            ended.append(list(answer.iter_lines())[-2:].count("data: [DONE]") == 1)

    threads = [threading.Thread(target=stream) for _ in range(8)]
    (clone,) = [id for id, item in project.replicas().items() if is_clone(item)]
    with probing() as seen:
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        docker("kill", "-s", "TERM", clone)
        for thread in threads:
            thread.join()
    print("a replica stopped under load:", Counter(ended), dict(seen))
    assert ended == [True] * 8 and set(seen) == {"200"}
    project.wait_replicas(2, without=(clone,))


def test_an_update_to_keys_replaces_every_replica_and_refuses_nobody(project):
    """Compose makes its own replica anew, the autoscaler then its clones: no replica without keys is left."""
    (project.secrets / "api_keys").write_text("first\n")
    before = tuple(project.replicas())
    project.overlays = ("keys",)
    with probing("first") as seen:
        project.compose("up", "-d", "--no-build")
        project.wait_replicas(2, 240, without=before)
    print("update of two replicas:", dict(seen))
    assert set(seen) == {"200"}, seen
    assert probe_once() == "401"
    for item in project.replicas().values():
        assert "BOOMERANG_API_KEY_FILE=/run/secrets/api_keys" in item["Config"]["Env"]


def test_a_key_is_rotated_without_a_restart(project):
    before = set(project.replicas())
    (project.secrets / "api_keys").write_text("second\n")  # the same file: a new one would not be seen in the container
    for id in before:
        docker("kill", "-s", "HUP", id)
    headers = {"authorization": "Bearer second"}
    until(lambda: httpx.get(URL + "/v1/models", headers=headers).status_code == 200, 20)
    assert httpx.get(URL + "/v1/models", headers={"authorization": "Bearer first"}).status_code == 401
    assert set(project.replicas()) == before


def test_a_missing_secret_is_said_and_nothing_keyless_serves(project):
    (project.secrets / "api_keys").rename(project.secrets / "away")
    try:
        said = project.compose("up", "-d", "--no-build", "--force-recreate", "server", check=False)
        print("secret missing:", said.strip().splitlines()[-1:])
        assert "api_keys" in said
        assert probe_once() in ("401", "503")
    finally:
        (project.secrets / "away").rename(project.secrets / "api_keys")
    project.compose("up", "-d", "--no-build")
    project.wait_replicas(2, 240)


def test_the_autoscalers_absence_changes_nothing(project):
    before = set(project.replicas())
    project.compose("stop", "autoscaler", "prometheus")
    with probing("second") as seen:
        time.sleep(5)
    assert set(seen) == {"200"} and set(project.replicas()) == before
    project.compose("start", "prometheus", "autoscaler")
    time.sleep(5)
    assert set(project.replicas()) == before


def test_down_leaves_nothing_behind(project):
    project.compose("down", "--remove-orphans", "--timeout", "20")
    assert not project.replicas()
    assert not docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={PROJECT}").strip()
