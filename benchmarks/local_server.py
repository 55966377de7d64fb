"""A server process of one's own, for benchmarks and soak runs: started, watched, stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]


class LocalServer:
    """`python -m server serve` on 127.0.0.1 and a port of the system's choice. `url` is known once it is ready."""

    def __init__(self, flags: list[str], cores: str | None = None, root: Path = ROOT, patience: float = 300) -> None:
        """`cores`: a list for `taskset -c`; None leaves the process where its parent runs. `root`: of the code.
        `patience`: seconds that it may take until it is ready."""
        self.patience = patience
        pin = ["taskset", "-c", cores] if cores else []
        self.process = subprocess.Popen(
            [*pin, sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", "0", *flags],
            cwd=root,
            env=self.environment(root),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        self.log: deque[str] = deque(maxlen=2000)
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def environment(root: Path) -> dict[str, str]:
        """Of a process that imports the code in `root`; of our variables it gets the choice of kernels alone."""
        kept = "BOOMERANG_CPU_VARIANT"
        own = {key: value for key, value in os.environ.items() if key == kept or not key.startswith("BOOMERANG_")}
        return own | {"PYTHONPATH": str(root)}

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if re.search(r" (ERROR|CRITICAL) |Traceback", line) and len(self.errors) < 100:
                self.errors.append(line.rstrip())
            if match := re.search(r"listening on (\S+)", line):
                self.url = match[1]

    def wait_ready(self, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.url and httpx.get(self.url + "/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError("the server did not become ready:\n" + "".join(self.log))

    def memory(self) -> int:
        """Bytes of resident memory of the process."""
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, wait, return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(5)
        return status

    def __enter__(self) -> LocalServer:
        try:
            self.wait_ready(self.patience)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
