"""A budget of milliseconds is what `plan --device` predicts, and what the search keeps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.budget import PrefillTime, least_schedule
from pocketvlm.compress.tokens.schedule.p_sigmoid import PSigmoid
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError, RecipeError
from pocketvlm.pipeline.plan import plan, recipe_prefill_times
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.recipes.load import Recipe, recipe_from_document
from pocketvlm.reference.shapes import load_shape

DEVICE = "galaxy-s25"
SHAPE = load_shape("smolvlm-256m")
QUANTIZED = (
    {"method": "reduce_tokens", "keep": 0.5},
    {"method": "rtn", "rules": [{"match": ".*", "bits": 4, "group_size": 32}]},
)


def recipe(*stages: dict[str, Any], targets: tuple[str, ...] = ("onnx",)) -> Recipe:
    document = {
        "schema": 1,
        "name": "x",
        "stages": list(stages),
        "targets": [{"method": target} for target in targets],
    }
    return recipe_from_document(document, where="x")


def searched(most: float, device: str = DEVICE) -> dict[str, Any]:
    budget = {"kind": "prefill_ms", "most": most, "device": device}
    return {"method": "drop_tokens", "schedule": {"kind": "p_sigmoid", "budget": budget}}


def planned(budget: dict[str, Any], targets: tuple[str, ...] = ("onnx",)) -> tuple[str, ...]:
    reduce, quantize = QUANTIZED
    return plan(SHAPE, recipe(reduce, budget, quantize, targets=targets)).warnings


@pytest.mark.parametrize("schedule", [None, {"kind": "fast_v", "first_layers": 3, "keep": 0.25}])
def test_times_are_those_of_a_plan_for_the_device(schedule: dict[str, Any] | None) -> None:
    reduce, quantize = QUANTIZED
    drop = () if schedule is None else ({"method": "drop_tokens", "schedule": schedule},)
    found = plan(SHAPE, recipe(reduce, *drop, quantize), device=DEVICE).prediction
    assert found is not None
    assert found.times is not None
    whole = recipe(reduce, searched(100), quantize)
    times = recipe_prefill_times(whole.stages, SHAPE.spec, whole.targets)
    assert times is not None
    dropping = None
    if schedule is not None:
        tokens = SHAPE.spec.visual_tokens // 2
        kind = recipe(*drop).stages[0].schedule  # type: ignore[attr-defined]  # the stage is known to be drop_tokens
        dropping = kind.plan(SHAPE.spec.decoder.depth, tokens)
    text_rows = 32
    prompt = (text_rows, found.rows - text_rows)
    assert times(DEVICE, [prompt], dropping) == pytest.approx(found.times.prefill_ms)
    other = (2 * text_rows, prompt[1])
    mean = (2 * found.times.prefill_ms + times(DEVICE, [other], dropping)) / 3
    assert times(DEVICE, [prompt, other, prompt], dropping) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        ({"kind": "prefill_ms", "most": 60.0, "device": DEVICE}, 60.0),
        ({"kind": "macs", "share": 0.7}, 0.7),
    ],
)
def test_a_plan_counts_what_costs_as_much(budget: dict[str, Any], limit: float) -> None:
    reduce, quantize = QUANTIZED
    schedule = {"kind": "p_sigmoid", "budget": budget}
    made = plan(
        SHAPE,
        recipe(reduce, {"method": "drop_tokens", "schedule": schedule}, quantize),
        device=DEVICE,
    )
    whole = plan(SHAPE, recipe(reduce, quantize), device=DEVICE)
    assert made.prediction is not None
    assert whole.prediction is not None
    assert made.prediction.times is not None
    assert whole.prediction.times is not None
    (note,) = (note for note in made.warnings if "found on calibration samples" in note)
    found = re.search(r"Prefill of 416 .* takes ([0-9.]+) (.+) then, ([0-9.]+) \2 without", note)
    assert found is not None
    taken, before = float(found[1]), float(found[3])
    assert 0.95 * limit < taken <= limit < before
    assert made.kv_cache_bytes < whole.kv_cache_bytes
    ratio = made.prediction.times.prefill_ms / whole.prediction.times.prefill_ms
    # Of a prompt with more tiles, and with the head, which drops nothing.
    assert ratio == pytest.approx(taken / before, abs=0.06)


@pytest.mark.parametrize(
    ("budget", "targets", "error", "message"),
    [
        (searched(0.5), ("onnx",), RecipeError, r"budget of 0\.5 ms on galaxy-s25 is below \d"),
        (searched(60, "no-such-phone"), ("onnx",), InputError, "'no-such-phone' is not known"),
        (searched(60, "mine.yaml"), ("onnx",), InputError, "mine.yaml"),
        (searched(60), ("coreml",), RecipeError, "no prefill can be predicted for .*coreml"),
    ],
)
def test_a_plan_refuses_what_no_search_could_find(
    budget: dict[str, Any], targets: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        planned(budget, targets)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    return Checkpoint.load(resolve_model("reference:pocket-llava"))


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 6)


def test_a_search_keeps_its_milliseconds(reference: Checkpoint, samples: CalibrationSet) -> None:
    stages, targets = recipe().stages, recipe().targets
    times = recipe_prefill_times(stages, reference.spec, targets)
    assert times is not None
    ctx = RunContext(threads=1, prefill_times=times)
    asked: list[tuple[VisualSchedule | None, float]] = []

    def recorded(device: str, prompts: Any, schedule: VisualSchedule | None) -> float:
        assert device == DEVICE
        assert len(prompts) == len(samples)
        asked.append((schedule, times(device, prompts, schedule)))
        return asked[-1][1]

    tokens = reference.visual_tokens
    prompts = [(20, tokens)]
    whole, least = (times(DEVICE, prompts, each) for each in (None, least_schedule(tokens)))
    assert least < whole
    search = PSigmoid(budget=PrefillTime(most=(whole + least) / 2, device=DEVICE), trials=2)
    found = search.find(reference, samples, replace(ctx, prefill_times=recorded))
    assert dict(asked)[found.schedule] == found.metrics["cost"] <= search.budget.limit
    assert found.metrics["cost"] < found.metrics["cost_before"] == dict(asked)[None]
    assert found.metrics["budget"] == {
        "kind": "prefill_ms",
        "most": search.budget.limit,
        "device": DEVICE,
    }
    ample = replace(search, budget=PrefillTime(most=10 * whole, device=DEVICE))
    with pytest.raises(RecipeError, match="without a drop, which the budget .* allows"):
        ample.find(reference, samples, ctx)
    with pytest.raises(RecipeError, match="predicted for a whole recipe"):
        search.find(reference, samples, RunContext())
