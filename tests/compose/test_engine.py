"""The compose file on a real Docker engine: `make test-compose`. The tests build on each other, in order.

Needs images (`docker compose build`), `docker` with Compose v2, and the ports of this project's own on loopback. The
engine is the machine's, or whatever DOCKER_HOST says. With BOOMERANG_FAULT_REPORT=FILE the rows of the fault table go
there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.api.tiny import make_pair
from tests.compose.project import IMAGE, KEYS, PROJECT, UPDATED, URL, Project, docker, is_clone, run_alone, until
from tests.compose.traffic import probe_once, probing, prometheus, stream, under_streams
from tests.faults.ledger import Ledger

pytestmark = [
    pytest.mark.skipif(not os.environ.get("BOOMERANG_TEST_COMPOSE"), reason="make test-compose"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("compose")
    (folder / "secrets").mkdir()
    project = Project(folder / "secrets")
    make_pair(folder / "pair", 4096)
    subprocess.run(["chmod", "-R", "a+rX", str(folder / "pair")], check=True)  # for the user in the image
    docker("tag", IMAGE, UPDATED)
    project.create(folder / "pair")
    yield project
    project.down()
    docker("image", "rm", UPDATED, check=False)


def test_the_image_is_small_and_names_the_licence_of_everything_inside():
    (image,) = json.loads(docker("image", "inspect", IMAGE))
    assert image["Size"] <= 450e6
    lines = "open('/usr/share/doc/boomerang-serve/PACKAGES').read().splitlines()"
    script = f"import os; print([os.path.isfile(line.split('\t')[2]) for line in {lines}])"
    found = json.loads(docker("run", "--rm", "--entrypoint", "python", IMAGE, "-c", script).lower())
    assert len(found) > 100 and all(found)


def test_up(project):
    project.compose("up", "-d", "--no-build")
    project.wait_replicas(1)
    until(lambda: "200" in probe_once(), 60)
    services = [json.loads(line) for line in project.compose("ps", "--format", "json").splitlines()]
    assert {s["Service"] for s in services} >= {"gate", "autoscaler", "haproxy", "prometheus", "grafana"}
    assert httpx.get(URL + "/metrics").status_code == 404
    assert httpx.get("http://127.0.0.1:18404/health").status_code == 200


def test_one_replica_is_updated_and_refuses_nobody(project):
    """A new image under the same name. A second replica serves while Compose makes its own anew, and leaves again."""
    before = tuple(project.replicas())
    docker("build", "-t", UPDATED, "-", stdin=f"FROM {IMAGE}\nLABEL updated=yes\n")
    with probing() as seen:
        project.variables["BOOMERANG_MIN_REPLICAS"] = "2"
        project.compose("up", "-d", "--no-build", "autoscaler")
        before += tuple(project.wait_replicas(2))
        project.compose("up", "-d", "--no-build")
        project.wait_replicas(2, 240, without=before)
        project.variables["BOOMERANG_MIN_REPLICAS"] = "1"
        project.compose("up", "-d", "--no-build", "autoscaler")
        project.wait_replicas(1)
    assert not seen.told, seen.told
    (item,) = project.replicas().values()
    assert item["Config"]["Labels"]["updated"] == "yes" and not is_clone(item)
    seen.record("update of the only replica: a new image", "the new one serves, alone")


def test_scaled_by_the_autoscaler(project):
    """A second replica by a setting of the autoscaler, which leaves everything else alone."""
    project.variables["BOOMERANG_MIN_REPLICAS"] = "2"
    with probing() as seen:
        project.compose("up", "-d", "--no-build", "autoscaler")
        project.wait_replicas(2)  # one that Compose made, one that the autoscaler added through the gate
    assert sorted(map(is_clone, project.replicas().values())) == [False, True]
    assert not seen.told
    until(lambda: prometheus('count(up{job="boomerang"} == 1)') == 2, 30)


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
    with probing() as seen:
        stream(seen, lambda: project.compose("kill", "-s", "USR2", "haproxy"))
        time.sleep(3)  # the new process takes over and finds the replicas
    assert not seen.told, seen.told
    seen.record("HAProxy reloaded (USR2) in the middle of a stream", "the stream ran to its end")


def test_haproxy_restarted_refuses_until_it_is_back(project):
    with probing() as seen:
        stream(seen, lambda: project.compose("restart", "haproxy"))
        until(lambda: probe_once() == "200", 40)
    assert set(seen.told) <= {"connection refused", "connection broken", "503"}, seen.told
    seen.record("HAProxy restarted in the middle of a stream", "refuses until it is back and has found the replicas")


def test_a_killed_replica_comes_back_and_costs_only_its_own_streams(project):
    (made,) = [id for id, item in project.replicas().items() if not is_clone(item)]
    with probing() as seen:
        time.sleep(2)
        pid = json.loads(docker("inspect", made))[0]["State"]["Pid"]
        under_streams(seen, lambda: os.kill(pid, signal.SIGKILL))  # `docker kill` would count as a stop
        time.sleep(15)
    project.wait_replicas(2)
    assert seen.answered > 20 and sum(seen.told.values()) <= 17
    seen.record("kill -9 of one replica of two under 16 streams", "Docker started it again")


def test_a_frozen_replica_holds_up_only_what_it_was_serving(project):
    (frozen,) = [id for id, item in project.replicas().items() if is_clone(item)]
    with probing() as seen:
        time.sleep(2)
        docker("pause", frozen)
        time.sleep(12)
    docker("unpause", frozen, check=False)  # the autoscaler may have replaced it by now
    assert seen.answered > 20 and sum(seen.told.values()) <= 1
    project.wait_replicas(2)
    seen.record("one replica of two frozen", "the autoscaler replaced it")


def test_while_all_are_frozen_none_is_replaced(project):
    """A host that stands still: what looks unhealthy is not, and its answers come when it goes on."""
    made, clone = sorted(project.replicas().items(), key=lambda entry: is_clone(entry[1]))
    before = set(project.replicas())
    with probing() as seen:
        time.sleep(2)
        docker("pause", made[0])  # first: that one alone is not the autoscaler's to replace
        docker("pause", clone[0])
        time.sleep(10)
        docker("unpause", made[0], clone[0])
        until(lambda: probe_once() == "200", 40)
    assert set(seen.told) <= {"503"}, seen.told
    project.wait_replicas(2)
    assert set(project.replicas()) == before
    seen.record("both replicas frozen for 10 s", "none is replaced")


def test_a_stop_under_load_waits_for_its_answers(project):
    """A clone that is told to go finishes the streams that it has; new requests go elsewhere."""
    (clone,) = [id for id, item in project.replicas().items() if is_clone(item)]
    with probing() as seen:
        under_streams(seen, lambda: docker("kill", "-s", "TERM", clone))
    assert not seen.told
    project.wait_replicas(2, without=(clone,))
    seen.record("one replica of two told to stop under 16 streams", "it left when they had ended, and was replaced")


FAULTS = {"missing": "No such file", "unreadable": "Permission denied"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_update_to_keys_leaves_none_without(project, fault):
    """Also not the autoscaler's, which nothing replaces."""
    project.overlays = ("keys",)
    file = project.secrets / "api_keys"
    if fault == "unreadable":
        file.write_text("first\n")
        file.chmod(0o600)  # the server is another user
    project.compose("up", "-d", "--no-build")
    until(lambda: project.logs_name(FAULTS[fault]), 60)
    until(lambda: not open_replicas(project), 60, project.replicas)
    assert probe_once() == "503"
    file.unlink(missing_ok=True)
    project.overlays = ()
    project.compose("up", "-d", "--no-build")
    project.wait_replicas(2, 240)
    Ledger().record(f"update to keys, the secret {fault}", "no replica without keys is left, so none; the log says why")


