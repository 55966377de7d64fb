"""The commands as a user runs them, on a tiny pair."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import DummyInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from model_store.evaluate.report import meanings, uses, write_report
from server.cli import main, settings_of
from server.commands.chat import COMMANDS
from server.commands.prompt import make_session
from server.config import Settings
from server.loading import load_model
from server.observe.metrics import Metrics
from server.observe.throughput import ThroughputLog
from server.options import SettingsError, flag_name, load_settings
from tests.api.tiny import QUICK, ROOT, RunningServer, make_pair, noted


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


def test_sizes_and_bench_latency(pair, tmp_path, capsys):
    flags = [*pair_flags(pair), "--store", str(tmp_path)]

    def said(*arguments: str) -> str:
        assert main([*arguments, *flags]) == 0
        return capsys.readouterr().out

    rows = json.loads(said("sizes", "--json"))["sizes"]
    assert [row["size"] for row in rows] == [4, 5, 6] and rows[0]["speed"] is None
    lengths = ["--input-len", "9", "--output-len", "4"]
    report = json.loads(said("bench", "latency", *lengths, "--batch-sizes", "1,3", "--repeats", "1", "--json", "-"))
    assert set(report["sizes"]) == {"4", "5", "6"}
    assert all(row[phase][b] > 0 for row in report["sizes"].values() for phase in row for b in ("1", "3"))
    rows = json.loads(said("sizes", "--json"))["sizes"]
    assert rows[0]["speed"]["decode"]["1"] > 0
    table = said("sizes")
    assert "parameters" in table and "6L" in table and "all 3 sizes together" in table


CONVERSATION = "/sizes\nhello\n/size 5L\nhello\n/size 99L\nhello\n/nonsense\n/reset\n/quit\n"


def check_chat(answer: subprocess.CompletedProcess) -> None:
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "4L 5L 6L" in answer.stdout
    assert "[6L, " in answer.stdout and "[5L, " in answer.stdout
    assert "there is no size 99L" in answer.stdout and "5L> no such command" in answer.stdout  # the one before again
    assert "no such command: /nonsense" in answer.stdout


def test_chat_with_a_pair_loaded_here(pair, tmp_path):
    flags = [*pair_flags(noted(*pair, tmp_path)), "--max-tokens", "6", "--size-policy", "largest"]
    check_chat(boomerang("chat", *flags, stdin=CONVERSATION, store=tmp_path))


def test_chat_draws_tokens_as_the_model_says(pair, tmp_path):
    flags = [*pair_flags(noted(*pair, tmp_path)), "--max-tokens", "8", "--override-generation-config"]
    questions = "hello\n/reset\nhello\n/quit\n"
    answer = boomerang("chat", *flags, '{"temperature": 0}', stdin=questions, store=tmp_path)
    _, *answers = re.sub(r"[\d.]+ tokens/s", "", answer.stdout).split("auto> ")
    first, second = (text for text in answers if text)  # between them nothing, as /reset prints
    assert first == second and "[6L, 8 tokens" in first, answer


def test_chat_with_a_running_server(pair):
    with RunningServer(pair, *QUICK) as server:
        check_chat(boomerang("chat", "--url", server.url, "--max-tokens", "6", stdin=CONVERSATION))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://["])
def test_chat_without_a_server(url, capsys):
    assert main(["chat", "--url", url]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("boomerang: --url: the server does not answer: ") and not said.err


MISTAKES = {
    "a command": (["serv"], "Did you mean 'serve'?"),
    "a flag": (["serve", "--max-num-seq", "4"], "--max-num-seqs"),
    "a flag of distill": (["distill", "--row-token", "4"], "--row-tokens"),
    "no number": (["serve", "--max-num-seqs", "many"], "--max-num-seqs: input should be a valid integer"),
    "out of range": (["serve", "--port", "70000"], "--port: input should be less than or equal to 65535, not '70000'"),
    "two at once": (["serve", "--port", "x", "--max-num-seqs", "0"], "--max-num-seqs: "),
    "no choice": (["serve", "--dtype", "int3"], "'--dtype'"),
    "half of a pair of files": (["serve", "--ssl-keyfile", "key.pem"], "--ssl-keyfile and --ssl-certfile"),
    "no file": (["evaluate", "--text", "/nowhere"], "--text: there is no /nowhere"),
    "no data": (["distill", "--out", "x", "--data", "/nowhere"], "--data: there is no /nowhere"),
    "nothing asked for": (["distill", "--out", "x"], "--data: name files"),
    "no trace": (["simulate", "--trace", "/nowhere"], "--trace: there is no file /nowhere"),
    "missing": (["export", "--out", "x"], "Missing option '--size'"),
    "no benchmark": (["bench"], "latency"),
    "a list of nothing": (["bench", "latency", "--batch-sizes", "1,x"], "--batch-sizes: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, capsys):
    arguments, expected = MISTAKES[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert expected in " ".join((said.out + said.err).split()), said
    assert "Traceback" not in said.err


def test_help_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    missing = [name for name in Settings.model_fields if f"{flag_name(name)} " not in re.sub("[│,]", " ", text)]
    assert not missing and "Usage: boomerang serve [OPTIONS] [model]" in text and "Size choice" in text
    assert main(["--help"]) == 0 and "bench" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_completion_knows_commands_flags_and_choices(monkeypatch, capsys):
    def complete(words: str) -> set[str]:
        monkeypatch.setenv("_BOOMERANG_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        main([])
        return set(capsys.readouterr().out.split())

    assert complete("boomerang s") == {"serve", "sizes", "simulate"}
    assert {"--max-num-seqs", "--max-num-queued-reqs"} <= complete("boomerang serve --max-num")
    assert complete("boomerang serve --dtype b") == {"bfloat16"}


@pytest.fixture
def environ(monkeypatch):
    """Sets variables; none of the tests' own are there."""
    for name in list(os.environ):
        if name.startswith("BOOMERANG_"):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


