"""`python -m deploy.local [options] -- FLAGS OF THE SERVER`: the whole service without Docker."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import threading
from pathlib import Path

from deploy.autoscaler.decision import ScalingPolicy
from deploy.local.stack import LocalStack


def main() -> None:
    parser = argparse.ArgumentParser("deploy.local", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="the API, through the load balancer")
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="logs, metrics and decisions [a temporary folder]")
    parser.add_argument("server", nargs="*", help="flags for `boomerang serve`, after --")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    command = [sys.executable, "-m", "server", "serve", "--host", "{host}", "--port", "{port}"]
    command += ["--max-replicas", str(args.max_replicas), *args.server]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="boomerang-") as temporary:
        stack = LocalStack(
            command,
            args.folder or Path(temporary),
            ScalingPolicy(min_replicas=args.min_replicas, max_replicas=args.max_replicas),
            api_port=args.port,
            prometheus_port=args.prometheus_port,
            window="15s",
        )
        with stack:
            print(f"API and playground {stack.api_url}  Prometheus {stack.prometheus_url}  logs {stack.folder}")
            stop.wait()


if __name__ == "__main__":
    main()
