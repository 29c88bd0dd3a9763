"""Options that benchmarks of answers share: models, held-out questions and calibration sets."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path

__all__ = ["answer_parser", "calibration_sets", "held_out_questions", "model_folders"]


def answer_parser(description: str | None, *, sets: int | None = 3) -> argparse.ArgumentParser:
    """A parser of the options that all of them have.

    Args:
        description: The script's docstring, whose first line is shown.
        sets: How many calibration sets there are by default; `None` where there is one for all.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--model", action="append", help="A reference model's name, or a folder.")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="Seed of the held-out questions.")
    parser.add_argument("--samples", type=int, default=128, help="Calibration samples.")
    if sets is not None:
        parser.add_argument("--calibration-seed", type=int, nargs="+", default=list(range(sets)))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def model_folders(options: argparse.Namespace) -> list[Path]:
    """The models that are named; all reference models unless one is."""
    return [
        reference_model_path(name) if name in REFERENCE_MODELS else Path(name)
        for name in options.model or REFERENCE_MODELS
    ]


def held_out_questions(options: argparse.Namespace) -> CalibrationSet:
    """Questions that nothing was fitted to."""
    return CalibrationSet.from_reference(options.seed, options.n, split="evaluation")


def calibration_sets(options: argparse.Namespace) -> list[CalibrationSet]:
    """One set of samples per calibration seed."""
    return [
        CalibrationSet.from_reference(seed, options.samples) for seed in options.calibration_seed
    ]
