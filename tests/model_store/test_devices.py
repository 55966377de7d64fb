"""What distillation and evaluation compute stays on the device of the model, checked without a second device.

The model lies on "meta", where tensors have shapes but no values; as on a GPU, a tensor that was made in main memory
does not belong into a computation there.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.distill.order import greedy_order, kl_of_paths
from model_store.distill.warm_start import fit_by_least_squares
from model_store.distill.write import low_rank_factors
from model_store.evaluate.chat import transformers_generate
from model_store.evaluate.measure import score
from server.cli import main
from tests.tiny_pairs import make_model


class OneDevice(TorchFunctionMode):
    """Every operation's tensors lie on one device (numbers apart, as CUDA allows); values read off are made up."""

    values = {  # noqa: RUF012
        torch.Tensor.__float__: lambda tensor: 1.0, torch.Tensor.item: lambda tensor: 1.0,
        torch.Tensor.__bool__: lambda tensor: True, torch.Tensor.tolist: lambda tensor: [7] * len(tensor),
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.values:
            return self.values[func](*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        if len(devices) > 1:
            raise RuntimeError(f"{func.__name__} mixes {' and '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return ElasticModel(make_model("llama", 6, seed=1).to("meta"), Elasticity.last_to_first(6, [0, 2, 4])).to("meta")


def test_a_mixture_is_noticed(model):
    with OneDevice(), pytest.raises(RuntimeError, match="embedding mixes cpu and meta"):
        model.teacher_states(torch.zeros(1, 4, dtype=torch.long))


def test_evaluation_takes_ids_from_main_memory(model):
    ids = torch.arange(12)
    with OneDevice():
        assert score(model, [3, 6], [ids])[3].tokens == [11]
        answers = transformers_generate(model, {2})(4, [[5, 6, 7], [8]], 3)
    assert answers == [[7], [7]]  # made up, the end of the first token included


def test_order_fit_and_low_rank_factors(model):
    batches = [torch.zeros(2, 8, dtype=torch.long, device="meta")]
    difference, moment = torch.zeros(64, 96, device="meta"), torch.zeros(96, 96, device="meta")
    with OneDevice():
        assert sorted(greedy_order(model.elasticity, kl_of_paths(model, batches))) == [0, 1, 2]
        fit_by_least_squares(model, batches)
        for shape in (difference, difference.T):
            own = moment if shape.shape[1] == 96 else moment[:64, :64]
            a, b = low_rank_factors(shape, 4, own)
            assert (a.shape, b.shape) == ((4, shape.shape[1]), (shape.shape[0], 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has one")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("text")
    distill = ["distill", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path), "--device"]
    evaluate = ["evaluate", "--speed", "--device"]
    for command in ([*distill, "cuda"], [*evaluate, "cuda"], [*evaluate, "cuda:1"], [*evaluate, "gpu"]):
        assert main(command) == 1
        assert f"--device {command[-1]}: " in capsys.readouterr().err
