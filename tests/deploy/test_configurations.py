"""Every configuration file, checked by the tool that reads it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.rules.yml"))


def check(*command: str, **environment: str) -> str:
    # hadolint is a Python package: it lies beside the interpreter.
    program = shutil.which(command[0]) or shutil.which(command[0], path=Path(sys.executable).parent)
    if not program:
        pytest.skip(f"needs {command[0]}")
    result = subprocess.run(
        [program, *command[1:]], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["haproxy.cfg", "docker-socket.cfg"])
def test_haproxy(name):
    check("haproxy", "-c", "-f", f"deploy/haproxy/{name}")


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


GPU, KEYS, HUB = (f"docker-compose.{name}.yml" for name in ("gpu", "keys", "hub"))
OVERRIDES = [(), (GPU,), (KEYS,), (HUB,), (GPU, KEYS, HUB)]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda names: "+".join(names) or "plain")
def test_compose(overrides):
    files = [part for name in ("docker-compose.yml", *overrides) for part in ("-f", name)]
    merged = yaml.safe_load(check("docker-compose", *files, "config", PWD=str(ROOT)))
    services = merged["services"]
    for name in ("server", "haproxy", "prometheus", "grafana", "autoscaler", "docker-socket"):
        assert services[name]["read_only"] is True and services[name]["cap_drop"] == ["ALL"], name
    # Only the filter sees the socket, and only the autoscaler sees the filter.
    mounts = {name: str(service.get("volumes")) for name, service in services.items()}
    assert [name for name, text in mounts.items() if "docker.sock" in text] == ["docker-socket"]
    in_network = [n for n, s in services.items() if "docker" in (s.get("networks") or {})]
    assert sorted(in_network) == ["autoscaler", "docker-socket"]
    # Secrets are files; none is in an environment that `docker inspect` shows.
    names = [name for service in services.values() for name in service.get("environment", {})]
    assert not [n for n in names if re.search(r"TOKEN|KEY|PASSWORD|SECRET", n) and not n.endswith(("_FILE", "_PATH"))]
    if GPU in overrides:
        (device,) = services["server"]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and device["device_ids"] == ["0"]


def test_docker_lets_a_replica_drain_before_it_kills_it():
    server = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["server"]
    grace = float(server["stop_grace_period"].removesuffix("s"))
    assert grace > float(server["environment"]["BOOMERANG_SHUTDOWN_TIMEOUT"])


def test_env_example_names_only_what_compose_reads():
    compose = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    for line in (ROOT / ".env.example").read_text().splitlines():
        name = line.lstrip("#").partition("=")[0]
        if "=" in line and " " not in name:
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
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            environment = {item["name"]: item.get("value") for item in container["env"]}
            drain = float(environment["BOOMERANG_SHUTDOWN_TIMEOUT"])
            wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
            assert pod["terminationGracePeriodSeconds"] > drain + wait
            assert container["livenessProbe"]["httpGet"]["path"] != container["readinessProbe"]["httpGet"]["path"]


def test_generated_files_are_current():
    from deploy.grafana import build as grafana
    from deploy.kubernetes import build as kubernetes

    for name, text in grafana.render().items():
        assert (grafana.DASHBOARDS / name).read_text() == text, "run python -m deploy.grafana.build"
    for path, text in kubernetes.render().items():
        assert path.read_text() == text, "run python -m deploy.kubernetes.build"
