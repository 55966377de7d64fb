"""Sleep to the student: answers are the same before, asleep and after waking, whatever form the weights have, and a
running request keeps what it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from model_store import nested_store
from model_store.blocks import BlockReader, stages_above
from model_store.pair import Pair, open_pair
from model_store.weight_form import Storage, WeightForm
from server.core.request import LiveRequest, Order, Request, SamplingParams
from server.core.size_policy import RequestRefused
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.sleep import Sleeper, SleepState
from server.kernels.cpu import library
from tests.model.test_codes_pair import keep_codes
from tests.model.test_oracle import MIXED_THRESHOLDS, make_engine
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import VOCAB, make_model, make_pair

PROMPT = random.Random(0).choices(range(VOCAB), k=20)
ASLEEP, AWAKE, WAKING, FALLING = SleepState.ASLEEP, SleepState.AWAKE, SleepState.WAKING, SleepState.FALLING_ASLEEP


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sleep")


@pytest.fixture(scope="module")
def plain(folder) -> Pair:
    return open_pair(*make_pair(folder / "plain", "llama", tied=False))


@pytest.fixture(scope="module")
def coded(folder) -> Pair:
    """Codes of a file, and a student that is a difference to them: the default pair's form."""
    make_model("llama", 6, seed=1, tied=True).save_pretrained(folder / "coded/teacher")
    keep_codes(folder / "coded/teacher")
    write_student(folder / "coded/student", folder / "coded/teacher", quantise=True)
    return open_pair(folder / "coded/teacher", folder / "coded/student")


FORMS = {
    "float32": ("plain", WeightForm(torch.float32)),
    "bfloat16": ("plain", WeightForm()),
    "int8": ("plain", WeightForm(storage=Storage.INT8)),
    "nested": ("plain", WeightForm(storage=Storage.NESTED, bits=6)),
    "widths": ("plain", WeightForm(widths=(4, 5, 6, 8, 16))),
    "codes": ("coded", WeightForm(storage=Storage.CODES)),
    "codes, differences": ("coded", WeightForm(low_rank=True, storage=Storage.CODES)),
}


def sleepy(pair: Pair, executor: str, form: WeightForm, folder: Path, floor: int = 4, **more) -> Engine:
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    loaded, nested = pair.load(form), None
    if form.storage is Storage.NESTED or len(form.widths) > 1:
        nested = nested_store.nested_file(pair, folder)
        if not nested_store.is_current(nested):
            nested_store.write(pair.load(WeightForm(torch.float32)), nested)
        nested_store.put(loaded, nested, form)
    stages = stages_above(loaded, floor)
    engine = make_engine(pair, executor, loaded=loaded)
    reader = more.pop("reader", None) or BlockReader(pair, form, nested)
    engine.sleeper = Sleeper(engine.executor, engine.sizes, stages, reader, **more)
    return engine


def request(name: str, *sizes: int, prompt=PROMPT, tokens: int = 8, **more) -> LiveRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return LiveRequest(Request(name, list(prompt), sampling, sizes=sizes, **more))


def turn(engine: Engine) -> list:
    """What the engine's thread does once."""
    outputs = engine.tend()
    if engine.has_work:
        outputs += engine.step()
    engine.check_integrity()
    return outputs


def turn_until(engine: Engine, is_done, seconds: float = 30) -> list:
    outputs, deadline = [], time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline
        outputs += turn(engine)
        time.sleep(0 if engine.has_work else 0.001)
    return outputs


def answer(engine: Engine, *asked: LiveRequest) -> list[list[int]]:
    for one in asked:
        engine.add(one)
    turn_until(engine, lambda: all(one.is_finished for one in asked))
    return [list(one.output_token_ids) for one in asked]


