"""The AMX kernels on any processor with AVX512-BF16, their tile instructions emulated: what the other variants pass."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from server.kernels.cpu import build, library
from tests.kernels import test_compressed_weights, test_cpu_executor, test_int8_kv, test_rows_alone
from tests.kernels.steps import FAMILIES, PAGE
from tests.model import test_low_rank_lanes
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import make_model

EMULATION = Path(__file__).with_name("amx_emulation.h")
NAME = "amx_emulated"


@pytest.fixture
def variant(monkeypatch):
    """The name of one that is built, from the flags of AVX512-BF16; where there are real tiles too."""
    like = build.VARIANTS["avx512_bf16"]
    if missing := build.missing_instructions("avx512_bf16"):
        pytest.skip(f"the processor lacks {', '.join(missing)}")
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    digest = hashlib.sha256(EMULATION.read_bytes()).hexdigest()  # for the name in the cache
    flags = [*like.flags, "-O1", "-include", str(EMULATION), f"-DAMX_EMULATION={digest}"]
    monkeypatch.setitem(build.VARIANTS, NAME, build.Variant(flags, like.instructions))
    monkeypatch.setenv(library.VARIANT_VARIABLE, NAME)
    chosen = library.choose()
    assert not isinstance(chosen, list), chosen  # rather than tests that are skipped
    return chosen[0]


@pytest.mark.parametrize("kind", ["bfloat16", "compressed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_as_the_portable_executor(family, kind, variant, monkeypatch):
    test_cpu_executor.test_same_logits_as_the_portable_executor(family, kind, variant, monkeypatch)


@pytest.mark.parametrize("page_size", [PAGE, 32])
@pytest.mark.parametrize("kind", ["bfloat16", "compressed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_many_rows_go_layer_by_layer_in_chunks(family, kind, variant, page_size, monkeypatch):
    test_cpu_executor.test_many_rows_go_layer_by_layer_in_chunks(family, kind, variant, page_size, monkeypatch)


@pytest.mark.parametrize("page_size", [PAGE, 32])
def test_scores_that_grow_along_a_row(variant, page_size):
    test_cpu_executor.test_scores_that_grow_along_a_row(page_size)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_int8_weights_are_the_rounded_ones(family, variant, monkeypatch):
    test_cpu_executor.test_int8_weights_are_the_rounded_ones(family, variant, monkeypatch)


def test_int8_kv_is_near_wide_kv(variant):
    test_int8_kv.test_near_wide_kv(64, torch.bfloat16)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 33, 70, 210])
def test_a_product_with_one_input_gives_the_weights(variant, num_rows, monkeypatch):
    test_compressed_weights.test_a_product_with_one_input_gives_the_weights(variant, num_rows, monkeypatch)


@pytest.mark.parametrize("gated", [True, False])
def test_embeddings_and_steps(variant, gated, monkeypatch):
    test_compressed_weights.test_embeddings_and_steps(variant, gated, monkeypatch)


def test_weights_without_a_code_in_deep_products(variant, monkeypatch):
    test_compressed_weights.test_weights_without_a_code_in_deep_products(variant, monkeypatch)


@pytest.mark.parametrize("quantise", [True, False])
def test_low_rank_students(variant, quantise, tmp_path):
    make_model("llama", 6, seed=1, tied=True).save_pretrained(tmp_path / "teacher")
    write_student(tmp_path / "student", tmp_path / "teacher", quantise=quantise)
    test_low_rank_lanes.test_bfloat16_stays_close(tmp_path, "native")


@pytest.mark.parametrize("kind", ["bfloat16", "compressed", "int8"])
def test_rows_get_what_they_get_alone(kind, variant, monkeypatch):
    test_rows_alone.test_products_of_every_number_of_rows(kind, variant, monkeypatch)
    test_rows_alone.test_beside_others_and_as_guesses(kind, "auto", variant, monkeypatch)


def test_the_real_instructions_compile():
    """The emulation has its own flags; a build of the real ones that fails would only be passed over."""
    if (cxx := build.compiler()) is None:
        pytest.skip("no C++ compiler")
    flags = [*build.FLAGS, "-O0", "-fsyntax-only", *build.VARIANTS["amx"].flags]
    result = subprocess.run([cxx, *flags, str(build.SOURCES / "step.cpp")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
