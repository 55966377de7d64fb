"""Calibration must fit whatever engine it runs on: a server that takes one request at a time starts as well."""

from __future__ import annotations

import itertools

from server.cost.calibrate import plan


def test_no_step_needs_more_places_or_tokens_than_the_engine_has():
    for places, tokens, length in itertools.product((1, 2, 3, 5, 8, 200), (16, 64, 2048), (128, 8192)):
        for step in plan(places, tokens, length):
            assert sum(count for count, *_ in step) <= places, (places, step)
            for _, chunk, context, _ in step:
                assert chunk >= 1 and chunk + context <= length, (length, step)
