"""The start-up clock, what loading leaves behind, and what a warm start need not import."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from model_store.pair import open_pair
from server.api.http.probes import ProbeServer
from server.observe.startup import StartupClock
from tests.api.tiny import ROOT, RunningServer
from tests.api.tiny import make_pair as make_served_pair


def test_phases_add_up_from_the_process_start(caplog: pytest.LogCaptureFixture) -> None:
    clock = StartupClock()
    clock.mark("weights")
    with caplog.at_level(logging.INFO):
        clock.report("http://localhost:8000/")
    phases = caplog.records[-1].startup
    assert list(phases) == ["interpreter and imports", "weights"]
    assert phases["interpreter and imports"] > 0  # this process did not start just now
    assert "ready: http://localhost:8000/ " in caplog.text and "after the process started" in caplog.text


def test_the_port_answers_before_torch_is_imported() -> None:
    code = "import server.loading, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sigterm_is_heard_while_modules_are_still_imported(tmp_path) -> None:
    """As the first process of a container, which the kernel sends no signal that it does not handle."""
    (tmp_path / "uvicorn.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "server", "serve"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"importing\n"
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_sigterm_ends_a_server_that_is_still_loading(tmp_path) -> None:
    pair = make_served_pair(tmp_path)
    weights = pair[1] / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # whoever opens it waits for a writer
    server = RunningServer(pair)
    server.wait_listening()
    assert server.stop(timeout=20) == 0
    assert not any("Traceback" in line for line in server.log)


def test_a_probe_that_hangs_up_leaves_no_traceback(capsys) -> None:
    server = ProbeServer(("127.0.0.1", 0), None)  # type: ignore[arg-type]
    try:
        for error in (ConnectionResetError(), BrokenPipeError(), KeyError("told")):
            try:
                raise error
            except (OSError, KeyError):
                server.handle_error(None, ("127.0.0.1", 1))
    finally:
        server.close()
    assert capsys.readouterr().err.count("Traceback") == 1


def test_precompiling_covers_what_a_start_imports(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    command = [sys.executable, "-m", "server.precompile"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})

    def compiled() -> set[str]:
        files = (str(file) for file in (tmp_path / "bytecode").rglob("*.pyc"))
        return {file for file in files if "site-packages" in file or str(ROOT) in file}

    before = compiled()
    served = make_served_pair(tmp_path)
    open_pair(*served)  # the first opening of a folder asks transformers what it is, a start finds that noted
    with RunningServer(served, "--executor", "auto") as server:
        server.wait_ready()
    late = sorted(compiled() - before)
    assert len(before) > 400 and len(late) < 30, late
