"""The forms that a weight can be stored in, in one table."""

from __future__ import annotations

from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["FORMS"]

FORMS: tuple[type[WeightForm], ...] = (
    DenseWeight,
    AffineWeight,
    CodebookWeight,
    SparseWeight,
)
