"""Searched schedules: what each promises of the schedule that it returns."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.schedule_trials import ScheduleTrials
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule import p_sigmoid
from pocketvlm.compress.tokens.schedule.budget import Macs, PrefillTime
from pocketvlm.compress.tokens.schedule.g_search import GSearch, fewest
from pocketvlm.compress.tokens.schedule.p_sigmoid import (
    PSigmoid,
    constant_curve,
    curve_within,
)
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.costs import ExportedModel
from pocketvlm.device_bench.prediction.decoder_work import count_decoder, decoder_operators
from pocketvlm.device_bench.prediction.operators import CachedAttention, Product
from pocketvlm.errors import RecipeError
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.reference.shapes import load_shape

SPEC = load_shape("smolvlm-256m").spec
DEPTH, TOKENS = SPEC.decoder.depth, SPEC.visual_tokens
PROMPTS = ((32, TOKENS), (20, 2 * TOKENS))
cost = PrefillMacs.of(SPEC, PROMPTS).share


@st.composite
def schedules(draw):
    layers = sorted(draw(st.sets(st.integers(1, DEPTH - 1), min_size=1, max_size=5)))
    keeps = sorted(
        draw(st.sets(st.integers(0, TOKENS - 1), min_size=len(layers), max_size=len(layers))),
        reverse=True,
    )
    drops = tuple(VisualDrop(layers=a, keep=b) for a, b in zip(layers, keeps, strict=True))
    ranked = draw(st.sampled_from(("layer_before", "layer_after")))
    return VisualSchedule(drops=drops, tokens=TOKENS, ranked_in=ranked)


@given(schedule=st.none() | schedules(), rows=st.tuples(st.integers(1, 60), st.integers(1, 200)))
@settings(max_examples=40, deadline=None)
def test_multiplications_are_those_of_the_predicted_graph(schedule, rows):
    text, visual = rows
    model = ExportedModel(
        spec=SPEC,
        kernels=dict.fromkeys(SPEC.linears(), "float32"),
        visual_tokens=TOKENS,
        visual_schedule=schedule,
    )
    decoder = count_decoder(model)
    operators = list(decoder_operators(decoder, text_rows=text, visual_rows=visual))
    (head,) = decoder.head.products
    counted = sum(op.macs for op in operators if isinstance(op, Product | CachedAttention))
    assert PrefillMacs.of(SPEC, [rows]).mean(schedule) == counted - head.macs


@given(passing=st.sets(st.integers(0, 40)), most=st.integers(1, 40))
def test_the_fewest_passes_and_is_the_smallest_where_passing_has_no_gaps(passing, most):
    passing = passing | {most}
    found = fewest(passing.__contains__, most)
    assert found in passing
    least = min(passing)
    if passing >= set(range(least, most + 1)):
        assert found == least


@given(
    budget=st.floats(0.35, 0.95),
    form=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(1, 60)),
)
@settings(max_examples=12, deadline=None)
def test_every_curve_spends_the_budget_and_no_more(budget, form):
    share = constant_curve(cost, budget, DEPTH, TOKENS).high
    curve = curve_within(
        cost,
        budget,
        DEPTH,
        TOKENS,
        high=share + (1 - share) * form[0],
        low=share * (1 - form[1]),
        steepness=form[2],
    )
    schedule = curve.schedule(DEPTH, TOKENS)
    assert cost(schedule) <= budget
    keeps = [drop.keep for drop in schedule.drops]
    assert all(after < before for before, after in pairwise([TOKENS, *keeps]))
    # Rounded to whole tokens, and no further from the budget than one token in every layer.
    one_less = VisualSchedule(drops=(VisualDrop(layers=1, keep=TOKENS - 1),), tokens=TOKENS)
    step = cost(None) - cost(one_less)
    assert cost(schedule) >= budget - 1.5 * step


def test_a_level_curve_is_the_constant_share():
    share = constant_curve(cost, 0.6, DEPTH, TOKENS)
    (drop,) = share.schedule(DEPTH, TOKENS).drops
    assert drop.layers == 1
    more = VisualSchedule(drops=(VisualDrop(layers=1, keep=drop.keep + 1),), tokens=TOKENS)
    assert cost(share.schedule(DEPTH, TOKENS)) <= 0.6 < cost(more)


def test_the_library_beats_random_points_of_the_same_number():
    def height(x, y, z):
        return -((x - 0.2) ** 2) - (y - 0.7) ** 2 - (z - 0.45) ** 2

    def best(seed):
        return max(p_sigmoid._bayesian_points(height, 16, seed))

    def random_best(seed):
        return max(height(*point) for point in np.random.default_rng(seed).random((16, 3)))

    assert best(0) > np.median([random_best(seed) for seed in range(200)]) / 4


@pytest.fixture(scope="module")
def reference():
    return Checkpoint.load(resolve_model("reference:pocket-llava"))


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 24)


@pytest.fixture(scope="module")
def strict(reference, samples):
    steps = []
    found = GSearch().find(reference, samples, RunContext(on_progress=steps.append))
    assert (steps[-1].done, steps[-1].total) == (
        len(found.layers),
        reference.spec.decoder.depth - 1,
    )
    return found


def test_g_search_loses_no_answer_and_no_layer_could_do_with_a_token_less(
    reference, samples, strict
):
    trials = ScheduleTrials(reference, samples)
    schedule, metrics = strict.schedule, strict.metrics
    assert trials.answers(schedule).right >= trials.plain.right == metrics["right_before"]
    assert trials.answers(schedule).loss <= trials.plain.loss == metrics["answer_loss_before"]
    assert metrics["right"] == trials.answers(schedule).right
    macs = PrefillMacs.of(reference.spec, trials.prompt_rows)
    assert metrics["prefill_macs_share"] == pytest.approx(macs.mean(schedule) / macs.mean(None))
    assert metrics["prefill_macs_share"] < 0.9
    assert schedule.drops[0].keep
    for number, drop in enumerate(schedule.drops):
        if drop.keep:
            less = VisualDrop(layers=drop.layers, keep=drop.keep - 1)
            tried = VisualSchedule(drops=(*schedule.drops[:number], less), tokens=schedule.tokens)
            answers = trials.answers(tried)
            assert answers.right < trials.plain.right or answers.loss > trials.plain.loss
    by_layer = schedule.rows_by_layer(reference.spec.decoder.depth, schedule.tokens)
    rows = [row["visual_tokens"] for row in strict.layers]
    assert rows == list(by_layer[1 : 1 + len(rows)])


def test_g_search_with_a_tolerance_may_lose_that_many(reference, samples, strict):
    search = GSearch(tolerance=0.25, loss_tolerance=None)
    found = search.find(reference, samples, RunContext())
    assert found.metrics["right"] >= found.metrics["right_before"] - 6
    assert found.metrics["prefill_macs_share"] < strict.metrics["prefill_macs_share"]


def test_p_sigmoid_is_no_worse_than_a_constant_share_of_the_same_cost(reference, samples):
    search = PSigmoid(budget=Macs(share=0.6), trials=10)
    found = search.find(reference, samples, RunContext())
    trials = ScheduleTrials(reference, samples)
    loss = trials.answers(found.schedule).loss
    assert loss == pytest.approx(found.metrics["answer_loss"])
    assert loss <= found.metrics["answer_loss_of_constant_share"]
    assert found.metrics["prefill_macs_share"] <= 0.6


def test_a_stage_gives_the_checkpoint_what_was_found(reference, samples):
    stage = DropTokens(schedule=PSigmoid(budget=Macs(share=0.6), trials=2))
    done = stage.apply(reference, samples, RunContext(threads=1))
    assert stage.apply(reference, samples, RunContext()).visual_schedule == done.visual_schedule
    record = done.history[-1]
    assert done.visual_schedule is not None
    assert record.calibration_sha256 is not None
    assert record.metrics["prefill_macs_share"] <= 0.6
    planned = plan_stages((stage,), reference.spec)
    assert "found on calibration samples" in planned.notes[-1]


def test_a_budget_below_the_text_is_refused(reference, samples):
    with pytest.raises(
        RecipeError, match=r"budget of 0\.050 of .* is below 0\.\d+ of .*which text"
    ):
        PSigmoid(budget=Macs(share=0.05)).find(reference, samples, RunContext())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GSearch(tolerance=1.0), "tolerance is 1.0"),
        (lambda: GSearch(tolerance=math.nan), "tolerance is nan"),
        (lambda: GSearch(loss_tolerance=-0.1), "loss_tolerance is -0.1"),
        (lambda: Macs(share=0.0), "share is 0.0"),
        (lambda: Macs(share=1.0), "share is 1.0"),
        (lambda: PrefillTime(most=0.0, device="galaxy-s25"), "most is 0.0"),
        (lambda: PrefillTime(most=math.inf, device="galaxy-s25"), "most is inf"),
        (lambda: PrefillTime(most=10.0, device="host"), "measured again"),
        (lambda: PSigmoid(trials=0), "trials is 0"),
        (lambda: PSigmoid(seed=-1), "seed is -1"),
    ],
)
def test_values_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()
