"""Fluctuation of units against its definition, and against magnitude where inputs are constant."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.width.channels import kept_units, unit_groups
from pocketvlm.compress.pruning.width.compensation import compensate, output_loss
from pocketvlm.compress.pruning.width.flap import Flap, fluctuation
from pocketvlm.compress.pruning.width.unit_scores import group_magnitude
from pocketvlm.context import RunContext
from tests.compress.pruning.width.test_compensation import correlated, exact_statistics


def test_fluctuation_is_variance_times_squared_column_norm():
    inputs, weight = correlated(0)
    expected = []
    for j in range(12):
        column = [float(row[j]) for row in inputs]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        expected.append(variance * sum(float(w) ** 2 for w in weight[:, j]))
    found = fluctuation(weight, exact_statistics(inputs).variance)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_it_is_what_the_output_loses_where_one_input_becomes_its_mean():
    inputs, weight = correlated(1)
    statistics = exact_statistics(inputs)
    scores = fluctuation(weight, statistics.variance)
    for j in range(12):
        kept = torch.tensor([index for index in range(12) if index != j])
        found = compensate(weight, statistics, kept, "bias", 0.0)
        loss = output_loss(weight, found.weight, found.shift, statistics, kept)
        assert float(scores[j]) == pytest.approx(loss, rel=1e-9)


def test_constants_go_first_and_magnitude_would_keep_them():
    inputs, weight = correlated(2)
    inputs[:, [3, 8]] = 7.0
    weight[:, [3, 8]] *= 5
    statistics = exact_statistics(inputs)
    scores = {
        "flap": fluctuation(weight, statistics.variance),
        "magnitude": weight.square().sum(0),
    }
    losses = {}
    for name, values in scores.items():
        kept = kept_units(values, 10)
        found = compensate(weight, statistics, kept, "bias", 0.0)
        losses[name] = output_loss(weight, found.weight, found.shift, statistics, kept)
    assert losses["flap"] == pytest.approx(0, abs=1e-9)
    assert losses["magnitude"] > 0.1


@pytest.mark.parametrize("kind", ["kv_groups", "ffn", "tower_ffn"])
def test_units_sum_their_channels(tiny_checkpoint: Checkpoint, kind: str):
    group = unit_groups(tiny_checkpoint.spec, kind)[0]
    columns = group.count * group.columns
    inputs = torch.randn(40, columns, dtype=torch.float64)
    statistics = exact_statistics(inputs)
    scorer = Flap().begin(tiny_checkpoint, [group], None, RunContext())
    found = scorer.score(group, tiny_checkpoint, statistics)
    weight = tiny_checkpoint.form(group.last).dequantize().double()
    assert found.shape == (group.count,)
    for unit in range(group.count):
        mine = range(unit * group.columns, (unit + 1) * group.columns)
        expected = sum(
            float(inputs[:, j].var(correction=0)) * float(weight[:, j].square().sum()) for j in mine
        )
        assert float(found[unit]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["kv_groups", "ffn", "tower_ffn"])
def test_magnitude_counts_every_weight_that_a_unit_owns(tiny_checkpoint: Checkpoint, kind: str):
    group = unit_groups(tiny_checkpoint.spec, kind)[1]
    found = group_magnitude(group, tiny_checkpoint)
    for unit in (0, group.count - 1):
        only = torch.tensor([unit])
        total = 0.0
        for name in group.rows:
            rows = tiny_checkpoint.form(name).dequantize()[group.rows_of(name, only)]
            total += float(rows.double().square().sum())
        columns = tiny_checkpoint.form(group.last).dequantize()[:, group.columns_of(only)]
        total += float(columns.double().square().sum())
        assert float(found[unit]) == pytest.approx(total, rel=1e-9)
