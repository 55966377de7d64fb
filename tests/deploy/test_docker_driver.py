"""The Docker driver against a minimal Engine API on a Unix socket, directly and through the socket proxy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

import httpx
import pytest

pytest.importorskip("docker", reason="needs the docker package")

from deploy.autoscaler.controller import Controller
from deploy.autoscaler.decision import ScalingPolicy, Signal
from deploy.autoscaler.docker_driver import MANAGED_LABEL, DockerDriver
from deploy.autoscaler.drivers import DriverUnavailable
from tests.deploy.fake_engine import FakeEngine

PROXY_CONFIG = "deploy/haproxy/docker-socket.cfg"


@pytest.fixture
def engine(tmp_path):
    engine = FakeEngine(tmp_path / "docker.sock")
    yield engine
    engine.close()


@pytest.fixture
def driver(engine):
    return DockerDriver("server", "boomerang", f"unix://{engine.path}")


def test_only_the_service_is_seen(engine, driver):
    (replica,) = driver.replicas()
    assert replica.id == engine.first
    assert (replica.status, replica.is_managed, replica.address) == ("ready", False, "10.0.0.2")


def test_a_new_replica_is_a_clone_that_compose_would_own(engine, driver):
    name = driver.start()
    body = engine.containers[name]["body"]
    assert body["Labels"]["com.docker.compose.service"] == "server"
    assert body["Labels"]["com.docker.compose.container-number"] == "2"
    assert body["Labels"][MANAGED_LABEL] == "true"
    assert (
        body["Image"] == "boomerang-serve:cpu" and body["Env"] == ["BOOMERANG_PORT=8000"] and body["Cmd"] == ["serve"]
    )
    assert "Hostname" not in body
    assert body["HostConfig"]["Binds"] == ["boomerang_store:/store:rw"] and body["HostConfig"]["ReadonlyRootfs"] is True
    assert body["NetworkingConfig"] == {"EndpointsConfig": {"boomerang_default": {"Aliases": ["server"]}}}
    assert {r.id: r.status for r in driver.replicas()} == {engine.first: "ready", name: "starting"}


def test_drain_sends_sigterm_once_and_the_container_is_removed_when_it_has_exited(engine, driver):
    name = driver.start()
    driver.drain(name)
    driver.drain(name)
    assert engine.containers[name]["signal"] == "SIGTERM"
    assert engine.calls.count("POST kill") == 1
    assert {r.id: r.status for r in driver.replicas()}[name] == "draining"
    engine.containers[name]["State"] = {"Status": "exited", "ExitCode": 0}
    assert {r.id: r.status for r in driver.replicas()}[name] == "exited"
    driver.remove(name)
    driver.remove(name)  # gone already: not an error
    assert name not in engine.containers


def test_a_container_that_cannot_start_leaves_nothing_behind(engine, driver):
    engine.failures["POST start"] = 500
    with pytest.raises(DriverUnavailable):
        driver.start()
    assert set(engine.containers) == {engine.first, engine.other}


@pytest.mark.parametrize("status", [403, 409, 500])
def test_refusals_are_outages_not_crashes(engine, driver, status):
    engine.failures["POST create"] = status
    with pytest.raises(DriverUnavailable):
        driver.start()
    assert len(driver.replicas()) == 1


def test_draining_what_just_stopped_is_fine(engine, driver):
    engine.failures["POST kill"] = 409
    driver.drain(engine.first)


def test_without_a_template_it_says_so(engine, driver):
    del engine.containers[engine.first]
    with pytest.raises(DriverUnavailable, match="no container of service 'server'"):
        driver.start()


def test_the_project_is_that_of_the_autoscaler_itself(engine, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: engine.other)
    driver = DockerDriver("server", base_url=f"unix://{engine.path}")
    assert [replica.id for replica in driver.replicas()] == [engine.first]
    assert driver.project == "boomerang"


class OneSignal:
    signal = Signal(request_rate=5, degraded_share=0.9, size_fraction=0.5, running=10)

    def read(self):
        return self.signal


def make_controller(driver, **kwargs):
    policy = ScalingPolicy(max_replicas=3, down_stabilisation=10, down_interval=1)
    return Controller(policy=policy, source=OneSignal(), driver=driver, **kwargs)


def test_scale_up_drain_and_down_through_docker(engine, driver):
    now = [0.0]
    controller = make_controller(driver, clock=lambda: now[0], drain_timeout=30)
    controller.tick()
    assert len(driver.replicas()) == 2
    controller.source.signal = Signal(request_rate=1, degraded_share=0.0, size_fraction=1.0, running=0.5)
    for item in engine.containers.values():
        item["State"] = {"Status": "running", "Health": {"Status": "healthy"}}
    for now[0] in range(1, 13):
        controller.tick()
    (draining,) = [r for r in driver.replicas() if r.status == "draining"]
    assert draining.is_managed and draining.id != engine.first
    now[0] += 31  # it does not finish in time
    controller.tick()
    assert [r.id for r in driver.replicas()] == [engine.first]
    assert controller.metrics.registry.get_sample_value("boomerang_autoscaler_actions_total", {"action": "kill"}) == 1


def test_docker_away_and_back(engine, driver):
    controller = make_controller(driver)
    engine.close()
    assert controller.tick() is None
    assert controller.metrics.registry.get_sample_value("boomerang_autoscaler_errors_total", {"source": "driver"}) == 1
    engine.open()
    assert controller.tick().target == 2
    assert len(driver.replicas()) == 2


def test_dry_run_touches_nothing(engine, driver, tmp_path):
    controller = make_controller(driver, is_dry_run=True, decisions_path=tmp_path / "decisions.jsonl")
    assert controller.tick().target == 2
    assert not [call for call in engine.calls if not call.startswith("GET")]
    assert '"dry_run": true' in (tmp_path / "decisions.jsonl").read_text()


@pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy")
def test_the_socket_proxy_lets_the_driver_through_and_little_else(engine, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DOCKER_SOCKET": str(engine.path),
        "BOOMERANG_BIND": f"127.0.0.1:{port}",
        "BOOMERANG_ALLOWED_MOUNT": "/srv/secrets/",
    }
    proxy = subprocess.Popen(["haproxy", "-f", PROXY_CONFIG], env=environment, stdout=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                httpx.get(base + "/version")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        driver = DockerDriver("server", "boomerang", f"tcp://127.0.0.1:{port}")
        name = driver.start()
        driver.drain(name)
        driver.remove(name)
        assert len(driver.replicas()) == 1

        image = "boomerang-serve:cpu"
        allowed = {
            "Image": image,
            "Labels": {},
            "HostConfig": {"Binds": ["store:/store", "/srv/secrets/key:/run/key:ro"]},
        }
        assert httpx.post(base + "/v1.47/containers/create?name=x", json=allowed).status_code == 201
        for body in (
            {"Image": "evil", "HostConfig": {}},
            {"Image": image, "HostConfig": {"Privileged": True}},
            {"Image": image, "HostConfig": {"Binds": ["/:/host"]}},
            {"Image": image, "HostConfig": {"Binds": ["store:/store", "/srv/secrets/../../etc:/etc"]}},
            {"Image": image, "HostConfig": {"Mounts": [{"Type": "bind", "Source": "/etc", "Target": "/etc"}]}},
            {"Image": image, "HostConfig": {"CapAdd": ["SYS_ADMIN"]}},
            {"Image": image, "HostConfig": {"NetworkMode": "host"}},
        ):
            assert httpx.post(base + "/v1.47/containers/create?name=x", json=body).status_code == 403, body
        for method, path in (
            ("POST", f"/v1.47/containers/{engine.first}/exec"),
            ("GET", "/v1.47/images/json"),
            ("GET", f"/v1.47/containers/{engine.first}/archive"),
            ("POST", "/v1.47/build"),
            ("DELETE", "/v1.47/volumes/store"),
        ):
            assert httpx.request(method, base + path).status_code == 403, path
    finally:
        proxy.terminate()
        proxy.wait(10)
