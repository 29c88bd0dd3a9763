"""Masks survive quantizers: what a pruning method set to zero is exactly zero after each."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import factorize
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer, Gptq, quantize_affine
from pocketvlm.compress.quantization.affine.grid import GRIDS, AffineScheme
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest, round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.normalization import row_scales_of
from pocketvlm.compress.quantization.codebook.quantizer import CodebookQuantizer
from pocketvlm.compress.quantization.codebook.refinement import Metric, refine_tables
from pocketvlm.compress.quantization.codebook.rounding import Table, decode_tables
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.stage import Codebook
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import total_stored_bytes
from pocketvlm.weights.nonzeros import AffineNonzeros, CodebookNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight

# Test folders are not packages, so neighbours are loaded by their paths.
_FOLDER = Path(__file__).parent


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


textbook = _load(_FOLDER.parent / "textbook.py")
functions = _load(_FOLDER / "functions.py")

SCHEMES = {
    "asymmetric": AffineScheme(bits=3),
    "symmetric": AffineScheme(bits=3, symmetric=True),
    "restricted": AffineScheme(bits=3, symmetric=True, restricted=True),
    "float zeros": AffineScheme(bits=3, float_zeros=True),
}


def problem(rows, columns, *, seed, density=0.5, tokens=300):
    """A weight, a mask, and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = torch.randn(tokens, columns, generator=generator) @ mixing
    X = X * torch.exp(torch.randn(columns, generator=generator))
    X = X + 0.5 * torch.randn(tokens, 1, generator=generator)
    W = torch.randn(rows, columns, generator=generator) + 0.5
    keeps = torch.rand(rows, columns, generator=generator) < density
    keeps[0, 0] = True
    moments = [SecondMoment(columns), SecondMoment(columns)]
    moments[0].add(X[tokens // 8 :])
    moments[1].add(X[: tokens // 8])
    return W, keeps, InputMoments(calibration=moments[0], held_out=moments[1])


def masked(W, keeps):
    return SparseWeight.from_form(DenseWeight(values=W), keeps)


def layer(rows, columns):
    return LinearSpec(
        name="layer",
        part="decoder",
        role="q_proj",
        block=0,
        out_features=rows,
        in_features=columns,
        has_bias=False,
    )


def hessian_of(moments):
    feedback = ErrorFeedback(damping=0.01, order="group_aware")
    return InputHessian.from_moments(moments, feedback)


def output_loss(form, weight, hessian):
    D = (form.dequantize() - weight.dequantize()).double()
    (H,) = hessian.hessians
    return float(torch.einsum("ri,ij,rj->", D, H.double(), D))


def assert_masked(form, keeps, kind):
    assert isinstance(form, SparseWeight)
    assert isinstance(form.values, kind)
    assert form.shape == tuple(keeps.shape)
    assert torch.equal(form.keeps(), keeps)
    assert bool((form.dequantize()[~keeps] == 0).all())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_grid_behind_a_mask_is_that_of_the_kept_weights_alone(name, kind):
    W, keeps, _ = problem(12, 24, seed=1)
    keeps[3] = False
    keeps[4], keeps[4, 7] = False, True
    importance = torch.rand(24, generator=torch.Generator().manual_seed(2))
    W[~keeps] = 50.0  # what errors of other columns left there
    found = GRIDS[kind](W, SCHEMES[name], importance, keeps)
    for row in range(12):
        own = W[row][keeps[row]]
        if not len(own):
            own = torch.zeros(1)
        weights = importance[keeps[row]] if len(importance[keeps[row]]) else torch.ones(1)
        alone = GRIDS[kind](own, SCHEMES[name], weights)
        assert found.scale[row] == alone.scale
        assert found.zero[row] == alone.zero


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", ["natural", "group_aware"])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 16), (200, 32), (150, 150), (7, 3)])
def test_masked_error_feedback_agrees_with_the_textbook(
    columns, group_size, order, symmetric, static_groups
):
    W, keeps, moments = problem(6, columns, seed=columns)
    keeps[5] = False
    W = (W * keeps).double()
    (H,) = moments.calibration.blocks()
    H = H.double()
    options = {"group_size": group_size, "static_groups": static_groups}
    expected = textbook.textbook_gptq(
        *(W.numpy(), H.numpy()),
        **(options | {"bits": 3, "symmetric": symmetric, "order": order, "keeps": keeps.numpy()}),
    )
    factor = factorize(H, group_size=group_size, damping=0.01, order=order)
    scheme = AffineScheme(bits=3, symmetric=symmetric)
    codes, grid = quantize_affine(W, factor, scheme, keeps=keeps, **options)
    np.testing.assert_array_equal(grid.scale.numpy(), expected[1])
    np.testing.assert_array_equal(grid.zero.numpy(), expected[2])
    codes = codes[:, :columns]
    np.testing.assert_array_equal(codes[keeps].numpy(), expected[0][:, :columns][keeps.numpy()])


def test_kept_columns_make_up_for_dropped_ones():
    """Error feedback on targets that a mask drops loses less output than leaving them out."""
    W, keeps, moments = problem(8, 64, seed=3)
    W = W.double()
    H = moments.calibration.blocks()[0].double()
    factor = factorize(H, group_size=16, damping=0.01, order="natural")
    codes, grid = quantize_affine(W, factor, AffineScheme(bits=8), group_size=16, keeps=keeps)
    groups = codes.view(8, 4, 16)
    fitted = ((groups - grid.zero[..., None]) * grid.scale[..., None]).view(8, 64) * keeps
    left_out = W * keeps
    losses = [float(torch.einsum("ri,ij,rj->", D, H, D)) for D in (fitted - W, left_out - W)]
    assert losses[0] < 0.9 * losses[1]


CASES = st.tuples(
    st.integers(1, 12),
    st.integers(4, 60),
    st.integers(0, 10_000),
    st.floats(0.05, 1.0),
)


@given(case=CASES, name=st.sampled_from(sorted(SCHEMES)), kind=st.sampled_from(sorted(GRIDS)))
@settings(max_examples=25, deadline=None)
def test_integers_keep_every_mask(case, name, kind):
    rows, columns, seed, density = case
    W, keeps, moments = problem(rows, columns, seed=seed, density=density)
    weight, scheme = masked(W, keeps), SCHEMES[name]
    rounded, error = round_to_nearest(weight, scheme=scheme, group_size=4, grid=kind)
    assert_masked(rounded, keeps, AffineNonzeros)
    lost = (rounded.dequantize() - weight.dequantize()).double().square().sum()
    expected = float(lost / weight.dequantize().double().square().sum())
    # Where all but nothing is lost, float32 differences decide: relative to the weight, 1e-10.
    assert error == pytest.approx(expected, rel=1e-4, abs=1e-10)
    rule = WeightRule(
        bits=3,
        group_size=4,
        symmetric=scheme.symmetric,
        restricted=scheme.restricted,
        zero_point="float" if scheme.float_zeros else "integer",
    )
    linear = layer(*weight.shape)
    fitted = AffineQuantizer(grid=kind).fit(rule, linear, weight, hessian_of(moments))
    assert_masked(fitted, keeps, AffineNonzeros)


@given(case=CASES, normalize=st.sampled_from(["none", "rows"]), feedback=st.booleans())
@settings(max_examples=15, deadline=None)
def test_palettes_keep_every_mask(case, normalize, feedback):
    rows, columns, seed, density = case
    W, keeps, moments = problem(rows, columns, seed=seed, density=density)
    keeps[:, :4] = True  # a table of four values needs as many
    weight = masked(W, keeps)
    rule = CodebookRule(index_bits=2, vector_length=1, normalize=normalize, share="layer")
    linear, hessian = layer(rows, columns), hessian_of(moments)
    method = CodebookQuantizer(error_feedback=feedback, rounds=2)
    for form in (
        method.round(rule, linear, weight),
        method.fit(rule, linear, weight, hessian),
    ):
        assert_masked(form, keeps, CodebookNonzeros)


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (WeightRule(bits=3, group_size=16), AffineQuantizer()),
        (WeightRule(bits=2, group_size=16), AffineQuantizer(grid="mse", static_groups=True)),
        (WeightRule(bits=3, group_size=16, symmetric=True), AffineQuantizer()),
        (WeightRule(bits=3, group_size=16, zero_point="float"), AffineQuantizer()),
        (
            CodebookRule(index_bits=3, vector_length=1, share="layer"),
            CodebookQuantizer(),
        ),
        (
            CodebookRule(index_bits=3, vector_length=1, rows_a_group=8, normalize="none"),
            CodebookQuantizer(),
        ),
    ],
)
@pytest.mark.parametrize("density", [0.5, 0.9])
def test_feedback_behind_a_mask_beats_rounding_behind_the_same(rule, method, density):
    W, keeps, moments = problem(32, 96, seed=11, density=density)
    weight = masked(W, keeps)
    linear = layer(32, 96)
    hessian = hessian_of(moments)
    plain = method.round(rule, linear, weight)
    done = method.compress(Assignment(linear=linear, rule=rule), weight, hessian)
    assert not done.row["plain"]
    assert done.row["loss"] < done.row["loss_rtn"]
    assert done.row["sparsity"] == pytest.approx(1 - float(keeps.double().mean()))
    assert torch.equal(done.form.keeps(), keeps)
    assert output_loss(done.form, weight, hessian) < 0.8 * output_loss(plain, weight, hessian)


def test_a_row_scale_is_that_of_the_kept_weights():
    W, keeps, _ = problem(6, 20, seed=4)
    keeps[2] = False
    found = row_scales_of(W * keeps, keeps)
    for row in range(6):
        own = W[row][keeps[row]].double()
        expected = own.square().mean().sqrt() if len(own) else torch.ones(())
        assert found[row] == expected.to(torch.float16)


def test_tables_are_refined_for_kept_elements_alone():
    """With a diagonal metric the best entry is the mean of the kept elements that name it."""
    W, keeps, _ = problem(6, 20, seed=5)
    targets, mask = W.T.contiguous(), keeps.T.contiguous()
    codes = torch.randint(0, 3, (20, 6), generator=torch.Generator().manual_seed(0))
    metric = Metric(slices=(slice(0, 20),), hessians=(torch.eye(20),))
    table = Table(columns=torch.arange(20), first=torch.zeros(1, 4, 1))
    (found,) = refine_tables([table], codes, targets, metric, torch.ones(6), keeps=mask)
    for entry in range(3):
        mean = targets[(codes == entry) & mask].mean()
        assert found.first[0, entry, 0] == pytest.approx(float(mean), rel=2e-3)
    assert bool((decode_tables([found], codes, 6, mask)[~mask] == 0).all())


# Whole models.


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 6)


def prune(checkpoint, density=0.5, parts=("decoder",)):
    """Masks that keep random elements of every layer of some parts."""
    generator = torch.Generator().manual_seed(0)
    for linear, form in checkpoint.forms().items():
        if linear.part in parts:
            keeps = torch.rand(form.shape, generator=generator) < density
            checkpoint.set_form(linear.name, SparseWeight.from_form(form, keeps))
    return checkpoint


def masks_of(checkpoint):
    return {
        linear.name: form.keeps()
        for linear, form in checkpoint.forms().items()
        if isinstance(form, SparseWeight)
    }


AFFINE = (WeightRule(bits=4, group_size=16),)
PALETTE = (CodebookRule(index_bits=3, vector_length=1, share="auto"),)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (RoundToNearest(rules=AFFINE), AffineNonzeros),
        (Gptq(rules=AFFINE, drift_share=0.5), AffineNonzeros),
        (Codebook(rules=PALETTE, rounds=1, tune_steps=4, tune_rate=1e-2), CodebookNonzeros),
        (
            Codebook(rules=(CodebookRule(index_bits=3, vector_length=1, share="part"),), rounds=1),
            CodebookNonzeros,
        ),
    ],
)
def test_a_stage_quantizes_behind_the_masks(tiny_paths, samples, tmp_path, stage, kind):
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]))
    masks = masks_of(checkpoint)
    assert masks
    scratch = tmp_path / "scratch"
    done = stage.apply(checkpoint, samples, RunContext(scratch_dir=scratch))
    rows = {row["name"]: row for row in done.history[-1].layers}
    for linear, form in done.forms().items():
        if linear.name not in masks:
            assert not isinstance(form, SparseWeight)
            assert rows[linear.name]["sparsity"] == 0
            continue
        assert_masked(form, masks[linear.name], kind)
        assert rows[linear.name]["sparsity"] == 1 - form.density
    assert sum(row["stored_bytes"] for row in rows.values()) == total_stored_bytes(
        done.forms().values()
    )
    done.save(tmp_path / "saved")
    back = Checkpoint.load(tmp_path / "saved")
    again = stage.apply(
        prune(Checkpoint.load(tiny_paths["smolvlm"])), samples, RunContext(scratch_dir=scratch)
    )
    for linear, form in done.forms().items():
        for other in (back, again):
            assert torch.equal(other.form(linear.name).dequantize(), form.dequantize())


