"""The server process: bind, run uvicorn, drain on SIGTERM, say how it ended."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import ipaddress
import logging
import os
import signal
import socket
import ssl
import stat
import sys
import threading
from types import FrameType

import uvicorn

from model_store.errors import BoomerangError
from server.api.http.app import create_app
from server.api.http.connection import guarded_protocol
from server.api.http.probes import ProbeServer
from server.api.http.state import ServerState
from server.config import Settings
from server.growing import load_growing_model
from server.observe.startup import StartupClock

logger = logging.getLogger(__name__)

_HAS_SIGHUP = hasattr(signal, "SIGHUP")  # not on Windows
_WATCH_SECONDS = 1.0
_LAST_WORDS_SECONDS = 10.0  # for answers that can still be sent
_BACKLOG = 2048  # connections that the system holds until they are accepted


class Server(uvicorn.Server):
    """Uvicorn that drains: on the first SIGTERM or SIGINT work goes on, new work is refused, then it exits with 0."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self.failure: BaseException | None = None
        self._drain_task: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if _HAS_SIGHUP:
            self._loop.add_signal_handler(signal.SIGHUP, self.state.reload_keys)
        watching = asyncio.ensure_future(self._watch_steps())
        await super().serve(sockets)
        watching.cancel()

    async def _watch_steps(self) -> None:
        """A hung step never returns, and its thread cannot be ended: say where it hangs, tell everybody, and leave."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            seconds = self.state.seconds_in_step
            if seconds > self.state.settings.step_timeout:
                faulthandler.dump_traceback(all_threads=True)
                error = RuntimeError(f"a step has not returned for {seconds:.0f} s")
                logger.error("the engine hangs: %s", error)
                self.fail(error)
                # Not on the event loop, which waits for the engine's thread once it shuts down.
                threading.Timer(_LAST_WORDS_SECONDS, os._exit, (1,)).start()
                return

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not recorded for re-raising, as uvicorn does: a drained server has ended well.
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def fail(self, error: BaseException) -> None:
        """Loading failed or the engine died: answer what is under way (with the error) and exit with 1.

        Whoever restarts processes sees an exit sooner and more surely than a failing probe.
        """
        self.failure = error
        self.should_exit = True

    def _begin_drain(self, name: str) -> None:
        if self._drain_task is not None:
            logger.warning("%s again: not waiting any longer", name)
            self.should_exit = self.force_exit = True
            return
        self.state.is_draining = True
        self._drain_task = asyncio.ensure_future(self._drain(name))

    async def _drain(self, name: str) -> None:
        timeout = self.state.settings.shutdown_timeout
        if self.state.num_active:
            logger.info("%s: finishing %d requests, for up to %g s", name, self.state.num_active, timeout)
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while self.state.num_active and clock() < deadline:
            await asyncio.sleep(0.05)
        if self.state.num_active:
            logger.warning("aborting %d requests that did not finish in time", self.state.num_active)
        await self.state.stop()
        self.should_exit = True


def bind(settings: Settings) -> socket.socket:
    """The listening socket; OSError if the address is taken."""
    if settings.uds:
        if os.path.exists(settings.uds):
            if not stat.S_ISSOCK(os.stat(settings.uds).st_mode):
                raise FileExistsError(f"--uds: {settings.uds} exists and is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(settings.uds) == 0:
                    raise FileExistsError(f"--uds: another process listens on {settings.uds}")
            os.unlink(settings.uds)  # left over by an earlier process
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(settings.uds)
        listener.listen(_BACKLOG)
        return listener
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    listener.listen(_BACKLOG)  # who connects from here on waits for an answer instead of being turned away
    return listener


def serve(settings: Settings) -> int:
    """Run until a signal ends it. Returns the exit status."""
    faulthandler.enable()  # a crash in native code says where
    if _HAS_SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until keys can be read again
    clock = StartupClock()
    listener = bind(settings)
    where = settings.uds or link(settings, listener.getsockname()[1])

    def on_ready() -> None:
        clock.mark("first step")
        clock.report(where)
        gc.freeze()

    app = create_app(
        settings,
        lambda metrics: load_growing_model(settings, clock, metrics),
        lambda error: server.fail(error),
        on_ready,
    )
    config = uvicorn.Config(
        app,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http=guarded_protocol(settings.stalled_client_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
    )
    server = Server(config, app.state.server)
    logger.info("listening on %s", where.removesuffix("/"))
    if app.state.server.keys.is_open and not settings.uds and not is_loopback(settings.host):
        logger.warning(
            "no API keys are set, and %s is not loopback: whoever reaches this port may use it", settings.host
        )
    probes = None
    if settings.metrics_port is not None:
        probes = ProbeServer((settings.host, settings.metrics_port), app.state.server)
        logger.info("metrics on port %d", probes.server_address[1])
    clock.mark("port")
    gc.freeze()  # what a start has made stays: looking through it for garbage would only stop everything for a while
    gc.enable()
    server.run(sockets=[listener])
    if probes is not None:
        probes.close()
    if server.failure is None:
        if app.state.server.model is None:  # stopped while a thread loads, which native code keeps from ending
            logging.shutdown()
            os._exit(0)
        return 0
    logger.error(
        "%s: %s",
        "cannot start" if app.state.server.model is None else "the engine died",
        server.failure,
        exc_info=None if _is_expected(server.failure) else server.failure,
    )
    return 1


def link(settings: Settings, port: int) -> str:
    """An address that a browser on this machine opens, whatever the server listens on."""
    host = "localhost" if settings.host in ("0.0.0.0", "::", "") else settings.host
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{name}:{port}/"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_expected(error: BaseException) -> bool:
    """Whether the message alone tells the operator what to do."""
    return isinstance(error, BoomerangError | ValueError | OSError | RuntimeError)
