"""Every target, set to compare: floats stay floats, and a cache that tiny models do not fill.

Beside them the stages of `int4-small`, in groups that tiny towers hold.
"""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.stages import Stage, Target

__all__ = ["CERTIFIED", "INT4_STAGES", "TARGETS"]

TARGETS: Mapping[str, Target] = {
    "onnx": ToOnnx(accuracy_level=0, tower_accuracy_level=0),
    "executorch": ToExecutorch(context=448),
    # A chunk holds the prompts of models whose rows all see each other.
    "coreml": ToCoreml(context=448, chunk=48),
}
"""By the tag that names them in a recipe."""

INT4_STAGES: tuple[Stage, ...] = (
    ReduceTokens(keep=0.5),
    Gptq(rules=(WeightRule(match=".*", bits=4, group_size=32, symmetric=True),)),
)
"""Half of the visual tokens, int4 everywhere."""

CERTIFIED = ("onnx", "executorch", "coreml")
"""Targets on which a certificate is made of every family after these stages."""
