"""What README.md promises somebody new: clone, `make serve`, its commands as printed; for `make test-readme`.

Everything is made anew, in a folder of its own: the environment, the store, the kernels. That takes minutes and a
gigabyte from package indexes, so it is no part of the suite.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.api.tiny import ROOT

pytestmark = [
    pytest.mark.skipif(not os.environ.get("BOOMERANG_TEST_README"), reason="make test-readme: a fresh installation"),
    pytest.mark.timeout(1800),
]


def blocks(language: str = "") -> list[str]:
    """The code of README.md in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def clean_environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BOOMERANG_", "PYTHONPATH"))}
    return kept | {"BOOMERANG_STORE": str(folder / "store")}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """(folder of the clone, its environment, address of the server that `make serve` started)."""
    folder = tmp_path_factory.mktemp("fresh")
    clone = folder / "boomerang-serve"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = clean_environment(folder)
    started = time.monotonic()
    command = ["make", "serve", f"ARGS=--host 127.0.0.1 --port {port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_ready(url):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            time.sleep(1)
        print(f"ready after {time.monotonic() - started:.0f} s")  # told, not held to: machines differ
        yield clone, environment, url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def run(fresh, command: list[str], **options) -> str:
    clone, environment, _ = fresh
    environment = environment | {"PATH": f"{clone / '.venv/bin'}:{environment['PATH']}"}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_line_answers_at_the_size_it_asks_for(fresh):
    (line,) = [block for block in blocks() if block.startswith("curl")]
    answer = httpx.Response(200, text=run(fresh, ["bash", "-c", line.replace("localhost:8000", fresh[2][7:])])).json()
    assert answer["model"] == "smollm2-135m-instruct:20L" and answer["size"]["layers"] == 20
    assert "Paris" in answer["choices"][0]["text"]


def test_the_python_lines_say_what_gravity_is(fresh):
    (code,) = blocks("python")
    said = run(fresh, ["python", "-c", code.replace("http://localhost:8000", fresh[2])])
    assert said.startswith("smollm2-135m-instruct:24L ")
    assert re.search(r"\bforce\b", said) and "gravity" in said.lower(), said


def test_every_way_of_choosing_a_size_in_the_table(fresh):
    table = (ROOT / "README.md").read_text().split("| how | meaning |")[1].split("\n\n")[0]
    asked = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    for row in table.splitlines()[2:]:
        cell = row.split("|")[1]
        for text in re.findall(r'`("(?:size|model|memory_budget_mb|slo|size_schedule)": .*?)`(?:,|\s|$)', cell):
            if "-q" in text:
                continue  # with --precision-dial on
            body = httpx.Response(200, text="{" + text + "}").json()
            answer = httpx.post(f"{fresh[2]}/v1/completions", json=asked | body, timeout=60)
            assert answer.status_code == 200, (text, answer.text)


def test_the_commands_and_the_page(fresh):
    sizes = run(fresh, ["boomerang", "sizes"])
    assert all(f"{size}L" in sizes for size in range(16, 31))
    assert "distill" in run(fresh, ["boomerang", "--help"]) and "--min-size" in run(
        fresh, ["boomerang", "serve", "--help"]
    )
    page = httpx.get(fresh[2])
    assert page.status_code == 200 and "Boomerang playground" in page.text
