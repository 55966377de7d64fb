"""Nested codes: one copy is read at every width, about as exactly as separate codes of that width would be."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model_store import nested_store
from model_store.arrays import in_torch, to_torch
from model_store.dual import at_width
from model_store.nested import GROUP, HEAD_BITS, WIDTHS, NestedMatrix, nest, nested_bytes
from model_store.pair import Pair, open_pair
from model_store.weight_form import Storage, WeightForm
from server.config import Settings
from server.forms import load_weights, weight_form
from server.nesting import measure_grams
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import make_model


def random_matrix(rows: int = 48, width: int = 320, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def relative_error(matrix: torch.Tensor, nested: NestedMatrix) -> float:
    return float((nested.dense(torch.float32) - matrix).norm() / matrix.norm())


def test_errors_are_those_of_the_widths():
    """Within the table of nested codes in groups of 32 for normal weights; truncated int8 has twice as much."""
    matrix = random_matrix(256, 1024)
    nested = nest(matrix)
    most = {8: 0.0065, 6: 0.025, 5: 0.05, 4: 0.1}
    errors = {bits: relative_error(matrix, nested.at(bits)) for bits in WIDTHS}
    assert all(errors[bits] < most[bits] for bits in WIDTHS), errors


def test_fewer_bits_are_the_upper_bits_of_the_same_codes():
    nested = nest(random_matrix())
    for bits in WIDTHS:
        groups = nested.groups(bits)
        assert torch.equal(groups.codes.flatten(1), nested.codes >> (8 - bits))
        assert nested.at(bits).codes is nested.codes
    assert nested.nbytes == nested_bytes(48, 320)


def test_scales_fitted_to_inputs_make_the_product_better():
    matrix = random_matrix()
    few, directions, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in
                              enumerate(((2000, 4), (4, 320), (2000, 320))))  # fmt: skip
    inputs = few @ directions + 0.1 * noise  # inputs of a layer have much in common
    plain, fitted = nest(matrix), nest(matrix, inputs.T @ inputs)
    assert torch.equal(plain.codes, fitted.codes)
    for bits in (6, 5, 4):
        one, other = (inputs @ (m.at(bits).dense(torch.float32) - matrix).T for m in (plain, fitted))
        assert other.norm() < 0.7 * one.norm()


@pytest.mark.parametrize("value", [0.0, 3e-5, -0.25])
def test_odd_groups(value):
    """Constant groups, zeros, one outlier: nothing is lost, nothing is not a number."""
    matrix = random_matrix()
    matrix[3, :GROUP] = value
    matrix[4, 5] = 40.0
    for gram in (None, torch.eye(320), torch.zeros(320, 320)):
        for bits in WIDTHS:
            dense = nest(matrix, gram).at(bits).dense(torch.float32)
            assert dense.isfinite().all()
            assert (dense[3, :GROUP] - value).abs().max() <= abs(value) * 0.05 + 2e-5


def test_rows_are_those_of_the_matrix():
    nested = nest(random_matrix()).at(5)
    ids = torch.tensor([7, 7, 0])
    assert torch.equal(nested.rows(ids), nested.dense(torch.float32)[ids])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("nested")
    make_model("llama", 6, seed=1, tied=True).save_pretrained(folder / "teacher")
    write_student(folder / "student", folder / "teacher")
    return open_pair(folder / "teacher", folder / "student")


def test_a_pair_is_read_at_every_width_from_one_file(pair, tmp_path):
    """What pair.load gives, near; shared matrices stay one; the head keeps more bits; the tables say what is there."""
    file = tmp_path / "nested.safetensors"
    nested_store.write(pair.load(WeightForm(torch.float32)), file)
    assert nested_store.is_current(file)
    (tmp_path / "example").touch()  # what is written for a server may be read by it, whoever it runs as
    assert file.stat().st_mode == (tmp_path / "example").stat().st_mode
    plain = pair.load(WeightForm(torch.float32)).in_torch()
    for bits in WIDTHS:
        form = WeightForm(storage=Storage.NESTED, bits=bits)
        loaded = pair.load(form)
        nested_store.put(loaded, file, form)
        assert loaded.form == form
        assert loaded.num_bytes() == pair.union_bytes(pair.elasticity.sizes, form)
        ends = loaded.ends["teacher"]
        assert ends.head is ends.embed and ends.head.width == HEAD_BITS[bits]
        for index, layer in loaded.layers.items():
            own, matrix = layer.down_weight, plain.layers[index].down_weight
            assert own.width == bits and relative_error(matrix, in_torch(own)) < 0.15
        shared = [i for i, layer in plain.layers.items() if layer is plain.layers.get(0) and i]
        assert all(loaded.layers[i].qkv_weight is loaded.layers[0].qkv_weight for i in shared)


def test_files_of_another_version_are_not_current(tmp_path):
    file = tmp_path / "nested.safetensors"
    assert not nested_store.is_current(file)
    file.write_bytes(b"half a file")
    assert not nested_store.is_current(file)
    save_file({"a": torch.zeros(1)}, file, {"boomerang": json.dumps({"version": 0})})
    assert not nested_store.is_current(file)


def test_inputs_are_those_that_the_matrices_meet(pair):
    """The Gram matrix of the first layer's inputs is that of the normed embeddings; the pair is left as it was."""
    loaded = pair.load(WeightForm(torch.float32)).in_torch()
    before = {name: getattr(owner, field) for name, owner, field in nested_store.places(loaded)}
    texts = [[5, 9, 31, 7], [8, 8, 60]]
    grams = measure_grams(loaded, texts)
    after = {name: getattr(owner, field) for name, owner, field in nested_store.places(loaded)}
    assert all(after[name] is before[name] for name in before)
    layer, embed = loaded.layers[0], loaded.ends["teacher"].embed
    rows = embed[torch.tensor([*texts[0], *texts[1]])].float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + pair.spec.norm_eps) * layer.attn_norm_weight
    assert torch.allclose(grams[layer.qkv_weight.data_ptr()], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_codes_are_made_once_and_kept(pair, tmp_path, monkeypatch):
    settings = Settings(quantization="q5", store=str(tmp_path), device="cpu")
    form = weight_form(settings, pair)
    assert form == WeightForm(storage=Storage.NESTED, bits=5)
    made = []

    def make(of: Pair, file) -> None:
        made.append(file)
        nested_store.write(of.load(WeightForm(torch.float32)), file)

    monkeypatch.setattr("server.nesting.make_nested", make)
    for _ in range(2):
        loaded = load_weights(settings, pair, form, "cpu")
        assert loaded.form == form
    assert made == [nested_store.nested_file(pair, tmp_path)]


def test_differences_do_not_go_with_it(pair):
    with pytest.raises(ValueError, match="--low-rank on does not go with --quantization q6"):
        weight_form(Settings(quantization="q6", low_rank="on", device="cpu"), pair)


def test_the_dial_keeps_one_copy_of_each_form(pair, tmp_path):
    """On: the exact form with the codes of all widths beside it, or these alone; what is shared stays shared."""
    store, cpu = str(tmp_path), "cpu"
    nested_store.write(pair.load(WeightForm(torch.float32)), nested_store.nested_file(pair, tmp_path))
    plain = pair.load(WeightForm())
    for exact, widths in (("on", (4, 5, 6, 8, 16)), ("off", (4, 5, 6, 8))):
        settings = Settings(precision_dial="on", exact=exact, low_rank="off", store=store, device="cpu")
        form = weight_form(settings, pair)
        loaded = load_weights(settings, pair, form, cpu)
        assert form.widths == loaded.widths == widths and loaded.form == form
        assert loaded.num_bytes() == pair.union_bytes(pair.elasticity.sizes, form)
        matrix, was = loaded.layers[0].up_weight, plain.layers[0].up_weight
        assert all(relative_error(to_torch(was), in_torch(at_width(matrix, width))) < 0.15 for width in (4, 5, 6, 8))
        assert exact == "off" or (at_width(matrix, 16) == was).all()
        assert loaded.ends["teacher"].head is loaded.ends["teacher"].embed


def test_the_dial_turns_only_where_it_can(pair, tmp_path):
    """auto: where the store has codes, beside weights that take more, if both fit; never in place of the exact form."""

    def form_of(**changes) -> WeightForm:
        return weight_form(Settings(store=str(tmp_path), low_rank="off", device="cpu", **changes), pair)

    exact, both = (16,), (4, 5, 6, 8, 16)
    assert form_of().widths == exact
    nested_store.write(pair.load(WeightForm(torch.float32)), nested_store.nested_file(pair, tmp_path))
    most = pair.union_bytes(pair.elasticity.sizes, WeightForm())
    assert form_of().widths == both and form_of(precision_dial="off").widths == exact
    assert form_of(quantization="int8").widths == form_of(quantization="q6").widths == exact
    assert form_of(memory_budget=most).widths == exact
    assert form_of(memory_budget=most, precision_dial="on").widths == form_of(exact="off").widths == (4, 5, 6, 8)
    assert form_of(memory_budget=most, precision_dial="on", exact="on").widths == both
    with pytest.raises(ValueError, match="--precision-dial on: it does not go with --quantization int8"):
        form_of(precision_dial="on", quantization="int8")
    assert form_of(exact="off", executor="cuda").widths == (4, 5, 6, 8)
    on_a_gpu = Settings(store=str(tmp_path), low_rank="off", device="cuda", exact="off", executor="torch")
    with pytest.raises(ValueError, match="--exact off: the dial needs a CPU, or the cuda executor"):
        weight_form(on_a_gpu, pair)
