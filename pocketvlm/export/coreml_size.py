"""Predicts the Core ML target's bytes, and what it cannot run, from the specification alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.coreml_forms import Deployment
from pocketvlm.export.prediction import Prediction
from pocketvlm.modelspec import LinearSpec, ModelSpec
from pocketvlm.planned import PlannedForm

__all__ = ["predict_coreml"]


def predict_coreml(
    spec: ModelSpec,
    forms: Mapping[LinearSpec, PlannedForm | None],
    *,
    deployment: Deployment,
    float_bytes: int,
    capacity: int,
) -> Prediction:
    return Prediction(part_bytes={})
