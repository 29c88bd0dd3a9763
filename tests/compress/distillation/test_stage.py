"""The stage: zeros, bytes, the best state, going on, and what is refused."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.distillation.training import rate_share
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import Progress, RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.sparse import SparseWeight

SHORT = Distill(
    rank=4, steps=8, batch_size=4, rate=5e-3, vector_rate=1e-3, held_out=0.25, check_every=4
)


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(5, 12)


def _pruned(path: Path, samples: CalibrationSet) -> Checkpoint:
    return Prune(score=Magnitude(), ratio=0.5).apply(Checkpoint.load(path), samples, RunContext())


def _digest(checkpoint: Checkpoint, folder: Path) -> str:
    checkpoint.save(folder)
    digest = hashlib.sha256()
    for file in ("model.safetensors", "pocketvlm.json"):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def test_a_pruned_model_comes_nearer_and_keeps_its_zeros(tiny_path, samples) -> None:
    student = _pruned(tiny_path, samples)
    before = student.forms()
    vectors = {name: value.clone() for name, value in student.vectors().items()}
    learned = SHORT.apply(student, samples, RunContext(source_dir=tiny_path))
    moved = 0
    for linear, form in before.items():
        now = learned.form(linear.name)
        if isinstance(form, SparseWeight):
            assert isinstance(now, SparseWeight)
            assert torch.equal(now.mask, form.mask)
            assert not bool(now.dequantize()[~form.keeps()].any())
            moved += not torch.equal(now.stored(), form.stored())
        else:
            assert now is form
    assert moved > len([f for f in before.values() if isinstance(f, SparseWeight)]) * 0.9
    for name, value in learned.vectors().items():
        assert not bool(value[vectors[name] == 0].any())
        assert not value.requires_grad
    metrics = learned.history[-1].metrics
    assert metrics["after"]["loss"] < 0.9 * metrics["before"]["loss"]
    assert metrics["best_step"] > 0
    assert [check["step"] for check in metrics["checks"]] == [0, 4, 8]
    rows = learned.history[-1].layers
    assert all(row["update_norm"] >= 0 for row in rows)
    assert {row["part"] for row in rows} == {"tower", "projector", "decoder"}
    assert learned.history[-1].notes == ()


def test_the_teacher_sees_the_tiles_of_the_student(samples, tmp_path) -> None:
    """Its processor would cut more, and the prompts have no place for them."""
    path = tmp_path / "model"
    write_tiny_model("smolvlm-tiles", path)
    student = LimitTiles(max_tiles=1).apply(_pruned(path, samples), samples, RunContext())
    learned = SHORT.apply(student, samples, RunContext(source_dir=path))
    metrics = learned.history[-1].metrics
    assert metrics["after"]["loss"] < metrics["before"]["loss"]


def test_nothing_is_left_behind_in_the_model(tiny_path, samples) -> None:
    learned = SHORT.apply(_pruned(tiny_path, samples), samples, RunContext(source_dir=tiny_path))
    for linear in learned.spec.linears():
        assert learned.layer(linear.name).cached is None
    # What is measured afterwards is what was stored.
    again = Distill(steps=1, rank=1, rate=1e-9, vector_rate=1e-9, held_out=0.25).apply(
        learned, samples, RunContext(source_dir=tiny_path)
    )
    first, second = (record.metrics for record in again.history[-2:])
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)


def test_same_bytes_twice_and_after_a_kill(tiny_paths, samples, tmp_path) -> None:
    path = tiny_paths["llava"]

    class _KilledError(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.task == "distill" and progress.done == 6:
            raise _KilledError

    def learn(**options) -> str:
        ctx = RunContext(source_dir=path, **options)
        learned = SHORT.apply(_pruned(path, samples), samples, ctx)
        return _digest(learned, tmp_path / "checkpoint")

    whole = learn()
    assert learn() == whole
    assert learn(seed=1) != whole
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(_KilledError):
        learn(scratch_dir=scratch, on_progress=kill)
    steps: list[int] = []

    def count(progress: Progress) -> None:
        if progress.task == "distill":
            steps.append(progress.done)

    assert learn(scratch_dir=scratch, on_progress=count) == whole
    assert steps == [5, 6, 7, 8]  # resumed after the check at step 4
    (scratch / "training.safetensors").write_bytes(b"lost power")
    assert learn(scratch_dir=scratch) == whole


def test_where_no_state_is_better_the_model_stays_as_it_was(tiny_path, samples) -> None:
    student = _pruned(tiny_path, samples)
    forms = student.forms()
    vectors = {name: value.clone() for name, value in student.vectors().items()}
    wild = Distill(rank=4, steps=2, batch_size=4, rate=3.0, vector_rate=3.0, warmup=0.0)
    learned = wild.apply(student, samples, RunContext(source_dir=tiny_path))
    assert learned.history[-1].metrics["best_step"] == 0
    assert "changed nothing" in learned.history[-1].notes[-1]
    assert all(learned.form(linear.name) is form for linear, form in forms.items())
    assert all(torch.equal(value, vectors[name]) for name, value in learned.vectors().items())
    record = learned.history[-1]
    assert record.metrics["after"] == record.metrics["before"]


@pytest.mark.parametrize("rank", [4, None])
def test_a_narrower_student_of_dense_weights_keeps_their_type(tiny_path, samples, rank) -> None:
    student = Checkpoint.load(tiny_path)
    decoder, width = student.spec.decoder, 64
    forms = {
        name: module.form
        for name, module in student.model.named_modules()
        if hasattr(module, "form")
    }
    for block in range(decoder.depth):
        for role in ("gate_proj", "up_proj", "down_proj"):
            name = f"{decoder.stack}.{block}.mlp.{role}"
            values = forms[name].values
            cut = values[:, :width] if role == "down_proj" else values[:width]
            forms[name] = DenseWeight(values=cut.contiguous())
    config = {**student.config}
    config["text_config"] = {**config["text_config"], "intermediate_size": width}
    student = student.rebuild(config, forms, student.vectors())
    stage = Distill(parts=("decoder",), rank=rank, steps=6, batch_size=4, rate=2e-3, held_out=0.25)
    learned = stage.apply(student, samples, RunContext(source_dir=tiny_path))
    metrics = learned.history[-1].metrics
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    for linear, form in learned.forms().items():
        assert isinstance(form, DenseWeight)
        assert form.values.dtype == forms[linear.name].values.dtype
        if linear.part != "decoder":
            assert form is forms[linear.name]


def test_a_student_with_fewer_tokens_learns_from_all_of_them(tiny_path, samples) -> None:
    student = ReduceTokens(keep=0.5).apply(Checkpoint.load(tiny_path), samples, RunContext())
    learned = SHORT.apply(student, samples, RunContext(source_dir=tiny_path))
    record = learned.history[-1]
    assert record.notes == ("visual tokens are not compared: they are reduced",)
    assert record.metrics["after"]["visual_distance"] is None
    assert record.metrics["after"]["loss"] < record.metrics["before"]["loss"]


def test_a_loss_that_is_not_finite_names_its_step(tiny_path, samples) -> None:
    wild = Distill(rank=4, steps=4, batch_size=4, rate=1e30, vector_rate=1e30, warmup=0.0)
    with pytest.raises(CalibrationError, match="of step 2 of 4 is not finite"):
        wild.apply(_pruned(tiny_path, samples), samples, RunContext(source_dir=tiny_path))
    broken = _pruned(tiny_path, samples)
    norm = broken.model.get_parameter(f"{broken.spec.decoder.norm}.weight")
    with torch.no_grad():
        norm[0] = math.inf
    with pytest.raises(CalibrationError, match="held-out loss after 0 steps is not finite"):
        SHORT.apply(broken, samples, RunContext(source_dir=tiny_path))


def test_what_is_refused(tiny_path, tiny_paths, samples) -> None:
    with pytest.raises(RecipeError, match=r"RunContext\(source_dir=\.\.\.\)"):
        SHORT.apply(Checkpoint.load(tiny_path), samples, RunContext())
    with pytest.raises(CalibrationError, match="one to learn from and one to judge"):
        SHORT.apply(Checkpoint.load(tiny_path), samples.take(1), RunContext(source_dir=tiny_path))
    other = tiny_paths["smolvlm" if tiny_path == tiny_paths["llava"] else "llava"]
    with pytest.raises(RecipeError, match="a teacher is the model that the run started from"):
        SHORT.apply(Checkpoint.load(tiny_path), samples, RunContext(source_dir=other))
    rounded = RoundToNearest(rules=(WeightRule(part="decoder", bits=8),)).apply(
        Checkpoint.load(tiny_path), samples, RunContext()
    )
    with pytest.raises(RecipeError, match="distill stands before every quantizer"):
        SHORT.apply(rounded, samples, RunContext(source_dir=tiny_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ()}, "parts must name"),
        ({"parts": ("decoder", "decoder")}, "parts must name"),
        ({"parts": ("head",)}, "allowed are tower, projector, decoder"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": math.nan}, "rate must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"answers": 1.5}, "answers must lie between 0 and 1"),
        ({"features": -1.0}, "features must be at least 0"),
        ({"held_out": 0.6}, "held_out must lie between 0 and 0.5"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Distill(**options)


def test_rates_rise_and_fall() -> None:
    shares = [rate_share(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(shares) == shares[9] == shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.001
    assert rate_share(0, 1, 0.0) == 1
