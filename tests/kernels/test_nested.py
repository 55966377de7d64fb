"""Nested codes: the native kernels give what the torch executor gives at every width, from one copy."""

import dataclasses

import numpy as np
import pytest
import torch

from model_store.arrays import address
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, nest
from model_store.weights import MATRICES
from server.kernels.cpu.build import VARIANTS
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import FAMILIES, PAGE, assert_same_logits, make_pair, make_steps
from tests.kernels.test_codes import EXACT, ROUNDED, SHAPE, STEPS, assert_same_products, densified, native_of


def nested(pair: LoadedPair, width: int) -> LoadedPair:
    """The pair with its matrices in nested codes, read at `width` bits; shared ones stay shared."""
    done: dict[int, NestedMatrix] = {}

    def coded(matrix: np.ndarray) -> NestedMatrix:
        return done.setdefault(address(matrix), nest(matrix).at(width))

    for layer in pair.layers.values():
        for name in MATRICES:
            setattr(layer, name, coded(getattr(layer, name)))
    for end in {id(end): end for end in pair.ends.values()}.values():
        end.embed = end.head = coded(end.head)
    return pair


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_at_every_width_and_number_of_rows(variant, width, monkeypatch):
    """Rounded activations times codes are those of the portable executor; a row's sums do not depend on its company."""
    pair = nested(make_pair("llama", torch.float32, **SHAPE), width)
    head = dataclasses.replace(pair.ends["teacher"].head)  # packing changes the matrix
    native = native_of(pair, variant, monkeypatch)
    assert_same_products(native, head)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_steps_of_every_family(family, width, exact, monkeypatch):
    """Embedding, layers and head: rounded activations against rounded ones, floats against the dequantised model."""
    make = lambda: nested(make_pair(family, torch.float32, **SHAPE), width)  # noqa: E731
    native = native_of(make(), "", monkeypatch, exact_activations=exact)
    pair = make()
    portable = TorchExecutor(densified(pair) if exact else pair, page_size=PAGE)
    assert_same_logits(native, portable, make_steps(pair.elasticity, STEPS), EXACT if exact else ROUNDED)
