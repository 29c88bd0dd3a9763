"""A tiny model with four vision graphs: two sizes of pictures, two numbers of tokens each."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import write_tiny_model

__all__ = ["GRAPHS", "write_model_of_four_graphs"]

GRAPHS = ("k8_64x64", "k4_64x64", "k8_96x32", "k3_96x32")
"""Their names, in order."""

_STAGES = [
    {
        "method": "set_resolution",
        "height": 64,
        "width": 64,
        "also": [{"height": 32, "width": 96}],
    },
    {"method": "reduce_tokens", "reducer": {"kind": "uniform_stride"}, "keep": [8, 0.25]},
]


def write_model_of_four_graphs(folder: Path) -> Checkpoint:
    """Writes the model into the folder; returns it as the stages leave it."""
    write_tiny_model("qwen2-vl", folder)
    recipe = recipe_from_document(
        {"schema": 1, "name": "four graphs", "stages": _STAGES}, where="four graphs"
    )
    checkpoint, samples = load_checkpoint(folder), CalibrationSet.synthetic(1)
    for stage in recipe.stages:
        checkpoint = stage.apply(checkpoint, samples, RunContext(threads=1))
    return checkpoint