def test_flags_go_before_variables_before_the_file(environ, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nblock-size: 8\nsize: 24\nprecision-dial: on\nspeculative_size: off\napi_key: [a, 'b']\n")
    environ("BOOMERANG_PORT", "2")
    environ("BOOMERANG_MAX_BODY_BYTES", "2MiB")
    environ("BOOMERANG_ALLOWED_ORIGINS", "x, y")
    environ("BOOMERANG_ACCESS_LOG", "")
    environ("BOOMERANG_KV_CACHE_MEMORY", "")
    found = load_settings({"config": str(file), "max_num_seqs": "3", "served_model_name": ["m", "n,o"]})
    expected = {
        "port": 2, "page_size": 8, "size": "24", "precision_dial": "on",
        "api_key": ("a", "b"), "max_body_bytes": 2 << 20, "allowed_origins": ("x", "y"), "access_log": False,
        "max_num_seqs": 3, "served_model_name": ("m", "n", "o"),
    }  # fmt: skip
    assert found.model_dump(exclude_defaults=True) == expected
    assert load_settings({"config": str(file), "port": "3"}).port == 3
    assert isinstance(found, Settings) and found.speculative_size == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "settings.yaml: prot: there is no such setting; did you mean port?"),
        ("port: true", "settings.yaml: port: True is not a number"),
        ("port: 8.5", "settings.yaml: port: input should be a valid integer"),
        ("block-size: 0", "settings.yaml: block-size: input should be greater"),
        ("- port", "settings.yaml"),
        ("port: [", "cannot read"),
        ("api_key: []", "api_key: given, but empty"),
    ],
)
def test_a_file_is_refused_by_key(text, message, environ, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings({"config": str(tmp_path / "settings.yaml")})
    assert message in str(refused.value)


def test_what_cannot_be_used_is_named_where_it_stands(environ):
    environ("BOOMERANG_PORT", "70000")
    with pytest.raises(SettingsError, match=r"^BOOMERANG_PORT: input should be less"):
        load_settings()
    with pytest.raises(SettingsError, match=r"^--config: there is no file"):
        load_settings({"config": "/nowhere.yaml"})
    with pytest.raises(SettingsError, match="--max-num-seq: there is no such setting; did you mean max_num_seqs"):
        load_settings({"max_num_seq": 4, "port": 1})


def test_an_option_of_several_values_takes_what_follows():
    settings = settings_of(["--served-model-name", "a", "b", "--api-key=x", "--allowed-origins", "c,d", "e"])
    assert settings.served_model_name == ("a", "b") and settings.api_key == ("x",)
    assert settings.allowed_origins == ("c", "d", "e")


def test_a_pair_that_is_not_there(capsys):
    assert main(["sizes", "--teacher", "/nowhere", "--student", "/nowhere"]) == 1
    said = capsys.readouterr().err
    assert "/nowhere" in said and "Traceback" not in said


UNSERVABLE = {
    "no such size": (["--size", "12L"], "--size: there is no size 12L; sizes are 4L, 5L, 6L"),
    "no size": (["--min-size", "big"], "--min-size: 'big' is not a size"),
    "upside down": (["--min-size", "6L", "--max-size", "4L"], "--min-size: 6L is above --max-size, 4L"),
    "no precision": (["--precision", "q77"], "--precision: 'q77' is not a precision"),
    "no guesser": (["--speculative-size", "9L"], "--speculative-size: there is no size 9L"),
    "no template": (["--chat-template", "/nowhere"], "--chat-template: cannot read /nowhere"),
    "no JSON": (["--override-generation-config", "{"], "--override-generation-config is not valid JSON"),
}


@pytest.mark.parametrize("name", UNSERVABLE)
def test_what_no_size_can_serve_is_said_before_anything_is_loaded(name, pair, monkeypatch):
    flags, message = UNSERVABLE[name]
    monkeypatch.setattr("server.loading.load_weights", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(settings_of([*pair_flags(pair), *flags]))


def test_a_size_that_is_not_there_ends_the_start_with_one_line(pair):
    answer = boomerang("serve", *pair_flags(pair), "--port", "0", "--size", "12L")
    assert answer.returncode == 1 and "--size: there is no size 12L" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5])
