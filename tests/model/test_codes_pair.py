"""A pair whose teacher lies in a file's codes: what is loaded by default, what it weighs, and what it answers."""

import dataclasses
import random
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.pair import Pair, open_pair
from model_store.quantized import CODES_FILE
from model_store.weight_form import Storage, WeightForm
from server.config import Settings
from server.forms import weight_form
from server.kernels.cpu import library
from tests.model.test_oracle import all_logprobs, make_engine, make_request, run
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import VOCAB, make_model

KINDS = {"embed_tokens": "Q8_0", "v_proj": "Q5_1", "o_proj": "Q5_0", "down_proj": "Q4_0"}  # others Q4_1


def keep_codes(folder) -> None:
    """What the import of a GGUF file writes: blocks, and the checkpoint dequantised."""
    blocks, kinds, tensors = {}, {}, load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() != 2:
            continue
        kinds[name] = KINDS.get(name.split(".")[-2], "Q4_1")
        kind = gguf.GGMLQuantizationType[kinds[name]]
        blocks[name] = torch.from_numpy(gguf.quantize(value.float().numpy(), kind))
        tensors[name] = torch.from_numpy(gguf.dequantize(blocks[name].numpy(), kind))
    save_file(blocks, folder / CODES_FILE, kinds)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def pair(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("codes")
    make_model(request.param, 6, seed=1, tied=True).save_pretrained(folder / "teacher")
    keep_codes(folder / "teacher")
    write_student(folder / "student", folder / "teacher", quantise=True)
    return open_pair(folder / "teacher", folder / "student")


def test_codes_are_the_default_where_a_kernel_reads_them(pair):
    assert weight_form(Settings(device="cpu"), pair) == WeightForm(storage=Storage.CODES)
    assert weight_form(Settings(device="cpu", low_rank="on"), pair) == WeightForm(low_rank=True, storage=Storage.CODES)
    assert weight_form(Settings(device="cpu", quantization="none"), pair) == WeightForm()
    assert weight_form(Settings(device="cpu", quantization="int8"), pair) == WeightForm(storage=Storage.INT8)
    assert weight_form(Settings(device="cuda"), pair) == WeightForm(storage=Storage.CODES)
    assert weight_form(Settings(device="cuda", executor="torch"), pair) == WeightForm()
    assert pair.code_kinds() == "qkv: Q4_1 + Q5_1; o: Q5_0; up: Q4_1; down: Q4_0; embedding, head: Q8_0"


@pytest.mark.parametrize("low_rank", [False, True])
def test_bytes_are_what_the_tables_say(pair, low_rank):
    form = WeightForm(low_rank=low_rank, storage=Storage.CODES)
    for count in (1, 2, 3):
        need = pair.union_bytes(pair.elasticity.sizes[:count], form)
        loaded = pair.load(form, memory_budget=need)
        assert loaded.sizes == pair.elasticity.sizes[:count] and loaded.num_bytes() == need
    assert pair.load(form).form == form
    plain = WeightForm(low_rank=low_rank)
    assert need < 0.5 * pair.union_bytes(pair.elasticity.sizes[:3], plain)


def test_an_expanded_student_is_kept_in_the_store(pair, tmp_path, caplog):
    """Made once; anew if what lies there is damaged or of another pair; where nothing can be written, every time."""
    form, stored = WeightForm(storage=Storage.CODES), dataclasses.replace(pair, store=tmp_path)
    matrices = lambda loaded: [  # noqa: E731
        getattr(loaded.layers[layer], name).dense(np.dtype(np.float32))
        for layer in sorted(loaded.layers) if layer >= pair.spec.num_layers
        for name in ("qkv_weight", "o_weight", "up_weight", "down_weight")
    ]  # fmt: skip
    first = matrices(stored.load(form))
    files = sorted((tmp_path / "expanded").rglob("*.safetensors"))
    own = [i for i in range(len(pair.elasticity.kept)) if pair.low_rank_student.has_own_layer(i)]
    assert len(files) == len(own) and not list(tmp_path.rglob("*.partial"))
    stamps = [file.stat().st_mtime_ns for file in files]
    loaded = stored.load(form)
    assert all(map(np.array_equal, first, matrices(loaded)))
    assert [file.stat().st_mtime_ns for file in files] == stamps
    layer = stored.read_layer(pair.spec.num_layers + own[0], form)
    assert np.array_equal(layer.up_weight.dense(np.dtype(np.float32)), first[2])
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[-1].write_bytes(files[0].read_bytes())
    assert all(map(np.array_equal, first, matrices(stored.load(form))))
    assert all(file.stat().st_mtime_ns > stamp for file, stamp in zip(files[:1], stamps[:1], strict=True))
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder")
    assert all(map(np.array_equal, first, matrices(dataclasses.replace(pair, store=blocked).load(form))))
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize("executor", ["torch", "native", "cuda"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_every_size_answers_as_the_dequantised_pair(pair, executor, low_rank):
    """Triton's interpreter, which cuda runs in without a GPU, multiplies no bfloat16."""
    if executor == "cuda" and (pair.spec.family != "llama" or find_spec("triton") is None):
        pytest.skip("one family is enough" if pair.spec.family != "llama" else "Triton is not installed")
    if executor == "native" and isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))
    sizes = pair.elasticity.sizes
    dtype = torch.float32 if executor == "cuda" else torch.bfloat16
    form = WeightForm(dtype, low_rank=low_rank, storage=Storage.CODES)
    exact = pair.load(WeightForm(torch.float32))
    for layer, weights in {} if low_rank else pair.load(form).layers.items():  # an expanded student has its own codes
        for name in pair.spec.matrix_shapes:
            setattr(exact.layers[layer], name, getattr(weights, name).dense(np.dtype(np.float32)))
    engines = [make_engine(pair, "torch", loaded=exact), make_engine(pair, executor, loaded=pair.load(form))]
    assert "Q4_1 + Q5_1" in engines[1].executor.describe()
    prompt = random.Random(1).choices(range(VOCAB), k=30)
    scores = []
    for engine in engines:  # all sizes in the same steps
        requests = [make_request(f"r{size}", prompt, size, max_tokens=1, logprobs=-1) for size in sizes]
        outputs = run(engine, requests)
        scores.append(torch.cat([all_logprobs(outputs[request.request_id]) for request in requests]))
    centred = [rows - rows.mean(-1, keepdim=True) for rows in scores]
    assert torch.cosine_similarity(*centred).min() > 0.98
