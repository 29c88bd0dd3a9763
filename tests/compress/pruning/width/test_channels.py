"""Units that are cut out: what is left computes what zeroed units would, in stock classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.checkpoint import Checkpoint, read_config, read_spec
from pocketvlm.compress.pruning.width.channels import (
    DecoderBiases,
    UnitGroup,
    Widths,
    check_dense,
    kept_units,
    narrow_config,
    narrow_spec,
    remove_units,
    unit_groups,
)
from pocketvlm.errors import RecipeError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.sparse import SparseWeight
from tests.compress.quantization.functions import logits_of

KINDS = ("kv_groups", "ffn", "tower_ffn")
KEPT = {"kv_groups": 1, "ffn": 64, "tower_ffn": 32}

# Runs without this package: the folder is all that it knows.
STOCK = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = torch.load(Path(folder).with_suffix(".inputs"), weights_only=True)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [name for name in sys.modules if name.startswith("pocketvlm")]
    with torch.inference_mode():
        logits = model(**given).logits
    torch.save(logits, Path(folder).with_suffix(".logits"))
"""


def choose(checkpoint: Checkpoint, kinds=KINDS, seed: int = 0) -> dict[UnitGroup, torch.Tensor]:
    """Units without any order in them, others in every block."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group: torch.randperm(group.count, generator=generator)[: KEPT[kind]].sort().values
        for kind in kinds
        for group in unit_groups(checkpoint.spec, kind)
    }


def silence(checkpoint: Checkpoint, kept: dict[UnitGroup, torch.Tensor]) -> Checkpoint:
    """The whole model, with removed units unread."""
    for group, units in kept.items():
        columns = group.columns_of(units)
        weight = checkpoint.form(group.last).dequantize()
        silent = torch.zeros_like(weight)
        silent[:, columns] = weight[:, columns]
        checkpoint.set_form(group.last, DenseWeight(values=silent))
    return checkpoint


@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], KINDS], ids=str)
def test_cutting_units_out_is_reading_zeros_from_them(tiny_path: Path, kinds: tuple[str, ...]):
    whole = Checkpoint.load(tiny_path)
    kept = choose(whole, kinds)
    before = logits_of(whole)
    cut = remove_units(Checkpoint.load(tiny_path), kept)
    expected = logits_of(silence(whole, kept))
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(logits_of(cut), expected, rtol=1e-5, atol=1e-5)
    decoder = cut.spec.decoder
    assert decoder.heads % decoder.kv_heads == 0
    assert decoder.heads // decoder.kv_heads == 2
    assert (decoder.kv_heads == 1) == ("kv_groups" in kinds)
    stored = sum(form.stored_bytes for form in cut.forms().values())
    assert stored < sum(form.stored_bytes for form in whole.forms().values())
    for linear, form in cut.forms().items():
        assert form.shape == (linear.out_features, linear.in_features)


def test_what_is_kept_keeps_its_bits(tiny_checkpoint: Checkpoint):
    kept = choose(tiny_checkpoint, ("ffn",))
    (group, units), *_ = kept.items()
    name = next(iter(group.rows))
    expected = tiny_checkpoint.form(name).to_tensors()["weight"][units]
    found = remove_units(tiny_checkpoint, kept).form(name).to_tensors()["weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_stock_classes_load_the_folder_in_a_process_without_this_package(
    tiny_paths: dict[str, Path], tmp_path: Path
):
    expected = {}
    for family, path in tiny_paths.items():
        checkpoint = Checkpoint.load(path)
        for group in unit_groups(checkpoint.spec, "ffn"):
            layer = checkpoint.layer(group.last)
            layer.bias = torch.nn.Parameter(0.1 * torch.randn(64), requires_grad=False)
        cut = remove_units(checkpoint, choose(checkpoint))
        cut.save(tmp_path / family)
        spec = cut.spec
        assert spec.decoder.has_mlp_bias
        assert not spec.decoder.has_output_bias
        side = spec.tower.height
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[5, 6, *[spec.image_token_id] * spec.visual_tokens, 7, 8, 9]])
        inputs = {"input_ids": ids, "pixel_values": pixels if family == "llava" else pixels[None]}
        torch.save(inputs, tmp_path / f"{family}.inputs")
        expected[family] = logits_of(cut)
        torch.testing.assert_close(
            logits_of(Checkpoint.load(tmp_path / family)), expected[family], rtol=0, atol=0
        )
    finished = subprocess.run(
        [sys.executable, "-c", STOCK, *(str(tmp_path / family) for family in expected)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for family, logits in expected.items():
        found = torch.load(tmp_path / f"{family}.logits", weights_only=True)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


@given(
    groups=st.sampled_from([1, 2]),
    ffn=st.integers(1, 96),
    tower=st.integers(1, 96),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)
@settings(
    max_examples=25,
    deadline=None,
)
def test_the_planned_specification_is_that_of_the_written_config(
    tiny_paths: dict[str, Path],
    groups: int,
    ffn: int,
    tower: int,
    attention_bias: bool,
    mlp_bias: bool,
):
    widths = Widths(ffn=ffn, kv_groups=groups, tower_ffn=tower)
    biases = DecoderBiases(attention=attention_bias, mlp=mlp_bias)
    for path in tiny_paths.values():
        config = read_config(path)
        spec = read_spec(config)
        written = narrow_config(config, spec, widths, biases)
        assert read_spec(json.loads(json.dumps(written))) == narrow_spec(spec, widths, biases)
        assert written["text_config"]["head_dim"] == spec.decoder.head_dim


def test_groups_own_whole_heads(tiny_checkpoint: Checkpoint):
    group = unit_groups(tiny_checkpoint.spec, "kv_groups")[1]
    q, k, v = group.rows
    second = torch.tensor([1])
    # Four query heads of 16 channels read two key-value heads.
    assert group.rows_of(q, second).tolist() == list(range(32, 64))
    assert group.rows_of(k, second).tolist() == list(range(16, 32))
    assert group.rows_of(v, second).tolist() == list(range(16, 32))
    assert group.columns_of(second).tolist() == list(range(32, 64))
    assert group.linears == (q, k, v, group.last)


def test_kept_units_are_the_best_and_the_first_of_equals():
    assert kept_units([1.0, 3.0, 2.0, 3.0], 2).tolist() == [1, 3]
    assert kept_units([2.0, 1.0, 2.0, 2.0], 2).tolist() == [0, 2]
    assert kept_units([0.0] * 5, 3).tolist() == [0, 1, 2]


def test_blocks_of_different_width_have_no_stock_class(tiny_checkpoint: Checkpoint):
    kept = choose(tiny_checkpoint, ("ffn",))
    last = list(kept)[-1]
    kept[last] = kept[last][:32]
    with pytest.raises(ValueError, match=r"ffn: widths \[32, 64\] in 2 of 2 blocks"):
        remove_units(tiny_checkpoint, kept)
    del kept[last]
    with pytest.raises(ValueError, match=r"ffn: widths \[64\] in 1 of 2 blocks"):
        remove_units(tiny_checkpoint, kept)


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tiny_path: Path):
    config = read_config(tiny_path)
    config["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    spec = read_spec(config)
    widths = Widths(ffn=96, kv_groups=3, tower_ffn=96)
    with pytest.raises(RecipeError, match="3 groups are 6 query heads.* allowed are 1, 2, 4"):
        narrow_spec(spec, widths, DecoderBiases.of(spec))


@pytest.mark.parametrize("kind", ["sparse", "affine"])
def test_only_dense_weights_are_cut(tiny_checkpoint: Checkpoint, kind: str):
    linear = tiny_checkpoint.spec.linears()[-2]
    weight = tiny_checkpoint.form(linear.name)
    if kind == "sparse":
        form = SparseWeight.from_form(weight, weight.dequantize() > 0)
    else:
        form = AffineWeight.from_codes(
            torch.zeros(weight.shape),
            torch.ones(weight.shape[0], weight.shape[1] // 32).half(),
            None,
            bits=4,
            group_size=32,
            in_features=weight.shape[1],
        )
    check_dense(tiny_checkpoint, "prune_width")
    tiny_checkpoint.set_form(linear.name, form)
    with pytest.raises(RecipeError, match=f"kind '{kind}'.* before every mask and every quantizer"):
        check_dense(tiny_checkpoint, "prune_width")
