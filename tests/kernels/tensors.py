"""What the tests of single CUDA kernels share: tensors where the kernels run, and the comparison."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_LIMIT = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def randn(*shape, dtype=torch.float32, around=0.0):
    return (around + torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(DEVICE, dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(got, expected, dtype):
    scale = expected.float().abs().max()
    assert (got.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * scale
