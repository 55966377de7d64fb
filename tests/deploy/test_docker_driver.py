"""The Docker driver against a minimal Engine API on a Unix socket, and the controller on top of it."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

pytest.importorskip("docker", reason="needs the docker package")

from deploy.autoscaler.controller import Controller
from deploy.autoscaler.decision import ScalingPolicy, Signal
from deploy.autoscaler.docker_driver import MANAGED_LABEL, DockerDriver
from deploy.autoscaler.drivers import DriverUnavailable
from tests.deploy.fake_engine import SERVICE_LABELS, FakeEngine, container


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
    # A one-off container to Compose: `up` leaves it alone, `down` takes it along.
    assert body["Labels"]["com.docker.compose.oneoff"] == "True"
    assert body["Image"] == "sha256:1111" and body["Env"] == ["BOOMERANG_PORT=8000"] and body["Cmd"] == ["serve"]
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
    with pytest.raises(DriverUnavailable, match="made no container of service 'server'"):
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


STEADY = Signal(request_rate=1, degraded_share=0.03, size_fraction=1.0, running=4)
STARTED = 1767323046.5  # of containers in the fake engine


def make_controller(driver, **kwargs):
    policy = ScalingPolicy(max_replicas=3, down_stabilisation=10, down_interval=1)
    return Controller(policy=policy, source=OneSignal(), driver=driver, **kwargs)


def settled(engine, number: int, **kwargs):
    """(controller, clock) with `number` healthy replicas and nothing that asks for a change."""
    driver = DockerDriver("server", "boomerang", f"unix://{engine.path}")
    now = [STARTED + 60]
    controller = make_controller(driver, clock=lambda: now[0], **kwargs)
    while len(driver.replicas()) < number:
        driver.start()
    set_state(engine, "healthy")
    controller.source.signal = STEADY
    controller.tick()
    return controller, now


def set_state(engine, health: str, *ids: str, status: str = "running") -> None:
    for id in ids or engine.containers:
        engine.containers[id]["State"] |= {"Status": status, "Health": {"Status": health}}


def clones(engine) -> list[str]:
    return [id for id, item in engine.containers.items() if MANAGED_LABEL in item["Config"]["Labels"]]


def statuses(controller) -> dict[str, str]:
    return {r.id: controller._judge(r).status for r in controller.driver.replicas()}


def test_one_that_turns_unhealthy_is_drained_not_killed(engine):
    controller, now = settled(engine, 3)
    first, second = clones(engine)
    set_state(engine, "unhealthy", first)
    controller.tick()
    assert engine.containers[first]["signal"] == "SIGTERM" and statuses(controller)[first] == "draining"
    # It has its time to finish, and a new one takes its place. The next one waits until it has left.
    set_state(engine, "unhealthy", second)
    now[0] += 200
    controller.tick()
    assert first in engine.containers and "signal" not in engine.containers[second]
    set_state(engine, "unhealthy", first, status="exited")
    controller.tick()
    assert first not in engine.containers


def test_a_host_that_hurts_most_replicas_is_left_alone(engine):
    controller, now = settled(engine, 3)
    set_state(engine, "unhealthy")
    for _ in range(20):
        now[0] += 100
        controller.tick()
    assert not [item for item in engine.containers.values() if "signal" in item]
    assert controller.metrics.registry.get_sample_value("boomerang_autoscaler_held_replacements") == 3


def test_the_time_to_start_counts_from_the_latest_start(engine):
    controller, now = settled(engine, 2, start_timeout=600)
    (clone,) = clones(engine)
    now[0] = STARTED + 100_000  # it has run for a day and was restarted a minute ago
    engine.containers[clone]["State"]["StartedAt"] = "2026-01-03T06:49:46.5Z"
    set_state(engine, "starting", clone)
    controller.tick()
    assert "signal" not in engine.containers[clone]
    now[0] += 600
    controller.tick()
    assert engine.containers[clone]["signal"] == "SIGTERM"


def test_docker_calls_a_first_download_unhealthy_and_it_goes_on(engine):
    controller, _ = settled(engine, 2, start_timeout=600)
    (clone,) = clones(engine)
    controller._was_ready.clear()
    engine.containers[clone]["State"]["StartedAt"] = "2026-01-02T03:05:06.5Z"
    set_state(engine, "unhealthy", clone)
    controller.tick()
    assert statuses(controller)[clone] == "starting" and "signal" not in engine.containers[clone]


def test_what_it_learned_and_who_drains_survive_its_restart(engine, tmp_path):
    controller, now = settled(engine, 3, state_path=tmp_path / "state.json")
    controller.state = replace(controller.state, capacity=7.5)
    first, _ = clones(engine)
    set_state(engine, "unhealthy", first)
    controller.tick()
    again = make_controller(
        DockerDriver("server", "boomerang", f"unix://{engine.path}"),
        clock=lambda: now[0],
        state_path=tmp_path / "state.json",
    )
    again.source.signal = STEADY
    again.tick()
    assert again.state.capacity == pytest.approx(7.5, rel=0.1)
    assert statuses(again)[first] == "draining" and engine.calls.count("POST kill") == 1
    (tmp_path / "state.json").write_text("[")  # not worth dying for
    assert make_controller(DockerDriver("server", "boomerang"), state_path=tmp_path / "state.json")._learned is None


def test_an_update_replaces_the_clones_one_by_one_the_new_one_first(engine):
    controller, _ = settled(engine, 3)
    old = set(clones(engine))
    # `docker compose up` with new keys or a new image: Compose makes its own container anew.
    del engine.containers[engine.first]
    new = container("boomerang-server-1", SERVICE_LABELS | {"com.docker.compose.config-hash": "bbbb"})
    engine.containers[new["Id"]] = new
    most = 0
    for _ in range(20):
        controller.tick()
        ready = [id for id, status in statuses(controller).items() if status == "ready"]
        assert len(ready) >= 3
        most = max(most, sum(status != "draining" for status in statuses(controller).values()))
        set_state(engine, "healthy")
        for item in engine.containers.values():
            if "signal" in item:
                item["State"] = {"Status": "exited", "StartedAt": item["Created"]}
    assert most == 4  # one more than wanted
    assert not old & set(engine.containers) and len(statuses(controller)) == 3
    assert not [r for r in controller.driver.replicas() if r.is_stale]


@pytest.mark.parametrize(
    "failed",
    [
        {"State": {"Status": "created", "ExitCode": 127, "Error": "bind source path does not exist: api_keys"}},
        {"State": {"Status": "restarting", "ExitCode": 1}, "RestartCount": 2},
        {"State": {"Status": "running", "ExitCode": 0, "Health": {"Status": "starting"}}, "RestartCount": 2},
    ],
)
def test_a_failed_update_to_keys_leaves_no_replica_without(engine, failed):
    controller, _ = settled(engine, 3)
    old = clones(engine)
    del engine.containers[engine.first]
    new = container("boomerang-server-1", SERVICE_LABELS | {"com.docker.compose.config-hash": "bbbb"}, "created")
    new["Config"]["Env"] = ["BOOMERANG_API_KEY_FILE=/run/secrets/api_keys"]
    engine.containers[new["Id"]] = new
    controller.tick()  # it may still come up
    assert not [id for id in old if "signal" in engine.containers[id]]
    engine.containers[new["Id"]] |= failed
    controller.tick()
    assert all(engine.containers[id]["signal"] == "SIGTERM" for id in old)


def test_one_that_is_stale_before_it_is_ready_leaves_at_once(engine):
    controller, _ = settled(engine, 3)
    first, second = clones(engine)
    set_state(engine, "starting", first)
    engine.containers[first]["Config"]["Labels"] |= {"com.docker.compose.config-hash": "bbbb"}
    controller._was_ready.clear()
    controller.tick()
    assert engine.containers[first]["signal"] == "SIGTERM" and "signal" not in engine.containers[second]


def test_it_says_nothing_while_there_is_nothing_to_do(engine, caplog):
    controller, now = settled(engine, 1)
    caplog.clear()
    caplog.set_level("INFO")
    for running in (4, 0, 4, 0, 5, 0):
        controller.source.signal = replace(STEADY, running=running)
        now[0] += 5
        controller.tick()
    assert not caplog.records


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
