"""Penalties and log-probabilities of a mixed batch, done together, against each row by itself in the plainest way."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_store.arrays import Array
from server.core.request import LiveRequest, Request, SamplingParams, TokenLogprobs
from server.core.seen_tokens import SeenTokens
from server.engine import host_logits
from server.engine.host_logits import HostLogits
from server.engine.prompt_scores import PromptScores
from server.engine.sampler import Sampler
from server.kernels.cuda.logits import DeviceLogits

VOCAB = 331
KINDS = [HostLogits, DeviceLogits]


def given(kind: type, logits: torch.Tensor) -> Array:
    """A copy of the logits as they come to operations of this kind."""
    return logits.clone().numpy() if kind is HostLogits else logits.clone()


def make_sampler(kind: type, **more) -> Sampler:
    """Draws in numpy, whatever works on the logits."""
    more.setdefault("draw", lambda logits, draws: host_logits.draw(np.asarray(logits), draws))
    return Sampler(ops=kind(), **more)


class Operations(TorchDispatchMode):
    """Notes the torch operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


class Mask:
    """A grammar that allows every third token."""

    def bitmask(self) -> np.ndarray:
        bits = np.zeros((VOCAB + 31) // 32 * 32, np.uint8)
        bits[::3] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def processed(row: torch.Tensor, request: LiveRequest) -> torch.Tensor:
    """One row [V] as the request wants it."""
    row, sampling, output = row.clone(), request.sampling, request.output_token_ids
    for token in range(VOCAB):
        if request.grammar is not None and token % 3:
            row[token] = -torch.inf
        if sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids:
            row[token] = -torch.inf
    for *prefix, last in sampling.bad_words_ids:
        if not prefix or output[-len(prefix) :] == prefix:
            row[last] = -torch.inf
    if len(output) < sampling.min_tokens:
        row[list(sampling.stop_token_ids | sampling.eos_token_ids)] = -torch.inf
    for token, bias in (sampling.logit_bias or {}).items():
        row[token] += bias
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*request.prompt_token_ids, *output}), dtype=torch.long)
        values, factor = row[seen], sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens = sorted(set(output))
        counts = torch.tensor([output.count(token) for token in tokens], dtype=torch.float32)
        row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return row


