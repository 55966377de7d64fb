"""Grammars whose masks take long hold back each other, and nobody else."""

import time
from collections import Counter

import numpy as np
import pytest

from server.engine.extras import grammar
from server.engine.extras.grammar import GrammarCompiler, fill_masks
from tests.api.tiny import VOCAB, make_tokenizer
from tests.engine.harness import make_request, make_scheduler, run_step


class Slow:
    """A grammar whose masks take longer than a step may spend on all of them."""

    error = None
    is_ready = True
    filled_at = 0.0

    def bitmask(self) -> np.ndarray:
        if not self.is_ready:
            time.sleep(0.004)
        self.is_ready, self.filled_at = True, time.monotonic()
        return np.full(2, -1, np.int32)

    def is_terminated(self) -> bool:
        return False


def test_who_waits_for_a_mask_waits_in_turn_and_alone():
    scheduler = make_scheduler()
    slow = [make_request(4, sampling={"max_tokens": 30}, grammar=Slow()) for _ in range(4)]
    plain = make_request(4, sampling={"max_tokens": 30})
    for request in [*slow, plain]:
        scheduler.add(request)
    for number in range(1, 26):
        planned = run_step(scheduler)
        advanced = [request for request, _ in planned.scheduled]
        assert plain in advanced
        assert len(advanced) == (5 if number == 1 else 2), "all have their first mask, then there is time for one"
        for request in advanced:
            if request.grammar is not None:
                request.grammar.is_ready = False  # as the runner does when it tells of the token
    assert [len(request.output_token_ids) for request in slow] == [7] * 4
    assert len(plain.output_token_ids) == 25


@pytest.mark.parametrize("num_threads", [1, 2])
def test_masks_filled_together_are_those_filled_alone(tmp_path, num_threads):
    tokenizer = make_tokenizer(tmp_path)
    compiler = GrammarCompiler(tokenizer.to_str(), VOCAB, frozenset([2]))
    sources = ['start: /[a-c]+/ "x"', 'start: "yes" | "no"', "start: /(.*a){9}/", 'start: "a"']
    ours = [compiler.compile(source).copy() for source in sources for _ in range(3)]
    alone = [compiler.compile(source).copy() for source in sources for _ in range(3)]
    for _ in range(4):
        fill_masks([one for one in ours if not one.is_ready], num_threads)
        for one, other in zip(ours, alone, strict=True):
            assert one.is_ready
            np.testing.assert_array_equal(one.bitmask(), other.bitmask())
            allowed = np.flatnonzero(np.unpackbits(one.bitmask().view(np.uint8), bitorder="little"))
            token = int(allowed[len(allowed) // 2])
            assert one.accept(token) == other.accept(token)
            assert one.is_terminated() == other.is_terminated()
    assert Counter(one.error for one in ours) == Counter(one.error for one in alone)


def test_a_parser_that_panics_among_others_fails_alone(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path)
    first = GrammarCompiler(tokenizer.to_str(), VOCAB, frozenset([2])).compile("start: /[a-c]+/")
    fine, broken = first.copy(), first.copy()

    class Panic(BaseException):
        pass

    class Broken:
        is_error = staticmethod(lambda: False)

        def unsafe_compute_mask_ptr(self, *_):
            raise Panic("at the worst of times")

    broken._matcher = Broken()

    def threads(number):
        raise Panic("for all of them")

    monkeypatch.setattr(grammar, "_threads", threads)
    fine.is_ready = broken.is_ready = False
    fill_masks([fine, broken], 2)
    assert fine.error is None and "worst of times" in broken.error
    np.testing.assert_array_equal(fine.bitmask(), first.bitmask())
    np.testing.assert_array_equal(np.unpackbits(broken.bitmask().view(np.uint8), bitorder="little").nonzero(), [[2]])
