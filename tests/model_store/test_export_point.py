"""Exports of a size at fewer bits: the folder computes what the server's codes say, and GGUF holds the very codes."""

import gguf
import numpy as np
import pytest

from model_store.arrays import BFLOAT16
from model_store.export import ExportError, parse_point
from model_store.export_point import affine_blocks
from model_store.nested import nest
from model_store.pair import open_pair
from server.cli import main
from tests.api import tiny


@pytest.mark.parametrize("width, kind", [(4, "Q4_1"), (5, "Q5_1")])
def test_ggml_blocks_hold_the_codes_themselves(width, kind):
    groups = nest(np.random.default_rng(0).standard_normal((8, 128), np.float32)).groups(width)
    values = groups.dense().astype(BFLOAT16)  # as a folder has them
    blocks = affine_blocks(values, (groups.scale, groups.minimum), width)
    back = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(back, groups.dense(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name, kind", [("5L-q4", "Q4_1"), ("4L-q5", "Q5_1"), ("6L-q6", "Q8_0")])
def test_the_command_writes_a_point_in_both_forms(tmp_path, name, kind, capsys):
    teacher, student = tiny.make_pair(tmp_path)
    (student / "quality.json").write_text(
        '{"kinds": {"code": {"sizes": {"5": {"kl": 0.4}}, "widths": {"4": {"kl": 0.1}}}}}'
    )
    out, file = tmp_path / "out", tmp_path / "point.gguf"
    common = ["export", "--teacher", str(teacher), "--student", str(student), "--store", str(tmp_path / "store")]
    arguments = [*common, "--size", name, "--out", str(out), "--gguf", str(file), "--gguf-pre", "gpt-2"]
    assert main(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "logits equal the pair's" in said and "read back within rounding" in said
    card = (out / "README.md").read_text()
    assert f"{name[-1]} bits" in card
    if name == "5L-q4":
        assert "| code | 0.5000 | sum of what layers and bits cost alone |" in card
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == kind and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds.get("output.weight", kinds["token_embd.weight"]) == "Q8_0"


def test_points_that_there_are_not(tmp_path):
    pair = open_pair(*tiny.make_pair(tmp_path))
    assert parse_point("5L", pair) == parse_point("5-exact", pair) == (5, None) and parse_point("5L-Q6", pair) == (5, 6)
    for text in ("5L-q3", "5L-6", "5L-", "9L-q6", "5L-qx"):
        with pytest.raises(ExportError, match="--size"):
            parse_point(text, pair)
