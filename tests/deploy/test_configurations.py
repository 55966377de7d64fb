"""Every configuration file, checked by the tool that reads it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.rules.yml"))


def check(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    # hadolint is a Python package: it lies beside the interpreter.
    program = shutil.which(command[0]) or shutil.which(command[0], path=Path(sys.executable).parent)
    if not program:
        pytest.skip(f"needs {command[0]}")
    result = subprocess.run(
        [program, *command[1:]], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_haproxy():
    check("haproxy", "-c", "-f", "deploy/haproxy/haproxy.cfg")


def test_prometheus_configuration():
    check("promtool", "check", "config", "deploy/prometheus/prometheus.yml")


def test_prometheus_rules():
    check("promtool", "check", "rules", *map(str, RULES))
    check("promtool", "test", "rules", "tests/deploy/rules_test.yml")


def test_every_alert_has_a_unit_test():
    alerts = {
        rule["alert"] for path in RULES for g in yaml.safe_load(path.read_text())["groups"] for rule in g["rules"]
        if "alert" in rule
    }  # fmt: skip
    tested = (ROOT / "tests/deploy/rules_test.yml").read_text()
    assert not {name for name in alerts if name not in tested}


KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("gpu", "keys", "hub")
COMBINATIONS = [
    (overlays, profiles)
    for number in range(len(OVERLAYS) + 1)
    for overlays in itertools.combinations(OVERLAYS, number)
    for profiles in (((), ("two-gpus",)) if number in (0, len(OVERLAYS)) else (("two-gpus",),))
]


def compose(*overlays: str, profiles: tuple[str, ...] = (), cwd: Path = ROOT, **environment: str) -> dict[str, Any]:
    """The merged configuration, as the tool prints it."""
    files = [f"docker-compose{suffix}.yml" for suffix in ("", *(f".{name}" for name in overlays))]
    options = [part for name in files for part in ("-f", str(ROOT / name))]
    options += [part for name in profiles for part in ("--profile", name)]
    return yaml.safe_load(check("docker-compose", *options, "config", cwd=cwd, **environment))


@pytest.mark.parametrize(("overlays", "profiles"), COMBINATIONS)
def test_compose(overlays, profiles):
    merged = compose(*overlays, profiles=profiles)
    services = merged["services"]
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["restart"] == "unless-stopped", name
        assert service["logging"]["options"]["max-size"] == "10m", name
        for port in service.get("ports", ()):
            assert str(port).startswith("127.0.0.1:"), f"{name} is published on every address"
    # Only the gate sees the socket, only the autoscaler sees the gate, and neither sees a secret.
    mounts = {name: str(service.get("volumes")) for name, service in services.items()}
    assert [name for name, text in mounts.items() if "docker.sock" in text] == ["gate"]
    assert sorted(n for n, s in services.items() if "gate" in (s.get("networks") or {})) == ["autoscaler", "gate"]
    assert merged["networks"]["gate"]["internal"] is True and list(services["gate"]["networks"]) == ["gate"]
    # Secrets are files; none is in an environment that `docker inspect` shows.
    names = [name for service in services.values() for name in service.get("environment", {})]
    assert not [n for n in names if re.search(r"TOKEN|KEY|PASSWORD|SECRET", n) and not n.endswith(("_FILE", "_PATH"))]
    # Whoever answers to `server` answers alike.
    servers = [s for n, s in services.items() if n == "server" or "server" in str(s.get("networks"))]
    assert len(servers) == 2 and services["server-gpu1"]["profiles"] == ["two-gpus"]
    own = ("deploy", "networks", "profiles", "scale")
    assert all(
        {k: v for k, v in s.items() if k not in own} == {k: v for k, v in servers[0].items() if k not in own}
        for s in servers
    )
    for service in servers:
        assert ("BOOMERANG_API_KEY_FILE" in service["environment"]) == ("keys" in overlays)
        assert service["init"] is True
        assert ("HF_TOKEN_PATH" in service["environment"]) == ("hub" in overlays)
        assert len(service.get("secrets", ())) == ("hub" in overlays)
        folders = key_folders(service)
        assert len(folders) == ("keys" in overlays) and all(volume["read_only"] for volume in folders)
    if "gpu" in overlays:
        devices = [s["deploy"]["resources"]["reservations"]["devices"][0] for s in servers]
        assert [device["device_ids"] for device in devices] == [["0"], ["1"]]
        assert services["autoscaler"]["environment"]["BOOMERANG_AUTOSCALER_DRY_RUN"] == "true"


def key_folders(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Compose v1 leaves volumes of the short kind as the text that they are; these are of the long kind."""
    return [v for v in service["volumes"] if isinstance(v, dict) and v["target"] == "/run/secrets/boomerang"]


@pytest.mark.parametrize("folder", [None, "secrets", "./secrets", "../secrets", "/srv/secrets"])
def test_secrets_are_found_from_any_working_directory(folder, tmp_path):
    environment = {} if folder is None else {"BOOMERANG_SECRETS": folder}
    for cwd in (ROOT, tmp_path):
        found = compose("keys", "hub", cwd=cwd, **environment)
        (keys,) = key_folders(found["services"]["server"])
        expected = (ROOT / (folder or "deploy/secrets")).resolve()
        assert Path(keys["source"]).resolve() == expected, cwd
        assert Path(found["secrets"]["hf_token"]["file"]).resolve() == expected / "hf_token", cwd