def open_replicas(project: Project) -> list[str]:
    return [
        id for id, item in project.replicas().items() if not any("API_KEY_FILE" in e for e in item["Config"]["Env"])
    ]


def test_an_update_to_keys_replaces_every_replica_and_refuses_nobody(project):
    """Compose makes its own replica anew, the autoscaler then its clones: no replica without keys is left."""
    (project.secrets / "api_keys").write_text("first\n")
    before = tuple(project.replicas())
    project.overlays = ("keys",)
    with probing("first") as seen:
        project.compose("up", "-d", "--no-build")
        project.wait_replicas(2, 240, without=before)
    assert not seen.told
    assert probe_once() == "401"
    for item in project.replicas().values():
        assert f"BOOMERANG_API_KEY_FILE={KEYS}" in item["Config"]["Env"]
    seen.record("update of both replicas: keys added", "no replica without keys is left")


def test_a_key_is_rotated_without_a_restart(project):
    before = set(project.replicas())
    (project.secrets / "new").write_text("second\n")
    (project.secrets / "new").rename(project.secrets / "api_keys")  # as an editor does
    for id in before:
        docker("kill", "-s", "HUP", id)
    headers = {"authorization": "Bearer second"}
    until(lambda: httpx.get(URL + "/v1/models", headers=headers).status_code == 200, 20)
    assert httpx.get(URL + "/v1/models", headers={"authorization": "Bearer first"}).status_code == 401
    assert set(project.replicas()) == before
    Ledger().record("a key rotated (SIGHUP)", "the old one is refused")


