"""The size that `plan` is told is the size that is written; what cannot be held is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.coreml import target as coreml_target
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.stages import PlanState
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, WeightLayout
from tests.export.coreml.test_forms import make_codebook
from tests.export.rig import quantize_affine

pytest.importorskip("coremltools", reason="the coreml extra is not installed")


@pytest.fixture(scope="module", params=["llava", "smolvlm"])
def small_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights, not names, decide the size."""
    config = tiny_config(request.param)
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 3000}
    config["vision_config"] |= {"hidden_size": 192, "intermediate_size": 512}
    path = tmp_path_factory.mktemp(request.param)
    write_random_model(config, path)
    return path


def affine(bits: int, group_size: int = 32, *, symmetric: bool = False) -> AffineLayout:
    return AffineLayout(bits=bits, group_size=group_size, symmetric=symmetric)


def apply(checkpoint: Checkpoint, name: str, form: WeightLayout | None) -> None:
    weight = checkpoint.form(name).dequantize()
    if isinstance(form, AffineLayout):
        grid = {"symmetric": form.symmetric}
        checkpoint.set_form(name, quantize_affine(weight, form.bits, form.group_size, **grid))
    elif form is not None:
        options = {
            "bits": form.index_bits,
            "length": form.vector_length,
            "groups": (form.row_groups, form.column_groups),
            "scaled": form.row_scales,
        }
        seed = crc32(name.encode())
        checkpoint.set_form(name, make_codebook(*weight.shape, **options, seed=seed))


@pytest.mark.parametrize(
    ("deployment", "tower", "rest"),
    [
        ("iOS18", None, None),
        ("iOS17", None, affine(8, 1024)),
        ("iOS18", affine(8), affine(4)),
        ("iOS18", affine(4, 64), affine(3, symmetric=True)),
        ("iOS18", affine(2), CodebookLayout(index_bits=8, vector_length=4, row_scales=True)),
        ("iOS18", CodebookLayout(index_bits=4, vector_length=1, row_groups=4), affine(4, 1024)),
    ],
    ids=str,
)
def test_prediction(
    small_path: Path,
    tmp_path: Path,
    deployment: str,
    tower: WeightLayout | None,
    rest: WeightLayout | None,
) -> None:
    checkpoint = Checkpoint.load(small_path)
    forms = {
        linear: tower if linear.part == "tower" else rest for linear in checkpoint.spec.linears()
    }
    for linear, form in forms.items():
        apply(checkpoint, linear.name, form)
    target = ToCoreml(deployment=deployment, context=64)
    target.export(checkpoint, tmp_path, RunContext())
    written = sum(f.stat().st_size for f in (tmp_path / "coreml").rglob("*") if f.is_file())
    prediction = target.predict(checkpoint.spec, forms)
    assert sum(prediction.part_bytes.values()) == pytest.approx(written, rel=0.03)
    assert ("head" in prediction.part_bytes) == (not checkpoint.spec.decoder.tied_head)


def test_what_a_system_is_too_old_for_is_refused(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    first = spec.linears()[0]
    forms = dict.fromkeys(spec.linears()) | {first: affine(4)}
    assert not ToCoreml().refuse(replace(PlanState.of(spec), layouts=forms))
    (refusal,) = ToCoreml(deployment="iOS17").refuse(replace(PlanState.of(spec), layouts=forms))
    assert refusal.startswith(f"coreml: {first.name}: 4 bits in groups of 32 need iOS 18; ")
    assert "group_size: row" in refusal


def test_narrow_codes_and_wide_indices(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    (warning,) = ToCoreml().predict(spec, dict.fromkeys(spec.linears(), affine(2))).warnings
    assert f"{len(spec.linears())} layers of 2 or 3 bits" in warning
    wide = CodebookLayout(index_bits=12, vector_length=4)
    # One line a reason, however many layers it holds for.
    (refused,) = ToCoreml().refuse(
        replace(PlanState.of(spec), layouts=dict.fromkeys(spec.linears(), wide))
    )
    names = f"{spec.linears()[0].name} and {len(spec.linears()) - 1} more"
    assert refused.startswith(f"coreml: {names}: indices of 12 bits")
    assert "at most 8 bits" in refused


def test_a_missing_toolkit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ToCoreml().missing_toolkit is None
    monkeypatch.setattr(coreml_target, "has_coremltools", lambda: False)
    assert "pip install 'pocketvlm[coreml]'" in str(ToCoreml().missing_toolkit)