def test_two_projects_can_run_on_one_host():
    """Every published port is a setting of its own."""
    names = ("BOOMERANG_PUBLISH", *(f"BOOMERANG_PUBLISH_{name}" for name in ("STATS", "PROMETHEUS", "GRAFANA")))
    chosen = {name: f"127.0.0.2:{7000 + index}" for index, name in enumerate(names)}
    ports = [str(port) for s in compose(**chosen)["services"].values() for port in s.get("ports", ())]
    assert sorted(port.rpartition(":")[0] for port in ports) == sorted(chosen.values())


def test_probes_and_scrapes_go_to_the_port_that_serves_them():
    """A port of their own (--metrics-port): /metrics is nowhere else."""
    services = compose("gpu", profiles=("two-gpus",))["services"]
    ports = {str(services[name]["environment"]["BOOMERANG_METRICS_PORT"]) for name in ("server", "server-gpu1")}
    ports.add(str(services["haproxy"]["environment"]["BOOMERANG_PROBE_PORT"]))
    ports.add(re.search(r"BOOMERANG_PROBE_PORT-(\d+)", (ROOT / "deploy/haproxy/haproxy.cfg").read_text())[1])
    scrapes = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    ports.add(str(next(job for job in scrapes if job["job_name"] == "boomerang")["dns_sd_configs"][0]["port"]))
    ports.add(re.search(r"model-server-metrics-port=(\d+)", (KUBERNETES / "gateway/kustomization.yaml").read_text())[1])
    documents = list(yaml.safe_load_all(check("kubectl", "kustomize", "deploy/kubernetes/base")))
    documents += yaml.safe_load_all(check("kubectl", "kustomize", "deploy/kubernetes/monitoring"))
    kinds = {document["kind"]: document["spec"] for document in documents if "spec" in document}
    (container,) = kinds["Deployment"]["template"]["spec"]["containers"]
    ports |= {item["value"] for item in container["env"] if item["name"] == "BOOMERANG_METRICS_PORT"}
    ports |= {str(port["containerPort"]) for port in container["ports"] if port["name"] == "probes"}
    assert ports == {"8001"}
    asked = {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    asked |= {endpoint["port"] for endpoint in kinds["PodMonitor"]["podMetricsEndpoints"]}
    assert asked == {"probes"}
    assert {"protocol": "TCP", "port": "probes"} in kinds["NetworkPolicy"]["ingress"][0]["ports"]


def test_every_replica_knows_how_many_share_the_machine():
    services = compose("keys", profiles=("two-gpus",), BOOMERANG_MAX_REPLICAS="3")["services"]
    for name in ("server", "server-gpu1"):
        assert str(services[name]["environment"]["BOOMERANG_MAX_REPLICAS"]) == "3"
    assert str(services["autoscaler"]["environment"]["BOOMERANG_AUTOSCALER_MAX_REPLICAS"]) == "3"


def test_docker_lets_a_replica_drain_before_it_kills_it():
    server = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-server"]
    grace = float(server["stop_grace_period"].removesuffix("s"))
    assert grace > float(server["environment"]["BOOMERANG_SHUTDOWN_TIMEOUT"])


def test_env_example_names_only_what_compose_reads():
    compose = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    for line in (ROOT / ".env.example").read_text().splitlines():
        name = line.lstrip("#").partition("=")[0]
        if "=" in line and " " not in name and name != "COMPOSE_PROJECT_NAME":  # that one Compose reads by itself
            assert "${" + name in compose, name


def test_dockerfile():
    check("hadolint", "Dockerfile")


@pytest.mark.parametrize("name", ["base", "gpu", "keys", "monitoring", "keda", "gateway"])
def test_kubernetes(name):
    documents = list(yaml.safe_load_all(check("kubectl", "kustomize", f"deploy/kubernetes/{name}")))
    for document in documents:
        if document["kind"] in ("Service", "PodDisruptionBudget", "Deployment"):  # an empty selector means everybody's
            assert document["spec"]["selector"], document
    assert documents and all({"apiVersion", "kind", "metadata"} <= set(document) for document in documents)
    for document in documents:
        with contextlib.suppress(kubernetes_validate.SchemaNotFoundError):  # kinds of KEDA, the gateway, the operator
            kubernetes_validate.validate(document, "1.34", strict=True)
    for document in documents:
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            environment = {item["name"]: item.get("value") for item in container["env"]}
            # Links to the Service `boomerang` would set BOOMERANG_PORT=tcp://..., which is a setting of the server.
            assert pod["enableServiceLinks"] is False and environment["BOOMERANG_PORT"] == "8000"
            assert set(container["resources"]["limits"]) >= {"cpu", "memory", "ephemeral-storage"}
            drain = float(environment["BOOMERANG_SHUTDOWN_TIMEOUT"])
            wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
            assert pod["terminationGracePeriodSeconds"] > drain + wait
            assert container["livenessProbe"]["httpGet"]["path"] != container["readinessProbe"]["httpGet"]["path"]


def test_kubernetes_lets_only_those_in_that_are_named():
    documents = list(yaml.safe_load_all(check("kubectl", "kustomize", "deploy/kubernetes/base")))
    (policy,) = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    (pods,) = [d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] == "Deployment"]
    assert policy["podSelector"]["matchLabels"].items() <= pods.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"] and all(rule.get("from") for rule in policy["ingress"])
    (outside,) = [peer["ipBlock"] for rule in policy["egress"] for peer in rule.get("to", ())]
    assert "169.254.0.0/16" in outside["except"]


def test_generated_files_are_current():
    from deploy.grafana import build as grafana
    from deploy.kubernetes import build as kubernetes

    for name, text in grafana.render().items():
        assert (grafana.DASHBOARDS / name).read_text() == text, "run python -m deploy.grafana.build"
    for path, text in kubernetes.render().items():
        assert path.read_text() == text, "run python -m deploy.kubernetes.build"
