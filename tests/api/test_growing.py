"""Sizes that appear in a running server: a student turns up in the store, then a better one; requests go on."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from model_store import made
from model_store.made import Progress, write_progress
from model_store.pair import made_folder, open_pair
from server.cli import main
from server.config import Settings
from server.offline import OfflineEngine
from tests.api import tiny

PROMPT = "The quick brown fox"
GREEDY = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.make_pair(tmp_path_factory.mktemp("growing"))[0]


def publish(teacher, store, seed):
    """What `boomerang distill --quick` leaves in the store."""
    folder = made_folder(teacher, store)
    work = made.work_folder(folder) / "pair"
    tiny.make_model(len(tiny.KEPT), seed).save_pretrained(work)
    pruned = [layer for layer in range(tiny.NUM_LAYERS) if layer not in tiny.KEPT]
    config = {"copied_teacher_layers": list(tiny.KEPT), "pruned_teacher_layers": pruned}
    (work / "student_config.json").write_text(json.dumps(config))
    (work / "pair.json").write_text(json.dumps({"name": tiny.NAME, "patch_order": "last_to_first"}))
    (work / "quality.json").write_text(json.dumps({"sizes": {"4": {"kl": 0.5}, "5": {"kl": 0.2}}}))
    return made.publish(folder, work)


def sizes(url):
    return httpx.get(url + "/v1/models").json()["data"][0]["sizes"]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tokens(choice):
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def stream(url, size, count, seen):
    with httpx.stream("POST", url + "/v1/completions", timeout=120,
                      json=GREEDY | {"size": size, "max_tokens": count, "stream": True}) as answer:  # fmt: skip
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                if event["choices"]:
                    seen += tokens(event["choices"][0])


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_sizes_appear_and_streams_go_on(teacher, tmp_path, executor, capsys):
    store = tmp_path / "store"
    flags = ["--store", str(store), "--executor", executor, "--size-policy", "auto", "--max-model-len", "256"]
    with tiny.RunningServer(tiny.noted(teacher, None, store), *flags) as server:
        ask = lambda size, count: tokens(httpx.post(  # noqa: E731
            server.url + "/v1/completions", timeout=60, json=GREEDY | {"size": size, "max_tokens": count}
        ).json()["choices"][0])  # fmt: skip
        assert sizes(server.url) == ["6L"]
        whole: list[int] = []
        streaming = threading.Thread(target=stream, args=(server.url, "6L", 200, whole))
        streaming.start()
        wait_for(lambda: whole)
        write_progress(made_folder(teacher, store), Progress("training end to end", 0.5, {5: 0.25}))
        first = publish(teacher, store, 2)
        wait_for(lambda: sizes(server.url) == ["4L", "5L", "6L"])
        ids = [card["id"] for card in httpx.get(server.url + "/v1/models").json()["data"]]
        assert ids == [tiny.NAME, *(f"{tiny.NAME}:{size}L" for size in (4, 5, 6))]
        said = {size: ask(f"{size}L", 12) for size in (4, 5, 6)}
        streaming.join()
        wait_for(lambda: "boomerang:student_progress" in httpx.get(server.url + "/metrics").text)
        metrics = httpx.get(server.url + "/metrics").text
        assert f'boomerang:student_kl{{model_name="{tiny.NAME}",size="5"}} 0.25' in metrics
        assert f'boomerang:requests_running{{model_name="{tiny.NAME}",size="4"}}' in metrics
        assert httpx.get(server.url + "/playground/pair.json").json()["stations"][0]["stop"] == 2
        auto = httpx.post(server.url + "/v1/completions", json=GREEDY | {"min_size": "4L", "max_tokens": 1}).json()
        assert auto["size"]["layers"] == 6

        # A better student replaces it while the small size is running.
        small: list[int] = []
        streaming = threading.Thread(target=stream, args=(server.url, "4L", 200, small))
        streaming.start()
        wait_for(lambda: small)
        second = publish(teacher, store, 3)
        wait_for(lambda: any(str(second) in line for line in server.log))
        streaming.join()
        assert len(small) == 200
        later = {size: ask(f"{size}L", 12) for size in (4, 6)}
    assert not any("leak" in line or "Traceback" in line for line in server.log), "".join(server.log)
    prompt = open_prompt(teacher)
    for student, expected in ((first, said), (second, later)):
        engine = OfflineEngine(
            open_pair(teacher, student, store=store),
            Settings(executor="torch", device="cpu", dtype="float32", kv_cache_memory=16 << 20), 256,
        )  # fmt: skip
        engine.ends = set()
        for size, answer in expected.items():
            assert engine.generate(size, [prompt], len(answer))[0] == answer, (student.name, size)
        if student is first:
            assert engine.generate(6, [prompt], 200)[0] == whole
    capsys.readouterr()
    assert main(["sizes", "--teacher", str(teacher), "--store", str(store)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4L" in out and "a student is being made: 50%, training end to end, KL so far 5L 0.250" in out


def open_prompt(teacher):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(teacher / "tokenizer.json")).encode(PROMPT).ids


def test_what_does_not_fit_is_refused_and_said(teacher, tmp_path):
    with tiny.RunningServer(tiny.noted(teacher, None, tmp_path), "--store", str(tmp_path), *tiny.QUICK) as server:
        broken = publish(teacher, tmp_path, 2)
        wait_for(lambda: len(sizes(server.url)) == 3)
        other = made.work_folder(broken.parent) / "pair"
        shutil.copytree(broken, other)
        (other / "student_config.json").write_text('{"copied_teacher_layers": [0, 1, 2, 4, 5]}')
        made.publish(broken.parent, other)
        wait_for(lambda: any("is not served" in line for line in server.log))
        assert sizes(server.url) == ["4L", "5L", "6L"]
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "size": "4L", "max_tokens": 2})
        assert answer.status_code == 200
    assert os.path.isdir(broken)


def is_held(pid):
    """Whether a process is stopped, or will be before it runs again: at its priority it may not run for long."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    pending = int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)
    return status["State"].split()[0] == "T" or bool(pending >> (signal.SIGSTOP - 1) & 1)


