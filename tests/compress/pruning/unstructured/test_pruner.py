"""The stage around every score: budgets, references, what is refused, what is recorded."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.steps import LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import Blocked, SemiStructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.pruning.unstructured.wanda import Wanda, score_wanda
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.float_weights import is_float, keeps_of, with_values
from pocketvlm.weights.sparse import SparseWeight


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 6)


def masks_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        linear.name: form.keeps()
        for linear, form in checkpoint.forms().items()
        if isinstance(form, SparseWeight)
    }


def test_wanda_is_the_published_score(tiny_path, calibration):
    """A reference that walks by itself, in float64, without the stage."""
    dense = Checkpoint.load(tiny_path)
    first = next(s for s in BlockWalk(checkpoint=dense, samples=calibration, held_out=0.0))
    assert isinstance(first, LinearGroup)
    assert first.moments is not None
    energy = first.moments(None).calibration.blocks()[0].diagonal().to(torch.float64)
    pruned = Prune(score=Wanda(), ratio=0.4, held_out=0.0).apply(
        Checkpoint.load(tiny_path), calibration, RunContext()
    )
    for name in first.names:
        weights = dense.form(name).dequantize().to(torch.float64)
        scores = weights.abs() * energy.sqrt()
        mask = masks_of(pruned)[name]
        for row in range(weights.shape[0]):
            order = sorted(range(weights.shape[1]), key=lambda j, s=scores[row]: (-float(s[j]), j))
            assert set(mask[row].nonzero().flatten().tolist()) == set(order[: int(mask[row].sum())])


def test_wanda_loses_less_output_than_magnitude_where_inputs_differ():
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 1, 64, dtype=torch.float64)
    inputs = torch.randn(2000, 64, generator=generator, dtype=torch.float64) @ mixing * scales
    weights = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    energy = inputs.square().mean(dim=0)

    def loss(scores: torch.Tensor) -> float:
        keep = scores.argsort(dim=1, descending=True)[:, :32]
        mask = torch.zeros_like(weights).scatter_(1, keep, 1.0)
        return float((inputs @ (weights * mask - weights).T).square().mean())

    assert loss(score_wanda(weights, energy)) < 0.5 * loss(weights.abs())


@pytest.mark.parametrize(
    "stage", [Prune(score=Magnitude(), ratio=0.5), Prune(score=Wanda(), ratio=0.5)]
)
def test_what_is_kept_stays_and_the_rest_is_zero(tiny_path, calibration, stage):
    before = Checkpoint.load(tiny_path)
    after = stage.apply(Checkpoint.load(tiny_path), calibration, RunContext())
    masks = masks_of(after)
    assert len(masks) == sum(x.part not in ("embedding", "head") for x in before.spec.linears())
    for name, mask in masks.items():
        original = before.form(name).dequantize()
        kept = original.to(torch.float16).to(torch.float32)
        assert torch.equal(after.form(name).dequantize(), torch.where(mask, kept, 0.0))
        assert int(mask.sum()) == round(0.5 * mask.numel())
    record = after.history[-1]
    assert record.metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert [row["name"] for row in record.layers] == [x.name for x in before.spec.linears()]


def test_rules_fix_a_layer_by_hand(tiny_path, calibration):
    rules = (
        PruneRule(part="tower", ratio=0.25),
        PruneRule(match=r".*\.o_proj", ratio=0),
        PruneRule(part="decoder"),
    )
    done = Prune(score=Magnitude(), ratio=0.75, rules=rules).apply(
        Checkpoint.load(tiny_path), calibration, RunContext()
    )
    masks = masks_of(done)
    for linear in done.spec.linears():
        if linear.part == "tower":
            assert float(masks[linear.name].float().mean()) == pytest.approx(0.75, abs=0.01)
        elif linear.part == "decoder" and linear.role != "o_proj":
            assert float(masks[linear.name].float().mean()) == pytest.approx(0.25, abs=0.01)
        else:
            assert linear.name not in masks
    reasons = {row["name"]: row["reason"] for row in done.history[-1].layers}
    assert reasons[done.spec.decoder.embedding] == "tables are never pruned"


def test_masks_survive_a_save_and_a_resumed_run(tiny_path, calibration, tmp_path):
    stage = Prune(score=Wanda(), ratio=0.5)
    ctx = RunContext(scratch_dir=tmp_path / "layers")
    once = stage.apply(Checkpoint.load(tiny_path), calibration, ctx)
    once.save(tmp_path / "a")
    stored = sorted((tmp_path / "layers").glob("*.safetensors"))
    stored[-1].unlink()
    again = stage.apply(Checkpoint.load(tiny_path), calibration, ctx)
    again.save(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    loaded = Checkpoint.load(tmp_path / "a")
    for name, mask in masks_of(once).items():
        assert torch.equal(masks_of(loaded)[name], mask)


def test_two_of_four_and_blocks_reach_every_layer(tiny_path, calibration):
    for pattern in (SemiStructured(), Blocked(rows=2, columns=4)):
        done = Prune(score=Wanda(), ratio=0.5, pattern=pattern).apply(
            Checkpoint.load(tiny_path), calibration, RunContext()
        )
        for mask in masks_of(done).values():
            assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_outside_of_zero_and_one_are_refused(ratio):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Prune(score=Wanda(), ratio=ratio)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        PruneRule(ratio=ratio)


def test_a_pattern_fixes_its_ratio():
    with pytest.raises(ValueError, match=r"2:4 removes 0.5"):
        Prune(score=Wanda(), ratio=0.6, pattern=SemiStructured())


def test_a_pattern_that_does_not_divide_is_refused(tiny_checkpoint, calibration):
    stage = Prune(score=Wanda(), ratio=0.5, pattern=SemiStructured(keep=7, of=14))
    with pytest.raises(RecipeError, match="does not divide"):
        stage.apply(tiny_checkpoint, calibration, RunContext())


def test_tables_cannot_be_asked_for():
    with pytest.raises(ValueError, match="never pruned"):
        PruneRule(part="embedding")


def test_a_layer_is_pruned_once(tiny_checkpoint, calibration):
    done = Prune(score=Magnitude(), ratio=0.5).apply(tiny_checkpoint, calibration, RunContext())
    with pytest.raises(RecipeError, match="pruned or quantized already"):
        Prune(score=Wanda(), ratio=0.5).apply(done, calibration, RunContext())


def test_a_weight_too_large_for_float16_is_named(tiny_checkpoint, calibration):
    name = tiny_checkpoint.spec.linears()[0].name
    values = tiny_checkpoint.form(name).dequantize()
    values[0, 0] = 1e6
    tiny_checkpoint.set_form(name, DenseWeight(values=values))
    with pytest.raises(CheckpointError, match=f"{name}.*1e\\+06"):
        Prune(score=Magnitude(), ratio=0.5).apply(tiny_checkpoint, calibration, RunContext())


def test_a_layer_of_zeros_is_named(tiny_checkpoint, calibration):
    name = tiny_checkpoint.spec.linears()[0].name
    zeros = torch.zeros(tiny_checkpoint.form(name).shape)
    tiny_checkpoint.set_form(name, DenseWeight(values=zeros))
    done = Prune(score=Wanda(), ratio=0.5).apply(tiny_checkpoint, calibration, RunContext())
    assert f"{name}: all of its weights are zero" in done.history[-1].notes


def test_float_weights_keep_their_kind():
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    dense = DenseWeight(values=values.to(torch.bfloat16))
    mask = values > 0
    sparse = SparseWeight.from_form(dense, mask)
    assert is_float(dense)
    assert is_float(sparse)
    assert keeps_of(dense) is None
    assert torch.equal(keeps_of(sparse), mask)
    moved = with_values(sparse, torch.ones(4, 8))
    assert torch.equal(moved.dequantize(), mask.to(torch.float32))
    assert with_values(dense, torch.ones(4, 8)).values.dtype == torch.bfloat16
