"""Layers into their own codebooks, or into shared ones, against their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.compress.quantization.codebook.fit import fit_codebooks, round_to_codebooks
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.shared import SharedKey, shared_key
from pocketvlm.compress.quantization.codebook.tuning import tune_codebooks
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.layer_report import behind_mask
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.float_weights import keeps_of
from pocketvlm.weights.form import WeightForm

__all__ = ["CodebookQuantizer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookQuantizer(LayerQuantizer[CodebookRule]):
    """Codebooks with error feedback beside plain k-means.

    Attributes:
        shared: Codebooks of several layers, which are taken as they are.
        seed: Of k-means.
        rounds: Times that codes are chosen.
        error_feedback: Whether columns make up for each other.
        tune_steps: Steps of gradient descent on a finished sublayer's output.
        tune_rate: Their rate.
    """

    shared: Mapping[SharedKey, Tensor] = field(default_factory=dict)
    seed: int = 0
    rounds: int = 3
    error_feedback: bool = True
    tune_steps: int = 0
    tune_rate: float = 1e-3

    def labels(self, rule: CodebookRule, linear: LinearSpec) -> tuple[str, str]:
        """Names in reports."""
        return "lut" if rule.vector_length == 1 else "vptq", "k-means"

    def round(self, rule: CodebookRule, linear: LinearSpec, weight: WeightForm) -> WeightForm:
        """Plain k-means."""
        form = round_to_codebooks(
            rule,
            _turned(weight, lambda rows: rows).T,
            shared=self._shared_by(rule, linear),
            seed=self.seed,
            rows_alike=_has_rows_alike(linear),
            keeps=keeps_of(weight),
        )
        return behind_mask(form, weight)

    def fit(
        self, rule: CodebookRule, linear: LinearSpec, weight: WeightForm, hessian: InputHessian
    ) -> WeightForm:
        """Codebooks that the layer's inputs have shaped."""
        form = fit_codebooks(
            rule,
            _turned(weight, lambda rows: hessian.targets(rows, linear.in_features)).T,
            hessian,
            shared=self._shared_by(rule, linear),
            seed=self.seed,
            rounds=self.rounds,
            error_feedback=self.error_feedback,
            rows_alike=_has_rows_alike(linear),
            keeps=keeps_of(weight),
        )
        return behind_mask(form, weight)

    def revise(
        self,
        checkpoint: Checkpoint,
        sublayer: FinishedSublayer,
        layers: Mapping[str, FinishedLayer],
    ) -> Mapping[str, FinishedLayer]:
        """Trains tables and row scales on the sublayer's output."""
        return tune_codebooks(
            checkpoint, sublayer, layers, steps=self.tune_steps, rate=self.tune_rate
        )

    def _shared_by(self, rule: CodebookRule, linear: LinearSpec) -> Tensor | None:
        key = shared_key(rule, linear) if self.shared else None
        return None if key is None else self.shared[key]


def _has_rows_alike(linear: LinearSpec) -> bool:
    # A norm follows every lookup: a token of small rows bears no larger error than others.
    return linear.part == "embedding"


def _turned(weight: WeightForm, targets: Callable[[Tensor], Tensor]) -> Tensor:
    """What rows of a weight should become, float32 [columns, rows], without a copy in between."""
    turned = torch.empty(weight.shape[1], weight.shape[0])
    for span, rows in row_chunks(weight):
        turned[:, span] = targets(rows).T
    return turned
