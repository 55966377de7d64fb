"""The real lm-evaluation-harness over HTTP scores what its own `hf` backend scores on the exported checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="pip install boomerang-serve[eval]")

from model_store.export import export_size
from model_store.pair import Pair, open_pair
from model_store.store import StoreError
from tests.api.tiny import NAME, QUICK, RunningServer, make_pair

TASKS = Path(__file__).parent / "tasks"
DEFAULT = "smollm2-135m-instruct"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Local files only, and datasets' cache in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("OPENAI_API_KEY", "")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        (folder / file.name).write_text(file.read_text().replace("FOLDER", str(folder)))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks, model: str, arguments: dict, names=("facts", "continue"), **options) -> dict:
    """Task -> its samples in order."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0,
        **options,
    )  # fmt: skip
    return {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}


def over_http(tasks, url: str, model: str, names, **arguments) -> dict:
    # No tokenizer is named: lm-eval finds the server's own and sends token ids.
    settings = {"model": model, "base_url": f"{url}/v1/completions", "max_retries": 1, **arguments}
    return evaluate(tasks, "local-completions", settings, names)


def check(served: dict, local: dict) -> None:
    for here, there in zip(served["facts"], local["facts"], strict=True):
        assert len(here["resps"]) == len(there["resps"]) > 1
        for ((ours, our_greedy),), ((theirs, their_greedy),) in zip(here["resps"], there["resps"], strict=True):
            assert float(ours) == pytest.approx(float(theirs), abs=1e-3), here["doc"]
            assert str(our_greedy) == str(their_greedy), here["doc"]
        assert here["acc"] == there["acc"] and here["acc_norm"] == there["acc_norm"]
    for here, there in zip(served.get("continue", ()), local.get("continue", ()), strict=True):
        assert here["resps"] == there["resps"], here["doc"]


def compare(tasks, pair: Pair, url: str, name: str, sizes: tuple[int, ...], folder: Path, **arguments) -> None:
    for size in sizes:
        checkpoint = folder / f"{size}L"
        export_size(pair, size, checkpoint, "float32")
        names = ("facts", "continue") if size == sizes[0] else ("facts",)
        local = evaluate(tasks, "hf", {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu"}, names)
        check(over_http(tasks, url, f"{name}:{size}L", names, **arguments), local)


def test_default_pair_scores_as_its_exports_do(tasks, tmp_path):
    try:
        pair = open_pair()
    except StoreError as error:
        pytest.skip(f"the default teacher cannot be had here: {error}")
    with RunningServer(
        (pair.teacher_path, pair.student_path),
        "--max-num-batched-tokens",
        "512",
        "--kv-cache-memory",
        "256MiB",
        "--served-model-name",
        DEFAULT,
        "--quantization",
        "none",
        *QUICK,
    ) as server:  # fmt: skip  beside codes activations are rounded
        compare(tasks, pair, server.url, DEFAULT, (22,), tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pair = make_pair(tmp_path_factory.mktemp("lm_eval"))
    with RunningServer(pair, *QUICK) as server:
        yield open_pair(*pair), server.url


@pytest.mark.parametrize("arguments", [{"batch_size": 3}, {"num_concurrent": 4}])
def test_batches_of_prompts_and_concurrent_requests(tiny, tasks, tmp_path, arguments):
    pair, url = tiny
    compare(tasks, pair, url, NAME, (5,), tmp_path, max_length=256, **arguments)


def test_local_chat_completions(tiny, tasks):
    _, url = tiny
    arguments = {"model": f"{NAME}:5L", "base_url": f"{url}/v1/chat/completions", "max_retries": 1}
    samples = evaluate(tasks, "local-chat-completions", arguments, ("continue",), apply_chat_template=True)
    assert len(samples["continue"]) == 8
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples["continue"])