def send_to_sleep(engine: Engine) -> None:
    engine.obey(Order.SLEEP)
    turn_until(engine, lambda: engine.sleeper.state is ASLEEP)


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("order", ["last_to_first", "mixed"])
def test_the_same_answers_before_asleep_and_after_waking(request_, name, order, executor, folder):
    kind, form = FORMS[name]
    pair = request_.getfixturevalue(kind)
    pair = open_pair(
        pair.teacher_path, pair.student_path, thresholds=MIXED_THRESHOLDS if order == "mixed" else None, store=folder
    )
    engine = sleepy(pair, executor, form, folder)
    awake = {size: answer(engine, request(f"awake-{size}", size))[0] for size in (4, 5, 6)}
    for round_ in range(2):
        send_to_sleep(engine)
        assert engine.sleeper.report.num_bytes > 0 and engine.sleeper.report.largest == 4
        small, auto = request(f"s{round_}", 4), request(f"a{round_}", 4, 5, 6)
        assert answer(engine, small, auto) == [awake[4]] * 2
        assert auto.decision.size == 4 and auto.decision.reason == "asleep"
        assert engine.sleeper.state is ASLEEP  # somebody said so: `auto` does not wake it
        big, beside = request(f"b{round_}", 6), request(f"c{round_}", 4, prompt=PROMPT[:7])
        engine.add(big)
        assert big in engine.scheduler.parked and engine.sleeper.state is WAKING and engine.stats().num_waiting == 1
        answer(engine, beside)
        turn_until(engine, lambda big=big: big.is_finished)
        assert big.output_token_ids == awake[6] and engine.sleeper.state is AWAKE
        assert engine.sleeper.report.num_bytes == 0 and engine.sleeper.report.num_wakes == round_ + 1
        again = [request(f"{round_}-{size}", size) for size in (6, 5, 4)]
        assert answer(engine, *again) == [awake[6], awake[5], awake[4]]
    engine.close()


@pytest.fixture
def request_(request):
    return request


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "qwen3"])
@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("tied", [False, True])
def test_ends_of_the_teacher_sleep_too(family, executor, tied, tmp_path):
    pair = open_pair(*make_pair(tmp_path, family, tied=tied), patch_order="last_to_first")
    engine = sleepy(pair, executor, WeightForm(torch.float32), tmp_path)
    parts = [part for stage in engine.sleeper.stages for part in stage.parts]
    assert parts.count("head") + parts.count("embed") == (1 if tied else 2) and len(parts) == len(set(parts))
    awake = {size: answer(engine, request(f"awake-{size}", size))[0] for size in (4, 5, 6)}
    send_to_sleep(engine)
    assert answer(engine, request("asleep", 4)) == [awake[4]]
    assert answer(engine, *[request(f"again-{size}", size) for size in (6, 5, 4)]) == [awake[6], awake[5], awake[4]]
    engine.close()


def test_prefixes_of_larger_sizes_stay(plain, folder):
    engine = sleepy(plain, "native", WeightForm(), folder)
    text = random.Random(1).choices(range(VOCAB), k=40)
    before = answer(engine, request("before", 6, prompt=text))
    send_to_sleep(engine)
    after = request("after", 6, prompt=text)
    assert answer(engine, after) == before and after.num_cached_tokens == 32
    engine.close()


def test_a_running_request_keeps_what_it_runs_on(plain, folder):
    engine = sleepy(plain, "native", WeightForm(), folder)
    expected = answer(engine, request("alone", 6, tokens=40))[0]
    running = request("running", 6, tokens=40)
    engine.add(running)
    for _ in range(5):
        turn(engine)
    engine.obey(Order.SLEEP)
    turn(engine)
    assert engine.sleeper.state is FALLING
    auto, pinned = request("auto", 4, 5, 6), request("pinned", 6)
    answer(engine, auto, pinned)  # the one is content with the student, for the other the blocks are still there
    assert auto.decision.size == 4 and pinned.decision.size == 6 and engine.sleeper.state is FALLING
    turn_until(engine, lambda: running.is_finished)
    assert running.output_token_ids == expected
    turn_until(engine, lambda: engine.sleeper.state is ASLEEP)
    engine.close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Paused:
    """A reader that waits for leave to read each part."""

    def __init__(self, reader: BlockReader) -> None:
        self.reader, self.leave, self.failure = reader, threading.Semaphore(0), None
        self.check, self.close = reader.check, reader.close

    def read(self, part):
        assert self.leave.acquire(timeout=30)
        if self.failure is not None:
            raise self.failure
        return self.reader.read(part)


