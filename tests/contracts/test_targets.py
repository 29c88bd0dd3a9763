"""What every target of the table promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import UnsupportedError
from pocketvlm.recipes.stages import TARGETS
from pocketvlm.stages import PlanState
from tests.contracts.promises import read, require_configuration

OPTIONS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "coreml": {"context": 64},
    "executorch": {"context": 64},
}
CUT = {"method": "skip_visual", "first_layers": 1}


@pytest.fixture(params=[kind.method for kind in TARGETS])
def target(request: pytest.FixtureRequest) -> Any:
    return read("targets", request.param, OPTIONS[request.param])


@pytest.fixture
def path(tiny_paths: dict[str, Path]) -> Path:
    return tiny_paths["smolvlm"]


def test_every_target_is_tested():
    assert {kind.method for kind in TARGETS} == OPTIONS.keys()


def test_a_target_is_its_configuration(target):
    assert type(target) in TARGETS
    require_configuration("targets", target)


def test_what_is_exported_is_what_was_planned(target, path, tmp_path):
    checkpoint = Checkpoint.load(path)
    state = PlanState.of(checkpoint.spec)
    prediction = target.predict(state.spec, state.layouts)
    assert prediction.refused == target.refuse(state) == ()
    assert all(count > 0 for count in prediction.part_bytes.values())
    assert target.capacity(checkpoint.spec) > 0
    before = {name: value.clone() for name, value in checkpoint.vectors().items()}
    forms = checkpoint.forms()
    components = target.export(checkpoint, tmp_path, RunContext(threads=1))
    assert {component.role for component in components} == {"vision", "embedding", "decoder"}
    for component in components:
        assert component.target == target.method
        assert component.file.startswith(f"{target.method}/")
        assert (tmp_path / component.file).exists()
    assert {file.name for file in tmp_path.iterdir()} == {target.method}
    assert checkpoint.history == ()
    assert all(checkpoint.forms()[linear] is form for linear, form in forms.items())
    assert all(torch.equal(before[name], value) for name, value in checkpoint.vectors().items())


@pytest.mark.parametrize("stage", [CUT, {"method": "quantize_cache"}], ids=lambda s: s["method"])
def test_a_refusal_of_the_plan_is_one_of_the_export(target, stage, path, tmp_path):
    stage = read("stages", stage["method"], {k: v for k, v in stage.items() if k != "method"})
    checkpoint = Checkpoint.load(path)
    refused = target.refuse(stage.plan(PlanState.of(checkpoint.spec)))
    done = stage.apply(checkpoint, CalibrationSet.from_reference(0, 2), RunContext(threads=1))
    if not refused:
        assert target.export(done, tmp_path, RunContext(threads=1))
        return
    (reason,) = refused
    assert reason.startswith(f"{target.method}: ")
    assert stage.method in reason
    with pytest.raises(UnsupportedError, match=f"^{target.method}: "):
        target.export(done, tmp_path, RunContext(threads=1))


def test_other_widths_of_a_cache_are_refused(target, path):
    state = PlanState.of(Checkpoint.load(path).spec)
    for bits in (2, 4, 8):
        assert bool(target.refuse(replace(state, cache_bits=bits))) == (
            bits not in target.cache_bits
        )
