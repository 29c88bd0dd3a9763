"""The size that `plan` is told is the size that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.reference.random_models import tiny_config, write_random_model, write_tiny_model
from pocketvlm.stages import PlanState
from pocketvlm.weights.layout import AffineLayout
from tests.export.rig import quantize_affine

_ROW = 4096  # no layer is wider


def grid(bits: int, group_size: int = 32, *, symmetric: bool = False) -> AffineLayout:
    return AffineLayout(bits=bits, group_size=group_size, symmetric=symmetric)


@pytest.fixture(scope="module", params=["llava", "smolvlm"])
def small_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights, not names, decide the size."""
    config = tiny_config(request.param)
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 2000}
    config["vision_config"] |= {"hidden_size": 192, "intermediate_size": 512}
    path = tmp_path_factory.mktemp(request.param)
    write_random_model(config, path)
    return path


@pytest.mark.parametrize(
    ("tower", "rest"),
    [
        (None, None),
        (grid(8), grid(4)),
        (grid(4, 64), grid(4, 128, symmetric=True)),
        (grid(8, _ROW, symmetric=True), grid(8, _ROW, symmetric=True)),
        (grid(3, 32, symmetric=True), grid(2)),
    ],
    ids=str,
)
def test_prediction(
    small_path: Path, tmp_path: Path, tower: AffineLayout | None, rest: AffineLayout | None
) -> None:
    checkpoint = Checkpoint.load(small_path)
    rules = {
        linear: tower if linear.part == "tower" else rest for linear in checkpoint.spec.linears()
    }
    for linear, plan in rules.items():
        if plan is not None:
            weight = checkpoint.form(linear.name).dequantize()
            form = quantize_affine(weight, plan.bits, plan.group_size, symmetric=plan.symmetric)
            checkpoint.set_form(linear.name, form)
    for number, rows in enumerate((None, 32)):
        target = ToOnnx(int8_prefill_rows=rows)
        if target.refuse(PlanState.of_checkpoint(checkpoint)):
            continue
        target.export(checkpoint, tmp_path / str(number), RunContext())
        files = (tmp_path / str(number) / "onnx").iterdir()
        found = target.predict(checkpoint.spec, rules).part_bytes
        assert sum(found.values()) == pytest.approx(
            sum(file.stat().st_size for file in files), rel=0.03
        )
    predicted = ToOnnx().predict(checkpoint.spec, rules)
    assert ("head" in predicted.part_bytes) == (not checkpoint.spec.decoder.tied_head)
    assert len(predicted.warnings) == (2 if tower is not None and tower.bits == 3 else 0)


@pytest.mark.parametrize("name", ["internvl3", "granite-vision"])
def test_what_a_fold_multiplied_takes_four_bytes(name: str, tmp_path: Path) -> None:
    write_tiny_model(name, tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    ToOnnx().export(checkpoint, tmp_path, RunContext(threads=1))
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    predicted = ToOnnx().predict(checkpoint.spec, PlanState.of(checkpoint.spec).layouts)
    assert sum(predicted.part_bytes.values()) == pytest.approx(written, rel=0.03)


def test_wider_groups_and_symmetric_grids_are_smaller(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec

    def total(plan: AffineLayout | None) -> int:
        return sum(ToOnnx().predict(spec, dict.fromkeys(spec.linears(), plan)).part_bytes.values())

    assert total(grid(4, 64)) < total(grid(4, 32)) < total(grid(8, 32)) < total(None)
    assert total(grid(4, symmetric=True)) < total(grid(4))
    # Both widths have a container of four bits, and only one of them the zero point it implies.
    assert total(grid(3)) == total(grid(4))
    assert total(grid(3, symmetric=True)) > total(grid(4, symmetric=True))


def test_group_sizes_without_kernel_are_refused(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    rules = dict.fromkeys(spec.linears()) | {spec.linears()[0]: grid(4, 48)}
    (refusal,) = ToOnnx().refuse(replace(PlanState.of(spec), layouts=rules))
    assert spec.linears()[0].name in refusal
    assert "group size 48" in refusal
    assert "16, 32, 64" in refusal