def test_idle_seconds_put_it_to_sleep_and_auto_wakes_it_size_by_size(plain, folder):
    clock, paused = Clock(), Paused(BlockReader(plain, WeightForm()))
    engine = sleepy(plain, "native", WeightForm(), folder, after=10.0, clock=clock, reader=paused)
    awake = {size: answer(engine, request(f"awake-{size}", size))[0] for size in (4, 5, 6)}
    clock.now = 5.0
    answer(engine, request("again", 4))
    clock.now = 14.0
    turn(engine)
    assert engine.sleeper.state is AWAKE and engine.due_in() == 1.0
    clock.now = 15.0
    assert engine.due_in() == 0.0
    turn(engine)
    assert engine.sleeper.state is ASLEEP and engine.due_in() is None
    answer(engine, request("student", 4))
    assert engine.sleeper.state is ASLEEP  # nobody wanted more
    auto = request("auto", 4, 5, 6)
    assert answer(engine, auto) == [awake[4]] and engine.sleeper.state is WAKING
    first, second = engine.sleeper.stages
    for _ in first.parts:
        paused.leave.release()
    turn_until(engine, lambda: engine.sleeper.report.largest == 5)
    grown = request("grown", 4, 5, 6)
    assert answer(engine, grown) == [awake[5]] and grown.decision.reason == "asleep"
    assert engine.sleeper.state is WAKING
    for _ in second.parts:
        paused.leave.release()
    turn_until(engine, lambda: engine.sleeper.state is AWAKE)
    whole = request("whole", 4, 5, 6)
    assert answer(engine, whole) == [awake[6]] and whole.decision.reason == "requested"
    engine.close()


def test_limits_of_quality_are_kept(plain, folder):
    """Who allows nothing that is there waits: a floor of its own, a schedule."""
    engine = sleepy(plain, "native", WeightForm(), folder)
    expected = [answer(engine, request("a", 6))[0], answer(engine, request("b", 4, size_schedule=((4, 3), (6, 0))))[0]]
    send_to_sleep(engine)
    floor, planned = request("floor", 5, 6), request("planned", 4, size_schedule=((4, 3), (6, 0)))
    engine.add(floor)
    engine.add(planned)
    assert engine.scheduler.parked == {floor, planned}
    turn_until(engine, lambda: floor.is_finished and planned.is_finished)
    assert floor.decision.size in (5, 6) and planned.output_token_ids == expected[1]
    if floor.decision.size == 6:
        assert floor.output_token_ids == expected[0]
    engine.close()


def test_a_floor_of_the_server_stays_with_all_sizes_below(plain, folder):
    engine = sleepy(plain, "native", WeightForm(), folder, floor=5)
    awake = {size: answer(engine, request(f"awake-{size}", size))[0] for size in (4, 5, 6)}
    send_to_sleep(engine)
    assert answer(engine, request("4", 4), request("5", 5)) == [awake[4], awake[5]]
    assert engine.sleeper.state is ASLEEP and answer(engine, request("6", 6)) == [awake[6]]
    engine.close()


def test_who_leaves_while_it_wakes_is_forgotten(plain, folder):
    paused = Paused(BlockReader(plain, WeightForm()))
    engine = sleepy(plain, "native", WeightForm(), folder, reader=paused)
    send_to_sleep(engine)
    leaves, stays = request("leaves", 6), request("stays", 6)
    engine.add(leaves)
    engine.add(stays)
    with pytest.raises(ValueError, match="already in use"):
        engine.add(request("stays", 6))
    assert [output.finish_reason for output in engine.abort(["leaves"])] == ["abort"]
    engine.check_integrity()
    engine.obey(Order.SLEEP)  # while it wakes, for somebody who needs it: afterwards
    for stage in engine.sleeper.stages:
        for _ in stage.parts:
            paused.leave.release()
    turn_until(engine, lambda: stays.is_finished)
    turn_until(engine, lambda: engine.sleeper.state is ASLEEP)
    assert engine.sleeper.report.num_wakes == 1 and engine.sleeper.report.num_sleeps == 2
    engine.close()


