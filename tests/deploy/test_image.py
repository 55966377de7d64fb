"""The runtime image without Docker: the wheel that the Dockerfile builds, run as the image runs it.

A root file system of bind mounts, all read-only; user 2000, group 0, no capabilities; no compiler on PATH; only /store,
/cache and /tmp can be written. Needs root and the right to mount (`unshare`); elsewhere the wheel alone is checked.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from deploy.local.stack import free_port
from server.kernels.cpu import build
from tests.api.tiny import make_pair

ROOT = Path(__file__).parents[2]


def copied_by(stage: str) -> list[str]:
    """Names that the Dockerfile copies into a builder stage from the build context."""
    text = re.search(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM )", (ROOT / "Dockerfile").read_text(), re.M | re.S)[1]
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    return [name for line in lines for name in line.split()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """For XDG_CACHE_HOME: kernels of every variant, so that none is compiled for this file alone. Where the processor
    cannot run one, another lies in its place, as nothing will load it."""
    folder = tmp_path_factory.mktemp("cache")
    kernels = folder / "boomerang" / "kernels"
    kernels.mkdir(parents=True)
    if (cxx := build.compiler()) is not None:
        runnable = [variant for variant in build.VARIANTS if not build.missing_instructions(variant)]
        for variant in build.VARIANTS if runnable else ():
            library = build.build(variant if variant in runnable else runnable[-1])
            shutil.copy(library, kernels / build._cached_name(variant, cxx))
    return folder


@pytest.fixture(scope="module")
def site(cache, tmp_path_factory) -> Path:
    """What `pip install .` leaves in the image: built from exactly the files that reach the builder."""
    folder = tmp_path_factory.mktemp("image")
    context = folder / "context"
    context.mkdir()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    junk = shutil.ignore_patterns("__pycache__", "*.so", "secrets")
    for name in copied_by("wheel"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in allowed), f"{name} does not enter the build context"
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=junk)
        else:
            shutil.copy(source, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(context)], check=True, timeout=240, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def healthy(process: subprocess.Popen, port: int, log: Callable[[], str]) -> str:
    """Address of a server, once it answers what HEALTHCHECK asks."""
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log()
        try:
            if httpx.get(url + "/health").status_code == 200:
                return url
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def test_the_wheel_has_everything_that_a_server_reads(site):
    package = site / "boomerang_serve"
    for name in ("index.html", "app.js", "app.css", "icon.svg", "vendor/marked.umd.js", "vendor/LICENSE.marked.txt"):
        assert (package / "server/api/playground" / name).is_file()
    default = ROOT / "model_store/default_pair"
    stays_behind = (".jsonl", "__pycache__")  # the training curve, and bytecode
    wanted = {path.name for path in default.iterdir() if not path.name.endswith(stays_behind)}
    assert wanted == {path.name for path in (package / "model_store/default_pair").iterdir()}
    kernels = {path.name for path in (package / "server/kernels/cpu").glob("*.so")}
    has_kernels = bool(kernels)
    if build.compiler():
        assert kernels == {build.library_name(variant) for variant in build.VARIANTS}, "not all were built"
    (wheel,) = site.parent.glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$" if has_kernels else r"-py3-none-any\.whl$", wheel.name), wheel.name
    assert [path.name for path in site.iterdir() if path.suffix != ".dist-info"] == ["boomerang_serve"]
    assert list(site.glob("*.dist-info/licenses/LICENSE")), "the licence is missing"


_IMPORT_ALL = """
import importlib, pkgutil, sys
import boomerang_serve
for module in pkgutil.walk_packages(boomerang_serve.__path__, "boomerang_serve."):
    if not module.name.endswith("__main__") and "boomerang_cpu_" not in module.name:  # the kernels are no modules
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name.partition(".")[0] in ("ray", "triton", "docker", "accelerate", "datasets"), module.name
left = {"server", "model_store", "deploy"} & set(sys.modules)
assert not left, left
"""


def test_nothing_in_the_wheel_imports_by_a_name_of_the_repository(site, tmp_path):
    command = [sys.executable, "-c", _IMPORT_ALL]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path, check=True, timeout=120)


def test_installed_it_serves_in_an_empty_folder(site, tmp_path):
    """The command that pip writes, with a grammar: that is tried by a process of its own, started by module name."""
    teacher, student = make_pair(tmp_path / "pair")
    (tmp_path / "empty").mkdir()
    (wheel,) = site.parent.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(tmp_path / "lib"), str(wheel)], check=True, timeout=120)
    port = free_port()
    command = [str(tmp_path / "lib/bin/boomerang"), "serve", "--teacher", str(teacher), "--student", str(student)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num-threads", "1", "--kv-cache-memory", "16MiB"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BOOMERANG_")}
    environment |= {"PYTHONPATH": str(tmp_path / "lib"), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path / "empty", env=environment, stdout=log, stderr=log)
    text = (tmp_path / "log").read_text
    try:
        url = healthy(process, port, text)
        body = {"prompt": "Hello", "max_tokens": 4, "structured_outputs": {"regex": "[0-9]{2}"}}
        answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and re.fullmatch("[0-9]{2}", answer.json()["choices"][0]["text"]), answer.text
        assert " boomerang_serve.server.process: listening" in text()
    finally:
        process.terminate()
        code = process.wait(30)
    assert code == 0 and not list((tmp_path / "empty").iterdir()), text()


CAN_MOUNT = (
    sys.platform == "linux"
    and os.geteuid() == 0
    and bool(shutil.which("unshare") and shutil.which("setpriv"))
    and subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
)


@pytest.mark.skipif(not CAN_MOUNT, reason="needs root and the right to mount")
def test_it_serves_as_another_user_from_a_read_only_root(site, tmp_path):
    teacher, student = make_pair(tmp_path / "pair")
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path / "pair")], check=True)
    port = free_port()
    new = tmp_path / "root"
    new.mkdir()
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/dev", sys.base_prefix, sys.prefix]
    script = ["set -e", f"mount -t tmpfs -o mode=755 none {new}"]
    for name, mode in (("store", "775"), ("cache", "775"), ("tmp", "1777")):
        # The image gives /store and /cache to user 2000.
        script += [f"mkdir -p {new}/{name}", f"mount -t tmpfs -o mode={mode},uid=2000,gid=0 none {new}/{name}"]
    for path in map(str, [*filter(os.path.exists, system), site, tmp_path / "pair"]):
        to = f"{new}{path}"
        script += [f"mkdir -p {to}", f"mount --rbind {path} {to}", f"mount -o remount,bind,ro {to}"]
    script += [f"mount -o remount,ro {new}"]
    image_environment = {
        "PATH": str(Path(sys.executable).parent),
        "HOME": "/cache",
        "XDG_CACHE_HOME": "/cache",
        "HF_HOME": "/cache/huggingface",
        "BOOMERANG_STORE": "/store",
        "BOOMERANG_HOST": "127.0.0.1",
        "BOOMERANG_PORT": str(port),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
    }
    server = [
        *(
            "env",
            "-i",
            *(f"{k}={v}" for k, v in image_environment.items()),
            sys.executable,
            "-m",
            "boomerang_serve",
            "serve",
        ),
        *("--teacher", str(teacher), "--student", str(student), "--num-threads", "1", "--kv-cache-memory", "16MiB"),
        *("--max-model-len", "256", "--shutdown-timeout", "5"),
    ]
    limits = ["setpriv", "--reuid=2000", "--regid=0", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    script += [f"exec chroot {new} {shlex.join([*limits, *server])}"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(["unshare", "-m", "sh", "-c", "\n".join(script)], stdout=log, stderr=log, cwd="/")
    text = (tmp_path / "log").read_text
    try:
        url = healthy(process, port, text)
        answer = httpx.post(url + "/v1/completions", json={"prompt": "Hello", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200, answer.text
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+2000\s", status, re.M) and re.search(r"^CapEff:\s+0+$", status, re.M), status
    finally:
        process.terminate()
        code = process.wait(30)
    assert code == 0, text()
