"""plan: what a stage prunes and another quantizes is planned as both, and weighs what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import SemiStructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.stage import Codebook
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.pipeline.plan import plan, plan_stages
from pocketvlm.recipes.load import load_recipe
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout

PRUNE = Prune(score=Magnitude(), rules=(PruneRule(part="decoder"),), pattern=SemiStructured())
RULES = (WeightRule(bits=4, group_size=16, symmetric=True),)
PALETTE = CodebookRule(part="decoder", index_bits=3, vector_length=1, share="layer")


@pytest.fixture
def path(tiny_paths):
    """One family is enough: nothing here depends on it."""
    return tiny_paths["smolvlm"]


def planned(path, *stages):
    spec = Checkpoint.load(path).spec
    return plan_stages(stages, spec).layouts


def test_a_mask_alone_holds_floats(path):
    for linear, form in planned(path, PRUNE).items():
        if linear.part == "decoder":
            assert (form.density, form.values) == (0.5, None)
        else:
            assert form is None


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (RoundToNearest(rules=RULES), AffineLayout),
        (Codebook(rules=(PALETTE,), rounds=1, error_feedback=False), CodebookLayout),
    ],
)
def test_a_quantizer_behind_a_mask_weighs_what_was_planned(path, stage, kind):
    forms = planned(path, PRUNE, stage)
    alone = planned(path, stage)
    checkpoint = Checkpoint.load(path)
    samples = CalibrationSet.from_reference(0, 3)
    for each in (PRUNE, stage):
        checkpoint = each.apply(checkpoint, samples, RunContext())
    for linear, form in checkpoint.forms().items():
        expected = forms[linear]
        if linear.part == "decoder":
            assert isinstance(expected, SparseLayout)
            assert isinstance(expected.values, kind)
            assert expected.values == alone[linear]
        else:
            assert expected == alone[linear]
        assert form.layout == expected
        if expected is not None:
            assert expected.stored_bytes(*form.shape) == form.stored_bytes


def test_mixed_precision_plans_with_masked_bytes(path):
    """A budget that dense weights do not fit into is enough where a mask halves some of them."""
    options = tuple(WeightRule(bits=bits, group_size=16, symmetric=True) for bits in (4, 8))
    stage = MixedPrecision(options=options, average_bits=4.9)
    with pytest.raises(RecipeError, match="below the smallest"):
        planned(path, stage)
    forms = planned(path, PRUNE, stage)
    size = sum(form.stored_bytes(i.out_features, i.in_features) for i, form in forms.items())
    weights = sum(linear.out_features * linear.in_features for linear in forms)
    assert size <= 4.9 * weights / 8
    assert {form.values.bits for form in forms.values() if isinstance(form, SparseLayout)} <= {
        4,
        8,
    }


def test_what_would_lose_a_mask_is_refused_before_any_compute(path):
    vectors = Codebook(rules=(replace(PALETTE, vector_length=4),))
    with pytest.raises(RecipeError, match=r"pruned to 50%.*vector_length 1"):
        planned(path, PRUNE, vectors)
    with pytest.raises(RecipeError, match=r"rotate: .* is pruned"):
        planned(path, PRUNE, Rotate(residual=False))


def test_a_recipe_of_both_is_planned(path):
    recipe = replace(load_recipe("float"), stages=(PRUNE, RoundToNearest(rules=RULES)))
    found = plan(path, recipe)
    assert not found.refused
    assert found.weight_bytes > 0