def scores(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Of one row of raw logits [V]."""
    row = torch.log_softmax(logits.double(), dim=-1)
    values, ids = row.sort(descending=True, stable=True)
    top = list(zip(ids.tolist(), values.tolist(), strict=True))[: VOCAB if num_top < 0 else num_top]
    return TokenLogprobs(token, row[token].item(), int((row > row[token]).sum()) + 1, tuple(top))


def assert_same(found: TokenLogprobs | None, logits: torch.Tensor, token: int, num_top: int | None) -> None:
    """Which of equal entries come first is left open."""
    if num_top is None:
        assert found is None
        return
    expected = scores(logits, token, num_top)
    assert found is not None and (found.token_id, found.rank) == (token, expected.rank)
    measured, right = ([one.logprob, *(value for _, value in one.top)] for one in (found, expected))
    assert measured == pytest.approx(right, rel=1e-6, abs=2e-6)
    measured, right = ([float(logits[i]) for i, _ in one.top] for one in (found, expected))
    assert measured == pytest.approx(right, rel=1e-6, abs=2e-6)
    assert len({i for i, _ in found.top}) == len(expected.top)


def make_logits(num_rows: int, rng: random.Random) -> torch.Tensor:
    """Half of the rows as coarse as bfloat16, so that many entries are equal."""
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(1 << 30))) * 4
    logits[::2] = logits[::2].bfloat16().float()
    return logits


def make_request(name: str, rng: random.Random, **always) -> LiveRequest:
    def maybe(value, otherwise):
        return value if rng.random() < 0.4 else otherwise

    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 200]))]
    ends = frozenset(rng.sample(range(VOCAB), 2))
    sampling = {
        "temperature": rng.choice([0.0, 0.7, 1.0]), "seed": rng.randrange(100), "top_k": maybe(20, 0),
        "repetition_penalty": maybe(rng.choice([1.1, 1.3, 0.7]), 1.0), "presence_penalty": maybe(0.3, 0.0),
        "frequency_penalty": maybe(rng.choice([0.1, -0.7]), 0.0), "min_tokens": maybe(4, 0), "eos_token_ids": ends,
        "logit_bias": maybe({rng.randrange(VOCAB): 1.5, prompt[0]: -3.3}, None),
        "bad_words_ids": maybe(((prompt[0],), (prompt[-1], 7), (8, 9)), ()),
        "allowed_token_ids": maybe(tuple(rng.sample(range(VOCAB), 150)), None),
        "logprobs": rng.choice([None, None, 0, 1, 3, 3, 20, -1]),
    }  # fmt: skip
    asked = Request(name, prompt, SamplingParams(**(sampling | always)), sizes=(4,), grammar=maybe(Mask(), None))
    request = LiveRequest(asked)
    request.output_token_ids = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 1, 40]))]
    if request.output_token_ids and rng.random() < 0.5:
        request.output_token_ids[-1] = prompt[-1]  # in prompt and answer; and it completes a bad word
    return request


@pytest.mark.parametrize("num_rows", [1, 7, 33])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_mixed_batch(kind, num_rows, seed):
    """Several steps: requests come and go, change rows and grow, also by more than one token at once."""
    rng = random.Random(1000 * seed + num_rows)
    requests = [make_request(f"r{i}", rng) for i in range(num_rows)]
    sampler = make_sampler(kind, seed=seed)
    for step in range(5):
        raw = make_logits(num_rows, rng)
        expected = torch.stack([processed(row, request) for row, request in zip(raw, requests, strict=True)])
        logits = given(kind, raw)
        tokens = sampler.sample(logits, requests)
        assert torch.equal(torch.as_tensor(logits), expected)
        for row, (token, request) in enumerate(zip(tokens, requests, strict=True)):
            if request.sampling.is_greedy:
                assert token.token_id == int(expected[row].argmax())
            assert_same(token.logprobs, raw[row], token.token_id, request.sampling.logprobs)
            request.output_token_ids += [token.token_id, *rng.choices(range(VOCAB), k=rng.choice([0, 0, 2]))]
        rng.shuffle(requests)
        requests[rng.randrange(num_rows)] = make_request(f"n{step}", rng)


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"presence_penalty": 0.3}, {"frequency_penalty": 0.7}], ids=str
)
@pytest.mark.parametrize("output", [[], [5, 5, 9]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_penalty_by_itself(kind, penalty, output):
    request = LiveRequest(Request("r", [5, 1, 2, 1], SamplingParams(temperature=0, **penalty), sizes=(4,)))
    request.output_token_ids = output
    raw = make_logits(1, random.Random(0))
    raw[0, [1, 9]] = torch.tensor([torch.inf, -torch.inf])
    logits = given(kind, raw)
    make_sampler(kind).sample(logits, [request])
    assert torch.equal(torch.as_tensor(logits[0]), processed(raw[0], request))


@pytest.mark.parametrize("kind", KINDS)
def test_a_guess_repeats_its_request_in_the_batch(kind):
    """Rows of one request: each is penalised once."""
    rng = random.Random(3)
    request = make_request("r", rng, repetition_penalty=1.2, frequency_penalty=0.4, logprobs=2)
    raw = make_logits(3, rng)
    logits = given(kind, raw)
    tokens = make_sampler(kind).sample(logits, [request] * 3)
    for row in range(3):
        assert torch.equal(torch.as_tensor(logits[row]), processed(raw[row], request))
        assert_same(tokens[row].logprobs, raw[row], tokens[row].token_id, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_more_rows_than_fit_at_once(kind):
    """A device takes 128 at once."""
    rng = random.Random(5)
    requests = [make_request(f"r{i}", rng, logprobs=rng.choice([0, 2, 5, -1])) for i in range(300)]
    raw = make_logits(300, rng)
    raw[7] = torch.nan
    tokens = make_sampler(kind).sample(given(kind, raw), requests)
    for row, (token, request) in enumerate(zip(tokens, requests, strict=True)):
        if row != 7:
            assert_same(token.logprobs, raw[row], token.token_id, request.sampling.logprobs)
    assert np.isnan(tokens[7].logprobs.logprob) and tokens[7].logprobs.rank == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_finite_logit_has_logprobs_all_the_same(kind):
    """A device's own draw answers -1; the engine then finds the request at fault, and nobody else."""
    raw = make_logits(2, random.Random(8))
    raw[1] = torch.nan
    requests = [make_request(f"r{i}", random.Random(i), logprobs=2) for i in range(2)]
    good, bad = make_sampler(kind, draw=lambda logits, draws: [4, -1]).sample(given(kind, raw), requests)
    assert_same(good.logprobs, raw[0], 4, 2)
    assert bad.logprobs.token_id == -1 and np.isnan(bad.logprobs.logprob) and bad.logprobs.rank == 1


@pytest.mark.parametrize("wanted", [0, 1, 5, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_scores(kind, wanted):
    """Prompts in pieces, longer than what goes through the head at once, beside requests that want none or others."""
    rng = random.Random(wanted)
    lengths, pieces = [300, 40, 1, 150], ([200, 20, 1, 149], [100, 20, 0, 1])
    numbers = [wanted, None, wanted, 3]
    requests = [
        LiveRequest(Request(f"r{i}", rng.choices(range(VOCAB), k=n), SamplingParams(prompt_logprobs=k), sizes=(4,)))
        for i, (n, k) in enumerate(zip(lengths, numbers, strict=True))
    ]
    logits = {request.request_id: make_logits(request.num_prompt_tokens, rng) for request in requests}
    logits["r3"][60] = torch.nan
    executor, found, faulty = SimpleNamespace(logits=lambda hidden, num_teacher, widths: hidden), PromptScores(), []
    for counts in pieces:
        starts = [request.num_computed_tokens for request in requests]
        rows = [logits[r.request_id][s : s + n] for r, s, n in zip(requests, starts, counts, strict=True)]
        batch = SimpleNamespace(
            requests=requests, logits_start=np.cumsum([0, *counts]), context_lens=np.add(starts, counts)
        )
        faulty += found.score(executor, kind(), batch, given(kind, torch.cat(rows)), 0)
        for request, count in zip(requests, counts, strict=True):
            request.num_computed_tokens += count
    assert faulty == [requests[3]]
    assert found._scores.keys() == {"r0", "r3"}
    for name, number in (("r0", wanted), ("r3", 3)):
        request = requests[int(name[1])]
        first, *others = found._scores[name]
        assert first is None and len(others) == request.num_prompt_tokens - 1
        for i, score in enumerate(others):
            if name == "r0" or i != 60:
                assert_same(score, logits[name][i], request.prompt_token_ids[i + 1], number)


def test_operations_do_not_grow_with_the_rows():
    """Each would be a launch on a device; and none but the scores' one copy back makes the host wait there."""
    names, device = [], DeviceLogits()
    for num_rows in (2, 40):
        rng = random.Random(num_rows)
        requests = [make_request(f"r{i}", rng, repetition_penalty=1.2, presence_penalty=0.1) for i in range(num_rows)]
        for request in requests:
            request.output_token_ids = rng.choices(range(VOCAB), k=5)
        rows = [(i, request, SeenTokens()) for i, request in enumerate(requests)]
        device.penalise(make_logits(num_rows, rng), rows)  # the first time brings each prompt to the device
        with Operations() as penalties:
            device.penalise(make_logits(num_rows, rng), rows)
        with Operations() as scored:
            device.token_logprobs(make_logits(num_rows, rng), [1] * num_rows, [0] + [5] * (num_rows - 1))
        names.append((penalties.names, scored.names))
    assert names[0] == names[1]
    assert not {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim"} & {*penalties.names, *scored.names}
