"""A tiny random pair with a real tokenizer and chat template, and a real server process that serves it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from model_store.pair import open_pair

ROOT = Path(__file__).parents[2]
VOCAB = 400
KEPT = (0, 2, 4, 5)
NUM_LAYERS = 6
SIZES = (4, 5, 6)
MAX_LEN = 256
NAME = "tiny"

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog. ",
    "A server that holds a teacher and a student serves every size in between. ",
    "Grüße aus Köln, 世界 and 🌍! ",
    '{"name": "value", "number": 123, "list": [1, 2, 3]} ',
] * 8


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer of `VOCAB` - 3 entries (a model's embedding is often larger than its vocabulary)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def make_model(num_layers: int, seed: int, max_len: int = MAX_LEN) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_len,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def make_pair(folder: Path, max_len: int = MAX_LEN) -> tuple[Path, Path]:
    """Teacher and student folders."""
    teacher, student = folder / NAME, folder / "student"
    make_model(NUM_LAYERS, 1, max_len).save_pretrained(teacher)
    make_model(len(KEPT), 2, max_len).save_pretrained(student)
    make_tokenizer(teacher)
    pruned = [layer for layer in range(NUM_LAYERS) if layer not in KEPT]
    config = {"copied_teacher_layers": list(KEPT), "pruned_teacher_layers": pruned}
    (student / "student_config.json").write_text(json.dumps(config))
    return noted(teacher, student)


def noted(teacher: Path, student: Path | None, store: Path | None = None) -> tuple[Path, Path | None]:
    """The folders, opened once: what that asks of transformers is kept in the store, and servers need not import it."""
    open_pair(teacher, student or "none", store=store)
    return teacher, student


# A server that imports no torch starts in a third of the time, and its steps are shorter than clients can read.
QUICK = ("--executor", "auto")


class RunningServer:
    """`python -m server serve` in a process of its own, on a port of the system's choice."""

    def __init__(
        self,
        pair: tuple[Path, Path | None],
        *flags: str,
        env: dict[str, str] | None = None,
        module: str = "server",
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        base: Sequence[str] = (
            *("--teacher", str(pair[0]), *([] if pair[1] is None else ["--student", str(pair[1])])),
            *("--host", "127.0.0.1", "--port", "0"),
            *("--dtype", "float32", "--executor", "torch", "--kv-cache-memory", "16MiB", "--page-size", "8"),
            *("--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--device", "cpu", "--num-threads", "1"),
            *("--served-model-name", NAME, "--size-policy", "largest"),
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BOOMERANG_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *base, *flags],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"} | (env or {}),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        self.log: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"listening on (\S+)", line):
                self.url = match[1].rstrip('",}')
                self._listening.set()
        self._listening.set()

    def wait_listening(self) -> None:
        assert self._listening.wait(60) and self.url, "".join(self.log)

    def wait_ready(self, timeout: float = 90) -> None:
        self.wait_listening()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "".join(self.log)
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("the server did not become ready\n" + "".join(self.log))

    def stop(self, timeout: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not stop\n" + "".join(self.log)) from None

    def __enter__(self) -> RunningServer:
        try:
            self.wait_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