def hurry(pid):
    """Give a process back the priority that it gave away: on a busy machine a test would wait for ever."""
    with contextlib.suppress(PermissionError):
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, 0)


def test_a_server_makes_its_own_student(teacher, tmp_path):
    """In a process that stands still while requests run, and that ends with the server."""
    flags = ["--store", str(tmp_path), "--make-minutes", "0.02", "--make-tokens", "4000", "--max-kl", "100"]
    tiny.noted(teacher, None, tmp_path)
    with tiny.RunningServer((teacher, "make"), *flags) as server:
        (maker,) = psutil.Process(server.process.pid).children()
        wait_for(lambda: "distill" in maker.cmdline() and maker.nice() == 19)
        hurry(maker.pid)
        seen: list[int] = []
        stream(server.url, "6L", 1, seen)
        streaming = threading.Thread(target=stream, args=(server.url, "6L", 200, seen))
        streaming.start()
        wait_for(lambda: len(seen) > 1)
        assert is_held(maker.pid)
        streaming.join()
        wait_for(lambda: not maker.is_running() or not is_held(maker.pid))
        wait_for(lambda: len(sizes(server.url)) > 1, 240)
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "a", "size": "5L"}).status_code == 200
        wait_for(lambda: any("the student is finished" in line for line in server.log), 120)
    pair = open_pair(teacher, "make", store=tmp_path)
    assert pair.elasticity.sizes == (5, 6) and pair.quality[5]["kl"] < 100
    # The next server has it from its start, and finds nothing left to be made.
    with tiny.RunningServer((teacher, "make"), *flags) as server:
        assert sizes(server.url) == ["5L", "6L"]
        assert not psutil.Process(server.process.pid).children()


def test_no_maker_outlives_its_server(teacher, tmp_path):
    tiny.noted(teacher, None, tmp_path)
    server = tiny.RunningServer((teacher, "make"), "--store", str(tmp_path), *tiny.QUICK)
    server.wait_ready()
    (maker,) = psutil.Process(server.process.pid).children()
    wait_for(lambda: maker.nice() == 19)
    maker.suspend()
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not maker.is_running() or maker.status() == psutil.STATUS_ZOMBIE)
