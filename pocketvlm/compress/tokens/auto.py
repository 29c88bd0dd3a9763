"""The reducer that suits a tower: [CLS] attention where there is a [CLS] token.

`docs/methods/visual_tokens.md` has the measurement that decided against `received_attention` for
towers without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.compress.tokens.rank.cls_attention import ClsAttention
from pocketvlm.compress.tokens.rank.distinct_features import DistinctFeatures
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.models.reducer import PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Auto"]


@dataclass(frozen=True, kw_only=True)
class Auto(Reducer):
    """`cls_attention` where the tower has a [CLS] token, `distinct_features` where it has none."""

    kind: Literal["auto"] = "auto"

    def choose(self, spec: ModelSpec) -> Reducer:
        """The reducer for this tower."""
        return ClsAttention() if spec.tower.has_cls else DistinctFeatures()

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of the reducer for this tower."""
        return self.choose(spec).build(spec, keep=keep, positions=positions)