def test_a_wake_that_fails_costs_who_waited_for_it_and_nobody_else(plain, folder):
    clock, paused = Clock(), Paused(BlockReader(plain, WeightForm()))
    engine = sleepy(plain, "native", WeightForm(), folder, clock=clock, reader=paused)
    awake = answer(engine, request("awake", 6))
    send_to_sleep(engine)
    released = engine.sleeper.report.num_bytes
    paused.failure = OSError(5, "Input/output error")
    big, small = request("big", 6), request("small", 4)
    engine.add(big)
    engine.add(small)
    paused.leave.release()
    outputs = turn_until(engine, lambda: big.is_finished and small.is_finished)
    [refused] = [output for output in outputs if output.request_id == "big"]
    assert refused.error_status == 503 and "Input/output error" in refused.error and refused.retry_after
    assert len(small.output_token_ids) == 8
    turn_until(engine, lambda: engine.sleeper.state is ASLEEP)
    assert engine.sleeper.report.num_failures == 1 and engine.sleeper.report.num_bytes == released
    with pytest.raises(RequestRefused, match="Input/output error") as refusal:  # not again at once
        engine.add(request("soon", 6))
    assert refusal.value.refusal.status == 503
    paused.failure = None
    for stage in engine.sleeper.stages:
        for _ in stage.parts:
            paused.leave.release()
    clock.now += 11
    assert answer(engine, request("later", 6)) == awake and engine.sleeper.report.failure is None
    engine.close()


def test_other_files_or_too_little_memory_are_noticed_before_anything_is_read(tmp_path):
    pair = open_pair(*make_pair(tmp_path))
    there = [1 << 40]
    engine = sleepy(pair, "torch", WeightForm(torch.float32), tmp_path, memory=lambda: there[0])
    for change, words in ((lambda: there.insert(0, 1000), "MiB are available"), (None, "have changed since")):
        send_to_sleep(engine)
        if change is None:
            there[:] = [1 << 40]
            make_model("llama", 6, seed=3, tied=True).save_pretrained(tmp_path / "teacher")
            change = lambda: None  # noqa: E731
        change()
        engine.obey(Order.WAKE)
        turn_until(engine, lambda: engine.sleeper.state is ASLEEP)
        assert words in engine.sleeper.report.failure
        assert len(answer(engine, request(words, 4))[0]) == 8
    engine.close()


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_under_load_with_orders_at_random(plain, folder, executor):
    """Requests of every kind, some of which leave, while it falls asleep and wakes up all the time."""
    engine = sleepy(plain, executor, WeightForm(torch.float32), folder, after=0.02)
    rng = random.Random(2)
    prompts = [rng.choices(range(VOCAB), k=rng.choice([1, 7, 20, 40])) for _ in range(5)]
    expected = {
        (i, size): answer(engine, request(f"{i}-{size}", size, prompt=prompt, tokens=12))[0]
        for i, prompt in enumerate(prompts)
        for size in (4, 5, 6)
    }

    async def talk() -> None:
        front = AsyncEngine(engine)
        await front.start()

        async def ask(number: int) -> None:
            await asyncio.sleep(rng.random() * 0.02)
            i, sizes = rng.randrange(len(prompts)), rng.choice([(4,), (6,), (4, 5, 6), (5, 6), (5,)])
            sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            stream = front.submit(Request(f"r{number}", prompts[i], sampling, sizes=sizes))
            heard, size = [], None
            async for output in stream:
                assert output.error is None, output.error
                size = output.decision.size if output.decision else size
                heard += output.new_token_ids
                if number % 9 == 0:
                    await stream.aclose()
                    return
            assert size in sizes and heard == expected[i, size]

        async def order() -> None:
            while True:
                await asyncio.sleep(rng.random() * 0.1)
                rng.choice([front.sleep, front.wake])()

        ordering = asyncio.ensure_future(order())
        try:
            for wave in range(20):
                numbers = range(wave * 6, wave * 6 + rng.randint(1, 6))
                await asyncio.wait_for(asyncio.gather(*map(ask, numbers)), 30)
                await asyncio.sleep(rng.random() * 0.1)
        finally:
            ordering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ordering
            await front.stop()

    asyncio.run(talk())
    assert engine.sleeper.report.num_wakes > 3 and not engine.scheduler.parked
    engine.check_integrity()
