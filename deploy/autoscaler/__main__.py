"""`python -m deploy.autoscaler`: every flag is also an environment variable BOOMERANG_AUTOSCALER_*."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import threading
from pathlib import Path

from prometheus_client import start_http_server

from deploy.autoscaler.controller import Controller
from deploy.autoscaler.decision import ScalingPolicy
from deploy.autoscaler.drivers import Driver, GateDriver, ProcessDriver
from deploy.autoscaler.environment import check_environment
from deploy.autoscaler.signals import PrometheusSource

POLICY_HELP = {
    "min_replicas": "never fewer than this",
    "max_replicas": "never more than this",
    "degraded_high": "share of requests served below their ceiling that asks for more replicas",
    "degraded_low": "share at or below which replicas may go",
    "kl_high": "expected KL lost to load, nats per token, that asks for more replicas",
    "kl_low": "expected KL lost at or below which replicas may go",
    "slo_target": "share of requests that must meet all their limits",
    "queue_high": "waiting requests per ready replica that ask for more",
    "headroom": "fill of the learned capacity per replica that scaling down may lead to",
    "up_factor": "at most this multiple in one decision",
    "down_fraction": "at most this share in one decision (at least one)",
    "down_stabilisation": "seconds of calm before a replica goes",
    "down_interval": "seconds between two steps down",
    "capacity_doubling": "seconds of calm after which the learned capacity counts twice",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("deploy.autoscaler", description=__doc__)

    def flag(name: str, default, text: str, **kwargs) -> None:
        env = "BOOMERANG_AUTOSCALER_" + name.upper()
        value = os.environ.get(env) or default  # compose passes unset variables as empty strings
        shown = f"{text} [env: {env}]" + (f" [default: {default}]" if default not in (None, "") else "")
        parser.add_argument("--" + name.replace("_", "-"), default=value, help=shown, **kwargs)

    flag("driver", "gate", "gate (containers) | process", choices=("gate", "process"))
    flag("prometheus_url", "http://127.0.0.1:9090", "where to read the signal")
    flag("window", "30s", "range of the rates (at least four scrape intervals)")
    flag("selector", 'job="boomerang"', "label matcher of the replicas' series")
    flag("gate_url", "http://gate:2380", "gate: where deploy.autoscaler.gate answers")
    flag("command", "", "process: command line of one server, with {host} {port} {index}")
    flag("targets_path", "", "process: file_sd list to keep for Prometheus")
    flag("interval", 5.0, "seconds between two looks", type=float)
    flag("drain_timeout", 300.0, "seconds a replica may take to finish its work", type=float)
    flag("start_timeout", 600.0, "seconds a replica may take to become ready", type=float)
    flag("decisions_path", "", "append decisions here as JSON lines")
    flag("state_path", "", "keep what was learned here across restarts")
    flag("metrics_port", 9105, "own /metrics", type=int)
    for field in dataclasses.fields(ScalingPolicy):
        flag(field.name, field.default, POLICY_HELP[field.name], type=type(field.default))
    dry = os.environ.get("BOOMERANG_AUTOSCALER_DRY_RUN", "").lower() in ("1", "true", "yes")
    parser.add_argument("--dry-run", action="store_true", default=dry, help="decide and log, touch nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    check_environment(parser, "BOOMERANG_AUTOSCALER_")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        policy = ScalingPolicy(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ScalingPolicy)})
    except ValueError as error:
        parser.error(str(error))
    driver: Driver
    if args.driver == "gate":
        driver = GateDriver(args.gate_url)
    else:
        if not args.command:
            parser.error("--driver process needs --command")
        targets = Path(args.targets_path) if args.targets_path else None
        driver = ProcessDriver(shlex.split(args.command), targets_path=targets)
    controller = Controller(
        policy=policy,
        source=PrometheusSource(args.prometheus_url, args.window, args.selector),
        driver=driver,
        interval=args.interval,
        drain_timeout=args.drain_timeout,
        start_timeout=args.start_timeout,
        is_dry_run=args.dry_run,
        decisions_path=Path(args.decisions_path) if args.decisions_path else None,
        state_path=Path(args.state_path) if args.state_path else None,
    )
    start_http_server(args.metrics_port, registry=controller.metrics.registry)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    controller.run(stop)
    if isinstance(driver, ProcessDriver):
        driver.close(args.drain_timeout)


if __name__ == "__main__":
    main()
