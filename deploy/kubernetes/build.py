"""Copies the Prometheus rules and dashboards into their Kubernetes wrappers: `python -m deploy.kubernetes.build`.

The result is committed (kubectl reads no files outside of a kustomization); a test checks that it is current.
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus/rules"
DASHBOARDS = HERE.parent / "grafana/dashboards"


def render() -> dict[Path, str]:
    """Path -> text of every generated file."""
    groups = [
        group for path in sorted(RULES.glob("*.rules.yml")) for group in yaml.safe_load(path.read_text())["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "boomerang"},
        "spec": {"groups": groups},
    }
    header = "# Generated from deploy/prometheus/rules by deploy/kubernetes/build.py.\n"
    files = {HERE / "monitoring/rules.yaml": header + yaml.safe_dump(rule, sort_keys=False, width=120)}
    for path in DASHBOARDS.glob("*.json"):
        files[HERE / "monitoring/dashboards" / path.name] = path.read_text(encoding="utf-8")
    return files


def main() -> None:
    for path, text in render().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