def test_layers_that_share_tables_share_them_behind_masks_too(tiny_paths, samples):
    rule = CodebookRule(part="decoder", index_bits=3, vector_length=1, share="part")
    done = Codebook(rules=(rule,), rounds=1).apply(
        prune(Checkpoint.load(tiny_paths["smolvlm"])), samples, RunContext()
    )
    forms = [form for linear, form in done.forms().items() if linear.part == "decoder"]
    assert len({form.values.codebooks.data_ptr() for form in forms}) == 1


def test_mixed_precision_counts_masked_bytes(tiny_paths, samples):
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]))
    masks = masks_of(checkpoint)
    vectors = CodebookRule(index_bits=4, vector_length=2, share="layer")
    stage = MixedPrecision(
        options=(*(WeightRule(bits=bits, group_size=16) for bits in (2, 4)), vectors),
        average_bits=4.5,
        samples=2,
        held_out=0.34,
    )
    done = stage.apply(checkpoint, samples, RunContext())
    record = done.history[-1]
    size = 0
    for row in record.layers:
        form = done.form(row["name"])
        assert row["chosen_bytes"] == form.stored_bytes
        size += form.stored_bytes
        if row["name"] in masks:
            assert_masked(form, masks[row["name"]], AffineNonzeros)
    assert record.metrics["chosen_bytes"] == size <= record.metrics["budget_bytes"]
    assert any(
        f"{len(masks)} pruned layers were not offered index_bits=4" in note for note in record.notes
    )
    dense = stage.plan(PlanState.of(checkpoint.spec)).layouts
    assert len(dense) == len(record.layers)


