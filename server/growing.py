"""Sizes that appear while a server runs: it takes a student that was made for its teacher, and has one made.

A server whose teacher has no student looks into the store for one (`model_store.made`), and takes every newer one. With
`--student make` it makes it, too: in a process of its own, at the lowest priority, which is stopped while requests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model_store import made
from model_store.beside import load_beside
from model_store.errors import BoomerangError
from model_store.pair import MAKE, made_folder
from model_store.store import store_root
from server.api.http.state import ServedModel, ServerState
from server.config import GiB, Settings
from server.forms import open_settings_pair, weight_form
from server.loading import fingerprint, load_model, make_catalog, quality_of, resolver, with_points
from server.observe.startup import StartupClock

if TYPE_CHECKING:
    from server.engine.engine import Engine
    from server.engine.stats import MetricsSink

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_LOOK_SECONDS = 1.0  # between two looks into the store
_IDLE_SECONDS = 0.2  # without a request, after which making goes on
_LOG_SECONDS = 60.0  # between two lines on how it comes along


def load_growing_model(
    settings: Settings, clock: StartupClock | None = None, metrics: MetricsSink | None = None
) -> ServedModel:
    """`load_model`, and sizes appear once it serves, if the settings leave the student open."""
    model = load_model(settings, clock, metrics)
    pair = model.pair
    assert pair is not None
    if settings.student == MAKE or (
        settings.student is None and (pair.student_path is None or _is_made(pair.student_path))
    ):
        model.grow = Growth(settings, pair.teacher_path, pair.student_path).run
    return model


def _is_made(student: Path) -> bool:
    return made.version_of(student) > 0 and student.parent.parent.name == "students"


def load_student(settings: Settings, served: ServedModel) -> Callable[[Engine], ServedModel]:
    """Load the student that the settings name by now beside the teacher that is served.

    Returns what is to be called on the engine's thread: it has the engine go on with that student, and returns what is
    served then. Raises with a reason if this server cannot: BoomerangError or ValueError.
    """
    from server.cost.calibrate import place_of
    from server.sizing.policy import BudgetPolicy

    engine, old = served.engine, served.loaded
    pair = open_settings_pair(settings)
    assert old is not None, "`load_model` says what was loaded"
    extras = (engine.speculator, engine.lookahead, engine.sleeper)
    if any(extra is not None for extra in extras) or not engine.executor.can_change_student:
        raise ValueError(
            f"the {engine.executor.name} executor, or one that guesses or sleeps, takes another student at its start"
        )
    if missing := [f"{size}L" for size in engine.sizes if size not in pair.elasticity.sizes]:
        raise ValueError(f"it offers no {', '.join(missing)}, which this server does")
    form = weight_form(settings, pair)
    form = dataclasses.replace(form, storage=old.form.storage, bits=old.form.bits, widths=old.widths)
    need = pair.union_bytes(pair.elasticity.sizes, form)
    if settings.memory_budget is not None and need > settings.memory_budget:
        raise ValueError(f"--memory-budget: {need / GiB:.2f} GiB are needed for all its sizes")
    loaded = load_beside(pair, old, form)
    executor = engine.executor.beside(loaded, engine.config)
    catalog = make_catalog(settings, pair, loaded, executor, form, engine.config)
    folder = store_root(settings.store) / "calibration"
    profile, path = place_of(loaded, executor, engine.config.page_size, folder)

    def take_over(engine: Engine) -> ServedModel:
        policy = engine.scheduler.policy
        if isinstance(policy, BudgetPolicy):
            policy = policy.beside(profile, quality_of(pair, executor.widths), path)
        engine.change_student(loaded, executor, policy)
        return dataclasses.replace(
            served, catalog=with_points(settings, pair, catalog, policy), fingerprint=fingerprint(pair, form),
            resolve_size=resolver(catalog), pair=pair, loaded=loaded,
        )  # fmt: skip

    return take_over


class Growth:
    """Looks into the store for a newer student than the one that is served, and has the server take it."""

    def __init__(self, settings: Settings, teacher: Path, student: Path | None) -> None:
        self.settings, self.teacher = settings, teacher
        self.folder = made_folder(teacher, settings.store)
        self._seen = 0 if student is None else made.version_of(student)  # newest student that was taken, or refused

    async def run(self, state: ServerState) -> None:
        """Until it is cancelled. What goes wrong costs sizes, never the server."""
        maker = Maker(self.settings, self.teacher, self.folder) if self.settings.student == MAKE else None
        if maker is not None and (not self._seen or (made.work_folder(self.folder) / "state.pt").is_file()):
            await maker.start(state)
        told = time.monotonic()
        try:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                progress = await asyncio.to_thread(made.read_progress, self.folder)
                if progress is not None:
                    state.metrics.set_student_progress(progress.share, progress.kl)
                if maker is not None and maker.is_running and progress and time.monotonic() - told >= _LOG_SECONDS:
                    told = time.monotonic()
                    logger.info("making a student: %s", progress)
                found = await asyncio.to_thread(made.newest, self.folder)
                if found is not None and made.version_of(found) > self._seen:
                    self._seen = made.version_of(found)
                    await self._take(state, found)
        finally:
            if maker is not None:
                maker.stop()

    async def _take(self, state: ServerState, student: Path) -> None:
        try:
            started = time.monotonic()
            take_over = await asyncio.to_thread(load_student, self.settings, state.served)
            loaded = time.monotonic()
            model = await state.async_engine.call(take_over)
        except (BoomerangError, ValueError, OSError, RuntimeError) as error:
            logger.warning("the student %s is not served: %s", student, error)
            return
        state.change_model(model)
        logger.info(
            "%s: sizes %s, with the student %s, loaded in %.1f s and taken over in %.1f ms", model.catalog.name,
            ", ".join(f"{size}L" for size in model.catalog.sizes), student, loaded - started,
            1e3 * (time.monotonic() - loaded),
        )  # fmt: skip


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Whoever makes a student needs no key."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}


class Maker:
    """The process that makes a student: runs while no request does."""

    def __init__(self, settings: Settings, teacher: Path, folder: Path) -> None:
        self.settings, self.teacher, self.folder = settings, teacher, folder
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopped = False  # by a signal
        self._waiting: asyncio.Task | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, state: ServerState) -> None:
        """Start it, or go on with what an earlier process left."""
        arguments = ["--quick", "--background", "--teacher", str(self.settings.teacher or self.teacher)]
        settings = self.settings
        arguments += ["--max-kl", str(settings.max_kl), "--minutes", str(settings.make_minutes)]
        arguments += ["--tokens", str(settings.make_tokens)]
        if self.settings.store:
            arguments += ["--store", str(self.settings.store)]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "making.log"
        with log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server", "distill", *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=_without_secrets(os.environ),
            )  # fmt: skip
        logger.info("making a student in idle cycles, process %d, log in %s", self._process.pid, log)
        self._waiting = asyncio.ensure_future(self._wait(log))
        state.on_activity = self.requests_run
        self.requests_run(state.num_active > 0)

    async def _wait(self, log: Path) -> None:
        assert self._process is not None
        code = await self._process.wait()
        if code == 0:
            logger.info("the student is finished")
        elif code > 0:
            logger.warning("no student could be made (exit status %d), see the end of %s", code, log)

    def requests_run(self, any_run: bool) -> None:
        """Requests begin or end to run: the process stops at once, and goes on after a while without any."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if any_run:
            self._signal(signal.SIGSTOP)
        elif self._is_stopped:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._signal, signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            assert self._process is not None
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._is_stopped = number is signal.SIGSTOP

    def stop(self) -> None:
        """The server ends: another one goes on with what is left."""
        self._signal(signal.SIGCONT)
        if self.is_running:
            assert self._process is not None
            self._process.terminate()
