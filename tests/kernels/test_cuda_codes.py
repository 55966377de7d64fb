"""Weights in codes on the device: planes hold the file's values, and the kernels for them give what these give."""

import numpy as np
import pytest
import torch

from model_store.arrays import FLOAT32
from model_store.nested import WIDTHS, nest
from model_store.quantized import BLOCK_TYPES, CodedMatrix, CodedRows, stacked
from model_store.weight_form import Storage
from server.kernels.cuda import coded_linear as coded_linear_module
from server.kernels.cuda.coded_linear import Tiles, coded_linear, coded_rows
from server.kernels.cuda.codes import FORMS, DeviceCodes, DeviceNested
from tests.kernels.steps import make_pair
from tests.kernels.tensors import DEVICE, assert_close, randn
from tests.kernels.test_codes import SHAPE, all_of, in_codes
from tests.model_store.test_quantized import random_matrix

ROWS = (1, 3, 16, 17, 64)


def dense(matrix: CodedMatrix) -> torch.Tensor:
    return torch.from_numpy(matrix.dense(FLOAT32)).to(DEVICE)


def test_every_type_of_a_file_has_a_form():
    assert FORMS.keys() == BLOCK_TYPES.keys()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_products_of_every_type_and_number_of_rows(name):
    """Three turns of a program, the last not full where it can be; 150 outputs are two programs, the second nearly
    empty."""
    matrix = random_matrix(name, 150, 768 if name.endswith("K") else 544)
    weight, codes = dense(matrix), DeviceCodes.of(matrix, DEVICE)
    assert codes.shape == matrix.shape and matrix.nbytes <= codes.nbytes <= 1.03 * matrix.nbytes
    for num_rows in ROWS:
        x, out = randn(num_rows, matrix.shape[1]), torch.empty(num_rows, 150, device=DEVICE)
        coded_linear(x, codes, out)
        assert_close(out, x @ weight.t(), torch.float32)


def test_products_at_every_width_from_one_copy():
    matrix = nest(randn(70, 352).cpu().numpy())
    nested = DeviceNested.of(matrix, DEVICE)
    assert nested.nbytes == matrix.nbytes and nested.shape == matrix.shape
    for width in WIDTHS:
        weight, codes = torch.from_numpy(matrix.at(width).dense(FLOAT32)).to(DEVICE), nested.at(width)
        for num_rows in (1, 3, 17):
            x, out = randn(num_rows, 352), torch.empty(num_rows, 70, device=DEVICE)
            coded_linear(x, codes, out)
            assert_close(out, x @ weight.t(), torch.float32)


@pytest.mark.parametrize("num_rows", [2, 19])
def test_mixed_types_bias_and_sum_in_half_precision(num_rows):
    """Tensors of a file in one matrix, each its own run of outputs; x is a part of wider rows."""
    matrix = stacked([random_matrix(name, n, 256, n) for name, n in (("Q4_K", 40), ("Q4_K", 9), ("Q6_K", 20))])
    codes = DeviceCodes.of(matrix, DEVICE)
    assert [run.shape[0] for run in codes.parts] == [49, 20]
    x, bias = randn(num_rows, 300, dtype=torch.float16)[:, :256], randn(69, dtype=torch.float16)
    out = randn(num_rows, 69, dtype=torch.float16)
    expected = out.float() + x.float() @ dense(matrix).t() + bias
    coded_linear(x, codes, out, bias=bias, add=True)
    assert_close(out, expected, torch.float16)
    coded_linear(x[:0], codes, out[:0])


@pytest.mark.parametrize("num_rows", [1, 19])
def test_few_outputs_split_the_inputs(num_rows):
    """Interpreted, seven turns of a program in two shares, of four and three."""
    matrix = stacked([random_matrix("Q5_1", 20, 1600), random_matrix("Q8_0", 9, 1600)])
    tiles = Tiles.of(num_rows, 4, 9)
    assert tiles.splits(num_rows, 20, 1600, 2) > 1
    assert tiles.splits(300, 20, 1600, 132) == 1 and tiles.splits(num_rows, 10**6, 1600, 132) == 1
    x, bias, out = randn(num_rows, 1600), randn(29), randn(num_rows, 29)
    expected = out + x @ dense(matrix).t() + bias
    coded_linear(x, DeviceCodes.of(matrix, DEVICE), out, bias=bias, add=True)
    assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("add", [False, True])
def test_many_rows_are_multiplied_with_widened_parts(add, monkeypatch):
    """Parts of 20 outputs of the first run, 20 and 9 of the second."""
    monkeypatch.setattr(coded_linear_module, "WIDENED", 20 * 96)
    matrix = stacked([random_matrix("Q4_0", 20, 96), random_matrix("Q5_0", 29, 96)])
    x, bias, out = randn(300, 96), randn(49), randn(300, 49)
    expected = x @ dense(matrix).t() + bias + (out if add else 0)
    coded_linear(x, DeviceCodes.of(matrix, DEVICE), out, bias=bias, add=add)
    assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_of_an_embedding_are_those_of_the_file(name):
    matrix = random_matrix(name, 40, 1280)
    ids = np.array([3, 39, 3, 0, 17])
    out = torch.empty(5, 1280, device=DEVICE)
    coded_rows(torch.from_numpy(ids).to(DEVICE, torch.int32), DeviceCodes.of(matrix, DEVICE), out)
    np.testing.assert_allclose(out.cpu().numpy(), matrix.rows(ids), rtol=1e-6, atol=1e-8)


def test_an_executor_without_kernels_gets_plain_matrices():
    """Codes that lie on a device, as `Pair.load` leaves them there."""
    pair = in_codes(make_pair("llama", torch.bfloat16, **SHAPE), all_of("Q5_K")).in_torch("cpu:0")
    head, num_bytes = pair.ends["teacher"].head, pair.num_bytes()
    assert all(isinstance(part.blocks, torch.Tensor) for part in head.parts) and pair.form.storage is Storage.CODES
    blocks = head.parts[0].blocks.numpy()
    pair.widen_codes()
    assert pair.form.storage is Storage.AS_LOADED and pair.num_bytes() > 2.8 * num_bytes
    end = pair.ends["teacher"]
    assert end.embed is end.head and end.head.dtype == torch.bfloat16
    expected = CodedRows(blocks, BLOCK_TYPES["Q5_K"]).groups().dense()
    assert torch.equal(end.head, torch.from_numpy(expected).to(torch.bfloat16))
