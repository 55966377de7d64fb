"""The commands as a user runs them, on a tiny pair."""

import json
import os
import subprocess
import sys

import pytest

from tests.api.tiny import ROOT, RunningServer, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("cli"))


def boomerang(*arguments: str, stdin: str = "", store=None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BOOMERANG_")} | {"OMP_NUM_THREADS": "1"}
    if store:
        environment["BOOMERANG_STORE"] = str(store)
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def pair_flags(pair) -> list[str]:
    return ["--teacher", str(pair[0]), "--student", str(pair[1]), "--dtype", "float32"]


def test_sizes_and_bench_latency(pair, tmp_path):
    flags = pair_flags(pair)
    answer = boomerang("sizes", *flags, "--json", store=tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)["sizes"]
    assert [row["size"] for row in rows] == [4, 5, 6] and rows[0]["speed"] is None
    lengths = ["--input-len", "9", "--output-len", "4"]
    bench = ["bench", "latency", *flags, *lengths, "--batch-sizes", "1,3", "--repeats", "1"]
    answer = boomerang(*bench, "--json", "-", store=tmp_path)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert set(report["sizes"]) == {"4", "5", "6"}
    assert all(row[phase][b] > 0 for row in report["sizes"].values() for phase in row for b in ("1", "3"))
    rows = json.loads(boomerang("sizes", *flags, "--json", store=tmp_path).stdout)["sizes"]
    assert rows[0]["speed"]["decode"]["1"] > 0
    table = boomerang("sizes", *flags, store=tmp_path)
    assert "parameters" in table.stdout and "6L" in table.stdout and "all 3 sizes together" in table.stdout


CONVERSATION = "/sizes\nhello\n/size 5L\nhello\n/size 99L\nhello\n/nonsense\n/reset\n/quit\n"


def check_chat(answer: subprocess.CompletedProcess) -> None:
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "4L 5L 6L" in answer.stdout
    assert "[6L, " in answer.stdout and "[5L, " in answer.stdout
    assert "there is no size of 99 layers" in answer.stdout
    assert "no such command: /nonsense" in answer.stdout


def test_chat_with_a_pair_loaded_here(pair, tmp_path):
    flags = [*pair_flags(pair), "--max-tokens", "6", "--size-policy", "largest"]
    check_chat(boomerang("chat", *flags, stdin=CONVERSATION, store=tmp_path))


def test_chat_with_a_running_server(pair):
    with RunningServer(pair) as server:
        check_chat(boomerang("chat", "--url", server.url, "--max-tokens", "6", stdin=CONVERSATION))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://["])
def test_chat_without_a_server(url):
    answer = boomerang("chat", "--url", url)
    assert answer.returncode == 1 and answer.stdout.startswith("boomerang: --url: the server does not answer: ")
    assert not answer.stderr


def test_help_and_mistakes(pair):
    assert "bench" in boomerang("--help").stdout
    answer = boomerang("serve", "--max-num-seqs", "many")
    assert answer.returncode == 2 and "max-num-seqs" in answer.stderr
    answer = boomerang("sizes", "--teacher", "/nowhere", "--student", "/nowhere")
    assert answer.returncode == 1 and "/nowhere" in answer.stderr and "Traceback" not in answer.stderr
