"""Quantizing each layer by a rule of its own kind: integers here, codebooks there."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.quantizer import CodebookQuantizer
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.mixed.search_space import Option
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.form import WeightForm

__all__ = ["PerLayerQuantizer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PerLayerQuantizer(LayerQuantizer[Option]):
    """Quantizes every layer by the rule that was chosen for it.

    Attributes:
        affine: For rules of integers.
        codebook: For rules of codebooks.
    """

    affine: AffineQuantizer
    codebook: CodebookQuantizer

    def labels(self, rule: Option, linear: LinearSpec) -> tuple[str, str]:
        """Names in reports."""
        if isinstance(rule, WeightRule):
            return self.affine.labels(rule, linear)
        return self.codebook.labels(rule, linear)

    def round(self, rule: Option, linear: LinearSpec, weight: WeightForm) -> WeightForm:
        """The plain form of the rule's kind."""
        if isinstance(rule, WeightRule):
            return self.affine.round(rule, linear, weight)
        return self.codebook.round(rule, linear, weight)

    def fit(
        self, rule: Option, linear: LinearSpec, weight: WeightForm, hessian: InputHessian
    ) -> WeightForm:
        """The calibrated form of the rule's kind."""
        if isinstance(rule, WeightRule):
            return self.affine.fit(rule, linear, weight, hessian)
        return self.codebook.fit(rule, linear, weight, hessian)
