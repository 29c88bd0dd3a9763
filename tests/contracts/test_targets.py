"""What every target of the table promises."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.precisions import part_precisions
from pocketvlm.recipes.stages import TARGETS
from pocketvlm.stages import PlanState
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout
from tests.contracts.promises import read, require_configuration
from tests.weights.random_weights import random_weight

OPTIONS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "coreml": {"context": 64},
    "executorch": {"context": 64},
}
LAYOUTS: list[WeightLayout | None] = [
    None,
    AffineLayout(bits=3, group_size=32, symmetric=True),
    AffineLayout(bits=4, group_size=24, symmetric=False),
    AffineLayout(bits=8, group_size=32, symmetric=False, float_zeros=True),
    CodebookLayout(index_bits=4, vector_length=2),
    CodebookLayout(index_bits=4, vector_length=2, residual_bits=3),
    CodebookLayout(index_bits=4, vector_length=2, is_ordered=True),
    CodebookLayout(index_bits=9, vector_length=2),
    SparseLayout(density=0.5),
    SparseLayout(density=0.5, values=AffineLayout(bits=4, group_size=24, symmetric=True)),
]
CUT = {"method": "drop_tokens", "schedule": {"kind": "exit", "first_layers": 1}}


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
    assert target.missing_toolkit is None
    assert target.refuse(state) == ()
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
    needs = target.runtime_needs(tmp_path, components)
    assert needs.runtime
    assert needs.formats
    assert {file.name for file in tmp_path.iterdir()} == {target.method}
    assert checkpoint.history == ()
    assert all(checkpoint.forms()[linear] is form for linear, form in forms.items())
    assert all(torch.equal(before[name], value) for name, value in checkpoint.vectors().items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_has_one_answer_for_plan_and_export(target, layout, path, tmp_path):
    checkpoint = Checkpoint.load(path)
    linear = checkpoint.spec.linears()[0]
    checkpoint.set_form(linear.name, random_weight(layout, linear.shape))
    found = target.explain(layout, linear.shape)
    state = PlanState.of_checkpoint(checkpoint)
    assert state.layouts[linear] == layout
    if not found.refusal:
        assert target.refuse(state) == ()
        assert found.stored in part_precisions(target, checkpoint, [linear.part])[linear.part]
        assert target.layer_bytes(layout, linear.shape) > 0
        warnings = target.predict(state.spec, state.layouts).warnings
        assert {f"{target.method}: 1 layers {price}" for price in found.prices} == set(warnings)
        return
    refusal = f"{target.method}: {linear.name}: {found.refusal}"
    assert target.refuse(state) == (refusal,)
    with pytest.raises(UnsupportedError, match=f"^{re.escape(refusal)}$"):
        target.export(checkpoint, tmp_path, RunContext(threads=1))
    assert not list(tmp_path.iterdir())


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