def test_onnx_stores_no_mask_and_is_counted_so(tiny_paths, samples):
    """At a budget that only masked bytes fit into, `codes` fits and `onnx` is refused."""
    options = (WeightRule(bits=4, group_size=32),)
    budget = {"options": options, "average_bits": 4.2, "samples": 2, "held_out": 0.34}
    parts = ("decoder", "tower", "projector")
    fits = MixedPrecision(**budget)
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]), 0.4, parts)
    fits.apply(checkpoint, samples, RunContext())
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]), 0.4, parts)
    with pytest.raises(RecipeError, match="below the smallest"):
        replace(fits, stored_as="onnx").apply(
            checkpoint, samples, RunContext(layer_bytes=layer_bytes_by_target(()))
        )


@pytest.mark.parametrize(
    "options",
    [
        {"index_bits": 4, "vector_length": 2},
        {"index_bits": 4, "vector_length": 1, "normalize": "columns", "share": "layer"},
        {"index_bits": 4, "vector_length": 1, "residual_bits": 2},
        {"index_bits": 4, "vector_length": 1, "outliers": 0.1, "outlier_bits": 4},
        {"index_bits": 4, "vector_length": 1, "column_groups": 2},
    ],
)
def test_codebooks_without_single_elements_are_refused(tiny_paths, samples, options):
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]))
    stage = Codebook(rules=(CodebookRule(part="decoder", **options),))
    with pytest.raises(RecipeError, match=r"self_attn.*mask has to survive.*vector_length 1"):
        stage.apply(checkpoint, samples, RunContext())


