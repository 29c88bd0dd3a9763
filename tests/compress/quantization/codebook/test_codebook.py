"""Codebooks with error feedback: the kernel, the plan, the stage and what a killed run leaves."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import factorize, quantize_with_feedback
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook import normalization, rounding
from pocketvlm.compress.quantization.codebook.fit import fit_codebooks, round_to_codebooks
from pocketvlm.compress.quantization.codebook.kmeans import nearest_centroids
from pocketvlm.compress.quantization.codebook.refinement import (
    Metric,
    best_row_scales,
    output_loss,
    refine_tables,
)
from pocketvlm.compress.quantization.codebook.rounding import (
    CodebookRounding,
    Table,
    decode_tables,
)
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.stage import Codebook
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.stages import PlanState
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import total_stored_bytes

SMALL = (CodebookRule(index_bits=4),)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 8)


def problem(rows=64, columns=96, tokens=400, seed=0):
    """A weight and inputs that are correlated and differ in strength."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(tokens, columns // 4, generator=generator) @ basis
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    inputs *= torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    weights = torch.randn(rows, columns, generator=generator)
    weights *= torch.logspace(-0.3, 0.3, rows)[:, None]
    return weights, inputs


def weigh(inputs, order="group_aware"):
    moment = SecondMoment(inputs.shape[1], block=None)
    moment.add(inputs[None])
    return InputHessian.from_moments(
        InputMoments(calibration=moment, held_out=None),
        ErrorFeedback(damping=0.01, order=order),
    )


def output_error(form, weights, inputs):
    change = (form.dequantize() - weights).double()
    return float((inputs.double() @ change.T).square().sum())


def linear(rows, columns, part="decoder", name="a.b"):
    return LinearSpec(
        name=name,
        part=part,
        role="q_proj",
        block=0,
        in_features=columns,
        out_features=rows,
        has_bias=False,
    )


def stored(checkpoint):
    return {
        item.name: {
            key: value.view(torch.uint8).numpy().tobytes()
            for key, value in form.to_tensors().items()
        }
        for item, form in checkpoint.forms().items()
    }


def stored_once(checkpoint):
    return total_stored_bytes({id(form): form for form in checkpoint.forms().values()}.values())


def test_feedback_is_that_of_the_textbook():
    """Column by column with the inverse Hessian itself, vectors found by a loop."""
    weights, inputs = problem(rows=12, columns=20)
    generator = torch.Generator().manual_seed(5)
    book = torch.randn(1, 16, 4, generator=generator)
    scales = torch.rand(12, generator=generator) + 0.5
    hessian = (inputs.T @ inputs).double()
    factor = factorize(hessian, group_size=20, damping=0.01, order="natural")
    table = Table(columns=torch.arange(20), first=book)
    rounding = CodebookRounding([table], torch.arange(20), scales)
    codes = quantize_with_feedback(weights.double(), factor, rounding)
    W = weights.double().clone()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20))
    for column in range(20):
        for vector in range(3):
            own = slice(4 * vector, 4 * vector + 4)
            distances = [
                float((scales[own].double() * (W[own, column] - entry).square()).sum())
                for entry in book[0].double()
            ]
            assert int(codes[column, vector]) == distances.index(min(distances))
        found = book[0].double()[codes[column]].reshape(-1)
        error = (W[:, column] - found) / inverse[column, column]
        W -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1


def test_the_sum_of_two_codebooks_is_found_as_well_as_by_trying_all():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 8, 2, generator=generator)
    second = 0.3 * torch.randn(1, 8, 2, generator=generator)
    table = Table(columns=torch.arange(1), first=first, second=second)
    column = torch.randn(400, generator=generator)
    codes, decoded = CodebookRounding([table], torch.arange(1), torch.ones(400)).round(column)
    sums = (first[0][:, None] + second[0]).reshape(-1, 2)
    best = sums[nearest_centroids(column.view(-1, 2), sums)].reshape(-1)
    assert codes.shape == (400,)
    reached, least = ((found - column).square().sum() for found in (decoded, best))
    assert float(reached) <= 1.01 * float(least)
    assert torch.equal(decode_tables([table], codes[None], 400)[0], decoded)


