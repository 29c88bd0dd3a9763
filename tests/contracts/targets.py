"""Every target, set to compare: floats stay floats, and a cache that tiny models do not fill."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.stages import Target

__all__ = ["TARGETS"]

TARGETS: Mapping[str, Target] = {
    "onnx": ToOnnx(accuracy_level=0, tower_accuracy_level=0),
    "executorch": ToExecutorch(context=448),
    # A chunk holds the prompts of models whose rows all see each other.
    "coreml": ToCoreml(context=448, chunk=48),
}
"""By the tag that names them in a recipe."""