def test_ctrl_c_at_any_time_is_no_traceback(seconds, pair):
    command = [sys.executable, "-m", "server", "serve", *pair_flags(pair), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    if said.startswith("Fatal Python error: init"):
        return  # a busy machine: Python itself was not up yet
    assert process.returncode in (-signal.SIGINT, 0, 130) and "Traceback" not in said, said


def test_the_log_tells_what_was_served_and_where_to_click(pair):
    with RunningServer(pair, *QUICK) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello", "max_tokens": 3, "size": "5L"})
        httpx.get(f"{server.url}/v1/models")
    server.reader.join(10)
    assert any(f"ready: {server.url}/ " in line for line in server.log)
    asked = next(line for line in server.log if "/v1/completions" in line)
    assert re.search(r"200 [\d.]+ ms, 5L, \d+ \+ \d tokens", asked)
    assert re.search(r'/v1/models" 200 [\d.]+ ms( \[|$)', next(line for line in server.log if "/v1/models" in line))


def test_a_line_every_ten_seconds_of_what_is_served(caplog):
    metrics = Metrics()
    engine = SimpleNamespace(stats=lambda: SimpleNamespace(**now))
    now = {"num_running": 0, "num_waiting": 0, "kv_usage": 0.0, "running_by_size": {}}
    log = ThroughputLog(metrics, engine)
    caplog.set_level("INFO")
    for _ in range(10):
        log.sample()
    assert not caplog.records  # nobody was there
    for second in range(10):
        now = {"num_running": 2, "num_waiting": 1, "kv_usage": 0.5, "running_by_size": {24: 1, 30: 1}}
        metrics._num_generation_tokens += 40
        metrics._num_prompt_tokens += 100 * (second == 0)
        log.sample()
    assert [record.getMessage() for record in caplog.records] == [
        "2 running, 1 waiting, prompts 10.0 tokens/s, answers 40.0 tokens/s, KV cache 50.0 %, mean size 27.0L"
    ]


@pytest.fixture
def terminal(tmp_path):
    """A function from keys to the lines that a session reads of them, and the session."""
    with create_pipe_input() as keys:
        session = make_session(["4L", "6L"], COMMANDS, tmp_path / "history", input=keys, output=DummyOutput())

        def typed(text: str) -> str:
            keys.send_text(text)
            return session.prompt("> ")

        yield typed, session


def test_chat_reads_several_lines_and_remembers_them(terminal, tmp_path):
    typed, _ = terminal
    assert typed("one\r") == "one"
    assert typed("two\\\rthree\x1b\rfour\r") == "two\nthree\nfour"
    assert typed("\x1b[A\r") == "two\nthree\nfour"  # the arrow up
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600
    again = make_session([], COMMANDS, tmp_path / "history", input=DummyInput(), output=DummyOutput())
    assert list(again.history.load_history_strings())[-1] == "one"
    nowhere = make_session([], COMMANDS, Path("/proc/none/history"), input=DummyInput(), output=DummyOutput())
    assert not list(nowhere.history.load_history_strings())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("/s", ["/size", "/sizes", "/system"]), ("/size ", ["auto", "student", "teacher", "4L", "6L"]),
     ("/size 4", ["4L"]), ("/size S", ["student"]), ("/system 4", []), ("hello /s", []), ("", [])],
)  # fmt: skip
def test_chat_completes_commands_and_sizes(text, expected, terminal):
    found = terminal[1].completer.get_completions(Document(text), CompleteEvent(completion_requested=True))
    assert [item.text for item in found] == expected


def test_the_report_says_which_size_to_use_for_what(tmp_path):
    figures = {4: (0.9, 0.5, 0.4), 5: (0.4, 0.7, 0.0), 6: (0.08, 0.9, 0.0), 7: (0.0, 1.0, 0.0)}
    rows = {
        size: {"kl": kl, "top1_agreement": top1, "repetition": loops, "weight_bytes": size * 1000}
        for size, (kl, top1, loops) in figures.items()
    }
    said = "\n".join(uses(rows))
    assert "7L, the teacher" in said and "\n6L (86% of the bytes, the teacher's first choice at 90% of" in said
    assert "\n5L (" in said and "\n4L (" in said and "Up to 4L greedy answers go round in circles" in said
    assert "6L has 0.08: it gives what the teacher would say 0.92 times" in "\n".join(meanings(rows))
    assert uses({7: rows[7]}) == [] and uses({4: {}, 7: {}}) == [] and meanings({4: {"weight_bytes": 1}}) == []
    write_report(tmp_path, "<script>alert(1)</script>", ["text: a & b"], rows)
    page, text = (tmp_path / "quality.html").read_text(), (tmp_path / "quality.md").read_text()
    assert "<script>" not in page and "a &amp; b" in page and '<th scope="row">6L</th>' in page
    assert "Which size for what" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "| 6L | 0.080 |" in text and "- 7L, the teacher" in text