def test_refined_tables_are_least_squares():
    """Against the normal equations, solved densely."""
    weights, inputs = problem(rows=8, columns=16)
    hessian = (inputs.T @ inputs).double()
    generator = torch.Generator().manual_seed(0)
    table = Table(columns=torch.arange(16), first=torch.randn(1, 4, 2, generator=generator))
    codes = torch.randint(0, 4, (16, 4), generator=generator)
    importance = torch.rand(8, generator=generator) + 0.5
    metric = Metric(slices=(slice(0, 16),), hessians=(hessian.float(),))
    (found,) = refine_tables([table], codes, weights.T.contiguous(), metric, importance, steps=40)
    for place in range(2):
        A, b = torch.zeros(4, 4).double(), torch.zeros(4).double()
        for vector in range(4):
            row = 2 * vector + place
            one_hot = torch.nn.functional.one_hot(codes[:, vector], 4).double()
            A += importance[row] * one_hot.T @ hessian @ one_hot
            b += importance[row] * one_hot.T @ hessian @ weights[row].double()
        expected = torch.linalg.solve(A, b)
        assert torch.allclose(found.first[0, :, place].double(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["lut", "residual"])
def test_a_descent_that_stops_early_loses_little(name):
    weights, inputs = problem()
    targets = weights.T.contiguous()
    metric = Metric(slices=(slice(0, 96),), hessians=(inputs.T @ inputs,))
    generator = torch.Generator().manual_seed(0)
    length = RULES[name].vector_length
    books = [0.7 * torch.randn(1, 16, length, generator=generator) for _ in range(2)]
    second = None if name == "lut" else books[1] / 4
    table = Table(columns=torch.arange(96), first=books[0], second=second)
    rounding = CodebookRounding([table], torch.arange(96), torch.ones(64))
    codes = torch.stack([rounding.round(column)[0] for column in targets])
    losses = []
    for options in ({}, {"steps": 40, "tolerance": 0.0}):
        tables = refine_tables([table], codes, targets, metric, torch.ones(64), **options)
        errors = decode_tables(tables, codes, 64) - targets
        losses.append(output_loss(errors, metric, torch.ones(64)))
    assert losses[0] < 1.001 * losses[1]


def test_threads_show_in_no_code():
    generator = torch.Generator().manual_seed(0)
    table = Table(columns=torch.arange(20), first=torch.randn(1, 256, 4, generator=generator))
    columns = torch.randn(20, 4096, generator=generator)
    importance = torch.rand(4096, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rounding = CodebookRounding([table], torch.arange(20), importance)
            found.append(torch.stack([rounding.round(column)[0] for column in columns]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_row_scales_are_least_squares():
    weights, inputs = problem(rows=6, columns=10)
    metric = Metric(slices=(slice(0, 10),), hessians=(inputs.T @ inputs,))
    decoded = weights.T.round()
    scales = best_row_scales(decoded, weights.T, metric)
    best = output_loss(decoded * scales - weights.T, metric, torch.ones(6))
    for factor in (0.98, 1.02):
        other = output_loss(decoded * scales * factor - weights.T, metric, torch.ones(6))
        assert best < other


RULES = {
    "vectors": CodebookRule(index_bits=6),
    "lut": CodebookRule(index_bits=2, vector_length=1),
    "row groups": CodebookRule(index_bits=4, vector_length=2, rows_a_group=16, share="layer"),
    "column groups": CodebookRule(index_bits=5, column_groups=3),
    "residual": CodebookRule(index_bits=4, residual_bits=4),
    "outliers": CodebookRule(index_bits=4, outliers=0.1, outlier_bits=5),
    "columns": CodebookRule(index_bits=6, normalize="columns"),
    "bare": CodebookRule(index_bits=6, normalize="none"),
    "all": CodebookRule(
        index_bits=4, residual_bits=3, outliers=0.07, outlier_bits=4, column_groups=2,
        rows_a_group=32, normalize="columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_feedback_beats_nearest_vectors_with_every_option(name):
    weights, inputs = problem()
    hessian, rule = weigh(inputs), RULES[name]
    form, alone = (
        fit_codebooks(rule, weights.double(), hessian, error_feedback=feedback)
        for feedback in (True, False)
    )
    plain = round_to_codebooks(rule, weights)
    assert output_error(form, weights, inputs) < 0.5 * output_error(alone, weights, inputs)
    assert output_error(form, weights, inputs) < 0.4 * output_error(plain, weights, inputs)


@pytest.mark.parametrize("name", ["vectors", "lut"])
def test_codebooks_beat_a_scalar_grid_of_as_many_bits(name):
    weights, inputs = problem(rows=256)
    hessian = weigh(inputs)
    rule = CodebookRule(index_bits=8) if name == "vectors" else RULES["lut"]
    form = fit_codebooks(rule, weights.double(), hessian)
    affine = AffineQuantizer(grid="mse").fit(
        WeightRule(bits=2, group_size=96),
        linear(*weights.shape),
        DenseWeight(values=weights),
        hessian,
    )
    assert output_error(form, weights, inputs) < 0.8 * output_error(affine, weights, inputs)


def test_rows_of_a_table_count_alike():
    """Small rows beside large ones in one vector keep their own directions."""
    weights, inputs = problem()
    weights[::4] *= 30
    small = weights[1]
    options = {"rule": RULES["vectors"], "hessian": weigh(inputs)}
    errors = [
        float((fit_codebooks(targets=weights.double(), rows_alike=alike, **options)
               .dequantize()[1] - small).norm() / small.norm())
        for alike in (True, False)
    ]  # fmt: skip
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    "rule",
    [
        CodebookRule(index_bits=4, vector_length=2),
        CodebookRule(index_bits=3, vector_length=1),
        CodebookRule(index_bits=4, vector_length=2, residual_bits=3),
        CodebookRule(index_bits=3, vector_length=1, rows_a_group=16),
    ],
)
def test_pieces_of_rows_do_not_show(rule, monkeypatch):
    """Wide tables are gone through in pieces; tables that tie rows together stay whole."""
    weights, inputs = problem(rows=128)
    hessian = weigh(inputs)
    whole = fit_codebooks(rule, weights.double(), hessian)
    monkeypatch.setattr(rounding, "_PIECE_ELEMENTS", 96 * 10)
    monkeypatch.setattr(normalization, "_CHUNK_ELEMENTS", 96 * 10)
    pieces = fit_codebooks(rule, weights.double(), hessian)
    # Sums of pieces differ in their last bits, and seldom a near tie with them.
    same = (whole.main.indices() == pieces.main.indices()).double().mean()
    assert same > 0.98
    lost = output_error(pieces, weights, inputs)
    assert lost == pytest.approx(output_error(whole, weights, inputs), rel=0.01)


def test_pieces_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(rounding, "_PIECE_ELEMENTS", 100)
    book = torch.zeros(1, 4, 2)
    plain = Table(columns=torch.arange(10), first=book)
    found = list(rounding.row_pieces([plain], 10, 24))
    assert [rows for rows, _ in found] == [slice(0, 10), slice(10, 20), slice(20, 24)]
    assert [codes for _, codes in found] == [slice(0, 5), slice(5, 10), slice(10, 12)]
    for tied in (
        Table(columns=torch.arange(10), first=book, second=book),
        Table(columns=torch.arange(10), first=book.expand(2, 4, 2)),
    ):
        assert list(rounding.row_pieces([tied], 10, 24)) == [(slice(0, 24), slice(None))]


def test_two_runs_give_the_same_bytes():
    weights, inputs = problem()
    first, second = (
        fit_codebooks(RULES["all"], weights.double(), weigh(inputs)).to_tensors() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=25, deadline=None)
@given(
    index_bits=st.integers(1, 5),
    length=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([None, 8, 16]),
    column_groups=st.integers(1, 3),
    residual=st.sampled_from([None, 2]),
    outliers=st.sampled_from([0.0, 0.1]),
    normalize=st.sampled_from(["none", "rows", "columns"]),
)
def test_planned_bytes_are_stored_bytes(
    index_bits, length, groups, column_groups, residual, outliers, normalize
):
    weights = torch.randn(32, 30, generator=torch.Generator().manual_seed(0))
    rule = CodebookRule(
        index_bits=index_bits,
        vector_length=length,
        rows_a_group=groups,
        column_groups=column_groups,
        residual_bits=residual,
        outliers=outliers,
        outlier_bits=3,
        normalize=normalize,
        share="layer",
    )
    try:
        planned = rule.plan(linear(32, 30))
    except RecipeError:
        reject()
    form = round_to_codebooks(rule, weights)
    assert form.stored_bytes == planned.stored_bytes(32, 30)
    assert form.shape == (32, 30)


@pytest.mark.parametrize(
    ("rule", "rows", "what"),
    [
        (CodebookRule(index_bits=4, vector_length=5), 64, "vector_length 5 does not divide"),
        (CodebookRule(index_bits=4, rows_a_group=48), 64, "rows_a_group 48 does not divide"),
        (CodebookRule(index_bits=12, share="layer"), 64, "asks for 4096 centroids"),
        (CodebookRule(index_bits=9, share="layer"), 32, "cost more than they save"),
        (CodebookRule(index_bits=4, column_groups=50), 64, "column_groups 50"),
        (CodebookRule(index_bits=4, outliers=0.1, outlier_length=3), 64, "outlier_length 3"),
    ],
)
def test_a_plan_that_cannot_be_or_does_not_pay_is_refused(rule, rows, what):
    with pytest.raises(RecipeError, match=what):
        rule.plan(linear(rows, 64))


@pytest.mark.parametrize(
    "options",
    [
        {"index_bits": 0},
        {"index_bits": 17},
        {"index_bits": 4, "vector_length": 0},
        {"index_bits": 4, "outliers": 0.6},
        {"index_bits": 4, "normalize": "cells"},
        {"index_bits": 4, "share": "all"},
        {"index_bits": 4, "rows_a_group": 6},
        {"index_bits": 4, "share": "part", "column_groups": 2},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must|shared|multiple"):
        CodebookRule(**options)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"tune_steps": -1}, {"tune_rate": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Codebook(rules=SMALL, **options)


def test_small_layers_share_codebooks_and_the_plan_knows(tiny_checkpoint, samples, tmp_path):
    stage = Codebook(rules=SMALL, tune_steps=0)
    planned = stage.plan(PlanState.of(tiny_checkpoint.spec)).layouts
    done = stage.apply(tiny_checkpoint, samples, RunContext())
    rows = {row["name"]: row for row in done.history[-1].layers}
    shared = [item for item, form in planned.items() if form.is_shared]
    assert len(shared) > 4
    for item, form in done.forms().items():
        assert isinstance(form, CodebookWeight)
        assert rows[item.name]["is_shared"] == planned[item].is_shared
        assert rows[item.name]["method"] in ("vptq", "k-means")
        assert rows[item.name]["bits"] == 1
    for part in {item.part for item in shared}:
        books = {
            done.form(item.name).main.codebooks.data_ptr() for item in shared if item.part == part
        }
        assert len(books) == 1
    total = sum(form.stored_bytes(i.out_features, i.in_features) for i, form in planned.items())
    assert stored_once(done) == total
    json.dumps(done.history[-1].layers, allow_nan=False)
    done.save(tmp_path / "saved")
    back = Checkpoint.load(tmp_path / "saved")
    assert stored(back) == stored(done)
    assert stored_once(back) == stored_once(done)


class _Stop(Exception):  # noqa: N818  (a signal of the test, not an error)
    pass


@pytest.mark.parametrize("tune_steps", [0, 3])
def test_a_stopped_run_goes_on_where_it_was(tiny_path, samples, tmp_path, tune_steps):
    stage = Codebook(rules=SMALL, tune_steps=tune_steps, rounds=1)
    whole = stage.apply(Checkpoint.load(tiny_path), samples, RunContext())

    def stop(progress):
        if progress.done == 9:
            raise _Stop

    scratch = tmp_path / "scratch"
    with pytest.raises(_Stop):
        stage.apply(
            Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=scratch, on_progress=stop)
        )
    resumed = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=scratch))
    assert stored(resumed) == stored(whole)
    assert stored_once(resumed) == stored_once(whole)


def test_tuning_brings_half_blocks_nearer_to_the_float_model(tiny_path, samples):
    stage = Codebook(rules=(CodebookRule(index_bits=4),), tune_steps=30, tune_rate=1e-2)
    done = stage.apply(Checkpoint.load(tiny_path), samples, RunContext())
    rows = [row for row in done.history[-1].layers if "tuned" in row]
    assert rows
    assert all(row["tuned"] for row in rows)
    kept = [row for row in rows if row["tuning_kept"]]
    assert len(kept) > len(rows) / 4
    for row in rows:
        assert (row["half_loss_after"] < row["half_loss_before"]) == row["tuning_kept"]
    assert sum(row["half_loss_after"] for row in kept) < 0.97 * sum(
        row["half_loss_before"] for row in kept
    )
