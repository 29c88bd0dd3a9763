"""The integers in the packages are the checkpoint's own, at every width; each is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.coreml.writer import identifier
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from tests.export.coreml.rig import PackageContent, export
from tests.export.coreml.test_forms import make_codebook
from tests.export.rig import quantize_affine, quantize_checkpoint

pytest.importorskip("coremltools", reason="the coreml extra is not installed")


def functions_of(checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[PackageContent, str]]:
    """Which function of which package holds a layer of each part."""
    vision = PackageContent(folder / "vision.mlpackage")
    decoder = PackageContent(folder / "decoder.mlpackage")
    return {
        "tower": (vision, "main"),
        "projector": (vision, "main"),
        "embedding": (decoder, "embedding"),
        "decoder": (decoder, "decode"),
        "head": (decoder, "decode"),
    }


# Group sizes that leave a ragged end of 64 and 96 columns, and one that spans the row.
_AFFINE = [
    {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    for bits, group_size in ((2, 32), (3, 64), (4, 32), (4, 1024), (8, 64))
    for symmetric in (False, True)
]
_CODEBOOKS = [
    {"bits": bits, "length": length, "groups": (2, 1), "scaled": scaled}
    for bits, length in ((4, 1), (8, 4), (6, 2))
    for scaled in (False, True)
]


def mix_forms(checkpoint: Checkpoint) -> Checkpoint:
    """Every form in turn, layer by layer."""
    kinds = len(_AFFINE) + len(_CODEBOOKS) + 1
    for index, linear in enumerate(checkpoint.spec.linears()):
        dense = checkpoint.form(linear.name).dequantize()
        kind = index % kinds
        if kind < len(_AFFINE):
            form = quantize_affine(dense, **_AFFINE[kind])
        elif kind < kinds - 1:
            options = _CODEBOOKS[kind - len(_AFFINE)]
            form = make_codebook(*dense.shape, **options, seed=index)
        else:
            form = DenseWeight(values=dense)
        checkpoint.set_form(linear.name, form)
    return checkpoint


def check_affine(content: PackageContent, function: str, name: str, form: AffineWeight) -> None:
    made = content.functions[function][identifier(f"{name}.weight")]
    assert made.type == "constexpr_blockwise_shift_scale"
    data = content.operand(function, made, "data")
    if form.bits in (2, 3):
        assert data.type == "constexpr_lut_to_dense"
        steps = content.operand(function, data, "lut").reshape(-1)
        data = steps[content.operand(function, data, "indices")]
    implied = 1 << (form.bits - 1) if form.zeros is None else 0
    width = data.shape[1]
    np.testing.assert_array_equal(data.astype(np.int64) + implied, form.codes()[:, :width])
    assert width == (form.in_features if form.groups == 1 else form.groups * form.group_size)
    scales = content.operand(function, made, "scale")
    assert scales.dtype == np.float16
    np.testing.assert_array_equal(scales, form.scales.numpy())
    if form.zeros is None:
        assert "offset" not in made.inputs
    else:
        offsets = content.operand(function, made, "offset")
        np.testing.assert_array_equal(offsets.astype(np.int64), form.zeros.numpy())


def check_codebook(content: PackageContent, function: str, name: str, form: CodebookWeight) -> None:
    made = content.functions[function][identifier(f"{name}.weight")]
    if form.row_scales is not None:
        scales = content.operand(function, made, "scale")
        np.testing.assert_array_equal(scales[:, 0], form.row_scales)
        made = content.operand(function, made, "data")
    assert made.type == "constexpr_lut_to_dense"
    indices = content.operand(function, made, "indices")
    np.testing.assert_array_equal(indices, form.main.indices())
    table, stored = content.operand(function, made, "lut"), form.main.codebooks.numpy()
    length = form.main.vector_length
    assert table.shape == (*stored.shape[:2], 1 << form.main.index_bits, length)
    np.testing.assert_array_equal(table[:, :, : stored.shape[2]], stored)
    if length > 1:
        assert content.operand(function, made, "vector_axis") == 0


def check_dense(content: PackageContent, function: str, name: str, form: DenseWeight) -> None:
    made = content.functions[function][identifier(f"{name}.weight")]
    stored = content.array(made.attributes["val"])
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, form.dequantize().half())


_CHECKS = {AffineWeight: check_affine, CodebookWeight: check_codebook, DenseWeight: check_dense}


def test_every_code_of_every_layer(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = mix_forms(tiny_checkpoint)
    places = functions_of(checkpoint, export(checkpoint, tmp_path))
    for linear in checkpoint.spec.linears():
        form = checkpoint.form(linear.name)
        _CHECKS[type(form)](*places[linear.part], linear.name, form)
    if checkpoint.spec.decoder.tied_head:
        name = checkpoint.spec.decoder.embedding
        form = checkpoint.form(name)
        _CHECKS[type(form)](*places["head"], name, form)


@pytest.mark.parametrize("bits", [None, 4])
def test_every_array_is_stored_once(
    tiny_checkpoint: Checkpoint, tmp_path: Path, bits: int | None
) -> None:
    checkpoint = tiny_checkpoint if bits is None else quantize_checkpoint(tiny_checkpoint, bits)
    for package in sorted(export(checkpoint, tmp_path).iterdir()):
        content = PackageContent(package)
        places = {place for name in content.functions for place in content.places(name)}
        blobs = [content.blob(place) for place in sorted(places)]
        large = [blob for blob in blobs if len(blob) > 256]
        assert len(set(large)) == len(large)
        # The file holds nothing that no function refers to: header, records, padding, arrays.
        used = 64 + sum(64 + -(-len(blob) // 64) * 64 for blob in blobs)
        assert used == len(content.weights)
        if package.name == "decoder.mlpackage":
            assert set(content.places("prefill")) == set(content.places("decode"))
            if checkpoint.spec.decoder.tied_head:
                assert set(content.places("embedding")) <= set(content.places("decode"))


def test_codebooks_that_layers_share_are_stored_once(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shared = make_codebook(64, 8, bits=8, length=4)
    for linear in tiny_checkpoint.spec.linears():
        if linear.part != "decoder":
            continue
        own = make_codebook(linear.out_features, linear.in_features, bits=8, length=4, seed=1)
        indices = own.main.indices()
        form = CodebookWeight(
            main=type(own.main).from_indices(
                indices.to(dtype=shared.main.packed.dtype), shared.main.codebooks, index_bits=8
            )
        )
        tiny_checkpoint.set_form(linear.name, form)
    content = PackageContent(export(tiny_checkpoint, tmp_path) / "decoder.mlpackage")
    tables = {
        operation.inputs["lut"].arguments[0].value.blobFileValue.offset
        for operation in content.functions["decode"].values()
        if operation.type == "constexpr_lut_to_dense"
    }
    assert len(tables) == 1
