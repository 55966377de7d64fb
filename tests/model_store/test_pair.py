"""Pairs: what interlocks, what is shared in memory, what each size needs, what a memory budget leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store import published
from model_store.arrays import address
from model_store.errors import BoomerangError
from model_store.pair import PairError, open_pair
from model_store.weight_form import WeightForm
from model_store.weights import WeightError
from tests.tiny_pairs import FAMILIES, make_model, make_pair


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def llama(tmp_path):
    return make_pair(tmp_path, "llama")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("order", ["last_to_first", "first_to_last"])
def test_every_tensor_exists_once_whatever_is_served(folders, order):
    teacher, student = folders
    pair = open_pair(teacher, student, patch_order=order)
    loaded = pair.load(WeightForm(torch.float32))
    assert loaded.sizes == pair.elasticity.sizes == (4, 5, 6)
    on_disk = sum(t.nbytes for folder in folders for t in load_file(folder / "model.safetensors").values())
    assert loaded.num_bytes() == on_disk == pair.union_bytes(loaded.sizes, WeightForm(torch.float32))

    storages = {address(t) for t in loaded.tensors()}
    used = set()
    for size in loaded.sizes:
        path = loaded.elasticity.path(size)
        tensors = [t for layer in path.layers for t in loaded.layers[layer].tensors()]
        embed, norm, head = (loaded.ends[side] for side in (path.embed_from, path.norm_from, path.head_from))
        tensors += [embed.embed, embed.positions, norm.final_norm_weight, norm.final_norm_bias]
        tensors += [head.head, head.head_bias]
        mine = {address(t) for t in tensors if t is not None}
        assert mine <= storages  # a size adds nothing of its own
        counted = {address(t): t.size for t in tensors if t is not None}
        assert sum(counted.values()) == pair.parameters(size)
        used |= mine
    assert used == storages  # and nothing is loaded for nobody


def test_a_tied_pair_becomes_untied_in_between(llama):
    pair = open_pair(*llama, patch_order="last_to_first")
    ends = pair.load(WeightForm(torch.float32)).ends
    assert ends["teacher"].head is ends["teacher"].embed and ends["student"].head is ends["student"].embed
    assert ends["teacher"].embed is not ends["student"].embed
    small, middle, full = (pair.parameters(size) for size in (4, 5, 6))
    layer, matrix = pair.spec.layer_parameters, pair.spec.vocab_size * pair.spec.hidden_size
    assert (middle - small, full - middle) == (layer + matrix, layer - matrix)


def test_equal_ends_and_layers_are_shared(llama):
    teacher, student = llama
    ours, theirs = load_file(teacher / "model.safetensors"), load_file(student / "model.safetensors")
    theirs["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"]
    for name in ours:
        if ".layers.5." in name:
            theirs[name.replace(".layers.5.", ".layers.3.")] = ours[name]
    save_file(theirs, student / "model.safetensors")
    pair = open_pair(teacher, student)
    loaded = pair.load(WeightForm(torch.bfloat16))
    assert loaded.layers[6 + 3] is loaded.layers[5] and loaded.layers[6 + 2] is not loaded.layers[4]
    assert loaded.ends["student"].embed is loaded.ends["teacher"].embed is loaded.ends["student"].head
    assert loaded.ends["student"].final_norm_weight is not loaded.ends["teacher"].final_norm_weight
    norm = pair.spec.hidden_size
    assert pair.parameters(5) == 5 * pair.spec.layer_parameters + pair.spec.vocab_size * pair.spec.hidden_size + norm


@pytest.mark.parametrize("order", ["last_to_first", "first_to_last"])
def test_a_memory_budget_leaves_out_the_largest_sizes(folders, order):
    pair = open_pair(*folders, patch_order=order)
    whole = pair.load(WeightForm(torch.float32))
    for count in (1, 2, 3):
        sizes = pair.elasticity.sizes[:count]
        budget = pair.union_bytes(sizes, WeightForm(torch.float32))
        loaded = pair.load(WeightForm(torch.float32), memory_budget=budget)
        assert loaded.sizes == sizes and loaded.num_bytes() == budget
        assert sorted(loaded.missing_sizes) == list(pair.elasticity.sizes[count:])
        assert set(loaded.layers) == {layer for size in sizes for layer in pair.elasticity.path(size).layers}
        path = pair.elasticity.path(sizes[-1])
        for name, side in (("embed", path.embed_from), ("final_norm_weight", path.norm_from), ("head", path.head_from)):
            assert np.array_equal(getattr(loaded.ends[side], name), getattr(whole.ends[side], name))
    with pytest.raises(PairError, match=r"not even the smallest size.*4L needs .* MiB of weights"):
        pair.load(
            WeightForm(torch.float32),
            memory_budget=pair.union_bytes(pair.elasticity.sizes[:1], WeightForm(torch.float32)) - 1,
        )


def test_the_size_table(llama):
    rows = open_pair(*llama).size_table(WeightForm(torch.bfloat16))
    assert [row["size"] for row in rows] == [4, 5, 6]
    assert rows[-1]["fraction"] == 1.0 and rows[0]["weight_bytes"] == 2 * rows[0]["parameters"]
    assert [row["kv_bytes_per_token"] for row in rows] == [size * 2 * 2 * 16 * 2 for size in (4, 5, 6)]


def change_config(name, **changes):
    return lambda teacher, student: edit_json((teacher if name == "teacher" else student) / "config.json", **changes)


def change_student_config(**changes):
    return lambda teacher, student: edit_json(student / "student_config.json", **changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            change_config("student", hidden_size=80, head_dim=16),
            r"weight is \[131, 64\], its config says \[131, 80\]",
        ),
        (change_config("student", num_key_value_heads=4), r"k_proj.weight is \[32, 64\], its config says \[64, 64\]"),
        (change_config("student", vocab_size=130), r"is \[131, 64\], its config says \[130, 64\]"),
        (change_config("student", model_type="mistral", sliding_window=None), "family is 'llama' .* and 'mistral'"),
        (change_config("student", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "rotary angles differ"),
        (change_config("student", num_hidden_layers=3), "its config says 3 layers, the file has layer 3"),
        (change_config("teacher", num_hidden_layers=8), "lacks the tensor 'layers.6"),
        (change_config("teacher", model_type="bert"), "'bert' is not supported"),
        (change_student_config(copied_teacher_layers=[1, 2, 4, 5], pruned_teacher_layers=[0, 3]), "layer 0"),
        (change_student_config(copied_teacher_layers=[0, 4, 2, 5]), "not ascending"),
        (change_student_config(copied_teacher_layers=None), "no student_config.json with copied_teacher_layers"),
        (lambda teacher, student: (student / "student_config.json").unlink(), "which teacher layers"),
        (lambda teacher, student: (student / "student_config.json").write_text("{"), "not valid JSON"),
        (lambda teacher, student: (student / "config.json").unlink(), "it is not a student"),
        (change_student_config(pruned_teacher_layers=[1]), "4 copied and 1 pruned layers are not the teacher's 6"),
        (change_student_config(copied_teacher_layers=[0, 2, 5], pruned_teacher_layers=None), "has 4 layers .* lists 3"),
    ],
)
def test_what_does_not_interlock_is_refused_with_the_reason(llama, change, message):
    change(*llama)
    with pytest.raises(BoomerangError, match=message):
        open_pair(*llama)


def test_a_student_with_tensors_of_another_model_is_refused(llama):
    teacher, student = llama
    tensors = load_file(student / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.experts.weight": torch.ones(2)}, student / "model.safetensors")
    with pytest.raises(WeightError, match=r"1 tensors that its model family has no place for: layers\.0\.mlp\.experts"):
        open_pair(teacher, student).load(WeightForm(torch.float32))


def test_orders(llama):
    teacher, student = llama
    assert open_pair(teacher, student).patch_order == "last_to_first"
    assert open_pair(teacher, student, patch_order="first_to_last").elasticity.thresholds == (5, 6, 6, 6)
    with pytest.raises(PairError, match="unknown patch order 'middle'"):
        open_pair(teacher, student, patch_order="middle")
    with pytest.raises(PairError, match="size of 5 layers a path of 6"):
        open_pair(teacher, student, thresholds=[5, 5, 5, 5])
    # A pair that was measured says so itself; asking for another order makes its measurements void.
    (student / "pair.json").write_text(json.dumps({"name": "mine", "thresholds": [5, 6, 5, 6], "head_threshold": 5}))
    (student / "quality.json").write_text(json.dumps({"sizes": {"4": {"perplexity": 9.0}}}))
    pair = open_pair(teacher, student)
    assert (pair.name, pair.patch_order, pair.elasticity.head_threshold) == ("mine", "thresholds", 5)
    assert pair.size_table()[0]["quality"] == {"perplexity": 9.0}
    assert open_pair(teacher, student, patch_order="last_to_first").quality == {}


def test_known_pairs_bring_their_order_and_layers(tmp_path):
    make_model("gpt2", 12, seed=0).save_pretrained(tmp_path / "gpt2")
    make_model("gpt2", 6, seed=1).save_pretrained(tmp_path / "distilgpt2")
    pair = open_pair(tmp_path / "gpt2", tmp_path / "distilgpt2")  # no student_config.json
    assert pair.elasticity.kept == (0, 2, 4, 7, 9, 11) and pair.elasticity.sizes == (6, 7, 8, 10, 11, 12)
    assert pair.name == "gpt2" and pair.patch_order == "last_to_first"

    teacher, student = make_pair(tmp_path, "llama")
    renamed = student.rename(tmp_path / "boomerang-llama-3.2-1.9B")
    assert open_pair(teacher, renamed).patch_order == "first_to_last"
    assert published.by_student("Harvard-DCML--boomerang-qwen3-2.3B").name == "qwen3-4b"
    assert published.by_teacher("Qwen/Qwen3-8B-Base").student == "Harvard-DCML/boomerang-qwen3-4.9B"


def test_the_digest_follows_content_and_order(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path / "store"))
    teacher, student = llama
    digest = open_pair(teacher, student).digest
    assert open_pair(teacher, student, patch_order="last_to_first").digest == digest
    assert open_pair(teacher, student, patch_order="first_to_last").digest != digest
    copy = shutil.copytree(student, tmp_path / "copy")
    assert open_pair(teacher, copy).digest == digest
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, student / "model.safetensors")
    assert open_pair(teacher, student).digest != digest


def test_the_shorter_context_of_the_two_counts(llama):
    teacher, student = llama
    edit_json(student / "config.json", max_position_embeddings=128)
    assert open_pair(teacher, student).spec.max_context == 128