def test_a_quantized_mask_is_quantized_already(tiny_paths, samples):
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]))
    rules = (WeightRule(part="decoder", bits=4, group_size=16),)
    done = RoundToNearest(rules=rules).apply(checkpoint, samples, RunContext())
    for stage in (RoundToNearest(rules=rules), MixedPrecision(options=AFFINE, average_bits=8)):
        with pytest.raises(RecipeError, match="quantized already"):
            stage.apply(done, samples, RunContext())


def test_scales_fold_through_masks(tiny_paths, samples):
    parts = ("decoder", "tower")
    checkpoint = functions.plant_outliers(Checkpoint.load(tiny_paths["smolvlm"]))
    checkpoint = prune(checkpoint, 0.7, parts)
    masks, before = masks_of(checkpoint), functions.logits_of(checkpoint)
    done = Awq(rules=(WeightRule(bits=3, group_size=16),)).apply(checkpoint, samples, RunContext())
    assert done.history[-1].metrics["layers_scaled"] > 0
    # Masked weights are float16, so that a folded scale rounds each of them once more.
    assert functions.relative_error(functions.logits_of(done), before) < 5e-3
    for name, keeps in masks.items():
        assert_masked(done.form(name), keeps, FloatNonzeros)


def test_a_rotation_refuses_masks(tiny_paths, samples):
    checkpoint = prune(Checkpoint.load(tiny_paths["smolvlm"]))
    with pytest.raises(RecipeError, match=r"is pruned.*rotate before.*or awq"):
        Rotate(residual=False).apply(checkpoint, samples, RunContext())


def test_dense_layers_are_what_they_were():
    W, _, _ = problem(8, 48, seed=6)
    form, _ = round_to_nearest(DenseWeight(values=W), scheme=SCHEMES["asymmetric"], group_size=16)
    assert isinstance(form, AffineWeight)
