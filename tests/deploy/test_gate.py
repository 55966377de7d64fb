"""The service that alone reaches the Docker Engine: whatever it is sent, only the template's own fields get there."""

from __future__ import annotations

import copy
import http.client
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("docker", reason="needs the docker package")

from deploy.autoscaler.docker_driver import DockerDriver
from deploy.autoscaler.drivers import DriverUnavailable, GateDriver
from deploy.autoscaler.gate import Gate
from tests.deploy.fake_engine import FakeEngine


@pytest.fixture
def engine(tmp_path):
    engine = FakeEngine(tmp_path / "docker.sock")
    yield engine
    engine.close()


@pytest.fixture
def gate(engine):
    gate = Gate(("127.0.0.1", 0), DockerDriver("server", "boomerang", f"unix://{engine.path}"), max_replicas=3)
    threading.Thread(target=gate.serve_forever, args=(0.05,), daemon=True).start()
    yield gate
    gate.shutdown()
    gate.server_close()


def url(gate: Gate) -> str:
    return f"http://127.0.0.1:{gate.server_address[1]}"


def test_the_autoscalers_driver_speaks_to_it(engine, gate):
    driver = GateDriver(url(gate))
    name = driver.start()
    assert {r.id: (r.status, r.is_managed) for r in driver.replicas()} == {
        engine.first: ("ready", False),
        name: ("starting", True),
    }
    driver.drain(name)
    driver.drain(name)
    assert engine.containers[name]["signal"] == "SIGTERM" and engine.calls.count("POST kill") == 1
    driver.remove(name)
    driver.remove(name)  # gone already: not an error
    assert name not in engine.containers


def test_it_starts_no_more_than_are_allowed(engine, gate):
    driver = GateDriver(url(gate))
    driver.start()
    driver.start()
    with pytest.raises(DriverUnavailable, match="3 are allowed"):
        driver.start()
    assert len(driver.replicas()) == 3


def test_containers_of_others_cannot_be_named(engine, gate):
    for path in (f"/replicas/{engine.other}", f"/replicas/{engine.other}?now"):
        connection = http.client.HTTPConnection(*gate.server_address)
        connection.request("DELETE", path)
        assert connection.getresponse().status == 404
    assert engine.other in engine.containers and "signal" not in engine.containers[engine.other]


def test_the_engines_absence_is_told(engine, gate):
    engine.close()
    with pytest.raises(DriverUnavailable, match="503"):
        GateDriver(url(gate)).replicas()


# What somebody who took over the autoscaler would try: the Engine's own paths and bodies, and anything else.
POWERS = ("Privileged", "Binds", "Mounts", "CapAdd", "PidMode", "NetworkMode", "Devices", "SecurityOpt", "Runtime")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["/:/host", "host", "evil"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(POWERS) | st.text(max_size=9), inner),
    max_leaves=10,
)
bodies = st.fixed_dictionaries(
    {}, optional={"Image": values, "HostConfig": st.dictionaries(st.sampled_from(POWERS), values), "Env": values}
).map(json.dumps) | st.text(max_size=200)
paths = st.sampled_from(
    [
        "/replicas",
        "/replicas?name=x",
        "/v1.47/containers/create",
        "/containers/create?name=x",
        "/replicas/../v1.47/build",
    ]
) | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: "/" + text)
headers = st.dictionaries(
    st.sampled_from(["X-Registry-Auth", "Host", "Upgrade", "Expect", "Content-Type", "X-HTTP-Method-Override"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30),
    max_size=3,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"]),
    path=paths,
    body=bodies | st.none(),
    headers=headers,
)
def test_nothing_but_the_templates_own_fields_reaches_the_engine(engine, gate, method, path, body, headers):
    template = copy.deepcopy(engine.containers[engine.first])
    connection = http.client.HTTPConnection(*gate.server_address, timeout=20)
    connection.request(method, path, body=None if body is None else body.encode(), headers=headers)
    status = connection.getresponse().status
    connection.close()
    if body:
        assert status >= 400
    for clone in [item for item in engine.containers.values() if "body" in item]:
        sent = clone["body"]
        labels = sent.pop("Labels")
        assert sent.pop("HostConfig") == template["HostConfig"]
        assert sent.pop("NetworkingConfig") == {"EndpointsConfig": {"boomerang_default": {"Aliases": ["server"]}}}
        assert sent.pop("Image") == template["Image"]
        assert sent == {key: template["Config"][key] for key in ("Env", "Cmd", "StopTimeout")}
        number = "com.docker.compose.container-number"
        changed = {name for name in labels if labels[name] != template["Config"]["Labels"].get(name)}
        assert changed == {number, "com.docker.compose.oneoff", "io.boomerang.autoscaler"}
        del engine.containers[clone["Id"]]
    assert set(engine.containers) == {engine.first, engine.other}
    assert engine.containers[engine.first] == template
