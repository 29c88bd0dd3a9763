"""The questions that a finished bundle is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.pipeline.sources import load_evaluation
from pocketvlm.reference import REFERENCE_MODELS

__all__ = ["Questions", "choose_samples"]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions for both sides.

    Attributes:
        checkpoint: The checkpoint that the bundle was made from; `None` for the one next to it.
        data: A folder of pictures and questions, or `reference:SEED`; `None` for generated scenes
            if the model is a reference model, else for synthetic pictures.
        n: The number of questions.
        tokens: The longest greedy answer that is compared.
    """

    checkpoint: Path | None = None
    data: str | None = None
    n: int = 4
    tokens: int = 16


def choose_samples(bundle: Bundle, questions: Questions) -> CalibrationSet:
    """The pictures and prompts of the questions.

    Raises:
        CalibrationError: There is no such data.
    """
    if questions.data is not None:
        return load_evaluation(questions.data, questions.n)
    pictures = REFERENCE_MODELS.get(bundle.manifest.model)
    if pictures is not None:
        return CalibrationSet.from_reference(
            seed=1, n=questions.n, split="evaluation", pictures=pictures
        )
    return CalibrationSet.synthetic(n=questions.n)