def test_the_autoscalers_absence_changes_nothing(project):
    before = set(project.replicas())
    for services, fault in ((("autoscaler",), "the autoscaler away"), (("prometheus",), "Prometheus away")):
        project.compose("stop", *services)
        with probing("second") as seen:
            time.sleep(5)
        assert not seen.told and set(project.replicas()) == before
        project.compose("start", *services)
        time.sleep(3)
        assert set(project.replicas()) == before
        seen.record(fault, "replicas stay")


def test_what_the_autoscaler_learned_survives_it(project, tmp_path):
    project.compose("stop", "autoscaler")
    (container,) = project.compose("ps", "--all", "-q", "autoscaler").split()
    (tmp_path / "state.json").write_text('{"capacity": 7.5, "draining": {}}')
    docker("cp", str(tmp_path / "state.json"), f"{container}:/decisions/state.json")
    project.compose("start", "autoscaler")
    capacity = lambda: prometheus("boomerang_autoscaler_replica_capacity_requests") or 0  # noqa: E731
    until(lambda: 7.5 <= capacity() < 8, 30, capacity)  # in calm times it grows


def test_a_second_project_on_this_host(project, tmp_path):
    make_pair(tmp_path / "pair", 4096)
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path / "pair")], check=True)
    before = set(project.replicas())
    other = Project(project.secrets, f"{PROJECT}-2", port=1)
    try:
        other.create(tmp_path / "pair")
        other.compose("up", "-d", "--no-build", "server", "haproxy")
        other.wait_replicas(1)
        until(lambda: probe_once(url="http://127.0.0.1:18001") == "200", 40)
    finally:
        other.down()
    assert probe_once() == "401" and set(project.replicas()) == before


def test_a_store_that_cannot_be_written_serves(project):
    before = tuple(project.replicas())
    project.more = ("read_only",)
    with probing("second") as seen:
        project.compose("up", "-d", "--no-build")
        project.wait_replicas(2, 240, without=before)
    assert not seen.told
    seen.record("update of both replicas: the store read-only", "they serve")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_restart_without_its_secret_serves_nobody_without_keys(project, fault):
    """The other replica, which had read them, goes on with them."""
    file = project.secrets / "api_keys"
    if fault == "missing":
        file.rename(project.secrets / "away")
    else:
        file.chmod(0o600)
    project.compose("up", "-d", "--no-build", "--force-recreate", "server")
    until(lambda: project.logs_name(FAULTS[fault]), 60)
    assert probe_once() in ("401", "503")
    if fault == "missing":
        (project.secrets / "away").rename(file)
    else:
        file.chmod(0o644)
    project.compose("up", "-d", "--no-build", "--force-recreate", "server")
    project.wait_replicas(2, 240)
    Ledger().record(f"restart of a replica, its secret {fault}", "the log names the file; none without keys serves")


def test_a_store_that_is_full_is_said_before_anything_is_fetched():
    status, log = run_alone("--tmpfs", "/tmp", "--tmpfs", "/store:size=16m,mode=0777")
    assert status == 1 and "the disk of /store/incoming is full: the default teacher needs 550 MiB" in log, log
    assert "Traceback" not in log and "downloading" not in log
    Ledger().record("the store is full", "exit 1 with the reason, before anything is fetched")


PAIR = (
    "-e",
    "BOOMERANG_TEACHER=/store/tiny",
    "-e",
    "BOOMERANG_STUDENT=/store/student",
    "-e",
    "BOOMERANG_DTYPE=float32",
)


def test_without_tmp_a_pair_is_served(project):
    """A new one. What needs a temporary folder says that there is none (tests/model_store/test_sources.py)."""
    status, log = run_alone(
        "--volume", f"{PROJECT}_store:/pair:ro", *(part.replace("/store/", "/pair/") for part in PAIR)
    )
    assert status is None, log
    Ledger().record("no /tmp", "it serves")


def test_limits_of_a_container_are_those_of_its_server(project):
    """A quota of one processor is one thread; 40 % of what the container has left is the KV cache."""
    store = ("--volume", f"{PROJECT}_store:/store", "--tmpfs", "/tmp", *PAIR, "-e", "BOOMERANG_MAX_NUM_SEQS=1024")
    status, log = run_alone(*store, "--cpus", "1", "--memory", "600m")
    assert status is None and " 1 threads" in log, log
    (size,) = re.findall(r"KV cache ([\d.]+) GiB", log)
    assert 0 < float(size) <= 0.4 * 600 / 1024, log


def test_down_leaves_nothing_behind(project):
    project.compose("down", "--remove-orphans", "--timeout", "20")
    assert not project.replicas()
    assert not docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={PROJECT}").strip()
