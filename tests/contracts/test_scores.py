"""What every score of `prune` promises; a new one is tested by its line in the table."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.patterns import SemiStructured
from pocketvlm.compress.pruning.unstructured.pruner import SCORES
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.weights.float_weights import keeps_of
from tests.contracts.promises import read, require_configuration

NAMES = tuple(SCORES)


def stage_of(name: str, **options: object) -> dict[str, object]:
    return {"score": {"kind": name, **options}, "rules": [{"part": "decoder"}]}


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_its_configuration(name: str) -> None:
    stage = read("stages", "prune", stage_of(name))
    assert stage.score == SCORES[name]()
    assert stage.score.kind == name
    require_configuration("stages", stage)


@pytest.mark.parametrize("name", NAMES)
def test_options_that_cannot_be_are_refused_in_one_line(name: str) -> None:
    options = [item.name for item in fields(SCORES[name]) if item.name != "kind"]  # type: ignore[arg-type]  # every score is a dataclass; an ABC cannot say so
    for option in ("beauty", *options):
        with pytest.raises(RecipeError) as caught:
            read("stages", "prune", stage_of(name, **{option: [[]]}))
        assert f"stages.0.score.{option}: " in str(caught.value)
        assert "\n" not in str(caught.value)
        if option == "beauty":
            assert f"kind {name}" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_keeps_what_the_pattern_says_and_the_same_twice(
    name: str, tiny_paths: dict[str, Path]
) -> None:
    samples = CalibrationSet.from_reference(0, 4)
    stage = replace(read("stages", "prune", stage_of(name)), pattern=SemiStructured())
    once, again = (
        stage.apply(Checkpoint.load(tiny_paths["smolvlm"]), samples, RunContext(threads=1)).forms()
        for _ in range(2)
    )
    pruned = 0
    for (linear, form), other in zip(once.items(), again.values(), strict=True):
        assert form.dequantize().equal(other.dequantize())
        keeps = keeps_of(form)
        assert (keeps is not None) == (linear.part == "decoder")
        if keeps is not None:
            pruned += 1
            assert bool((keeps.view(-1, 4).sum(1) == 2).all())
            assert not form.dequantize()[~keeps].any()
    assert pruned
