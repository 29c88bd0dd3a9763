"""pocketvlm turns a vision-language checkpoint into a phone-ready artifact that can be trusted.

```python
from pocketvlm import CalibrationSet, Gptq, RunContext, WeightRule, load_checkpoint

checkpoint = load_checkpoint("my-finetuned-vlm")
calibration = CalibrationSet.from_folder("my-pictures")
gptq = Gptq(rules=(WeightRule(part="decoder", bits=4, group_size=32),))
checkpoint = gptq.apply(checkpoint, calibration, RunContext())
```

Importing the package loads neither torch nor transformers: every name below is imported when it
is first used.
"""

from __future__ import annotations

from pocketvlm.environment import hush_imports, stop_reporting

# Not from `typing`: the command line cannot answer an interrupt before this module is imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pocketvlm.bundle import Bundle
    from pocketvlm.calibration.source import CalibrationSet, Sample
    from pocketvlm.checkpoint import Checkpoint, StageRecord
    from pocketvlm.compress.distillation.stage import Distill
    from pocketvlm.compress.pruning.depth import PruneDepth
    from pocketvlm.compress.pruning.ecoflap import Ecoflap
    from pocketvlm.compress.pruning.gblm import Gblm
    from pocketvlm.compress.pruning.magnitude import Magnitude
    from pocketvlm.compress.pruning.rules import PruneRule
    from pocketvlm.compress.pruning.skip_visual import SkipVisual
    from pocketvlm.compress.pruning.sparsegpt import SparseGpt
    from pocketvlm.compress.pruning.sparsegpt_gptq import SparseGptGptq
    from pocketvlm.compress.pruning.wanda import Wanda
    from pocketvlm.compress.pruning.width import PruneWidth
    from pocketvlm.compress.quantization.awq import Awq
    from pocketvlm.compress.quantization.cache import QuantizeCache
    from pocketvlm.compress.quantization.codebook import Codebook
    from pocketvlm.compress.quantization.codebook_rules import CodebookRule
    from pocketvlm.compress.quantization.gptq import Gptq
    from pocketvlm.compress.quantization.mixed import MixedPrecision
    from pocketvlm.compress.quantization.rotation import Rotate
    from pocketvlm.compress.quantization.rtn import RoundToNearest
    from pocketvlm.compress.quantization.rules import WeightRule
    from pocketvlm.compress.tokens.stage import ReduceTokens
    from pocketvlm.context import Progress, RunContext
    from pocketvlm.errors import PocketVLMError
    from pocketvlm.export.coreml.target import ToCoreml
    from pocketvlm.export.executorch.target import ToExecutorch
    from pocketvlm.export.onnx.target import ToOnnx
    from pocketvlm.modelspec import ModelSpec
    from pocketvlm.pipeline.plan import plan
    from pocketvlm.pipeline.run import RunResult, compress_checkpoint, run
    from pocketvlm.pipeline.sources import load_checkpoint
    from pocketvlm.recipes.load import Recipe, load_recipe
    from pocketvlm.runtime.conversation import Conversation

__all__ = [
    "Awq",
    "Bundle",
    "CalibrationSet",
    "Checkpoint",
    "Codebook",
    "CodebookRule",
    "Conversation",
    "Distill",
    "Ecoflap",
    "Gblm",
    "Gptq",
    "Magnitude",
    "MixedPrecision",
    "ModelSpec",
    "PocketVLMError",
    "Progress",
    "PruneDepth",
    "PruneRule",
    "PruneWidth",
    "QuantizeCache",
    "Recipe",
    "ReduceTokens",
    "Rotate",
    "RoundToNearest",
    "RunContext",
    "RunResult",
    "Sample",
    "SkipVisual",
    "SparseGpt",
    "SparseGptGptq",
    "StageRecord",
    "ToCoreml",
    "ToExecutorch",
    "ToOnnx",
    "Wanda",
    "WeightRule",
    "__version__",
    "compress_checkpoint",
    "load_checkpoint",
    "load_recipe",
    "plan",
    "run",
]

__version__ = "0.1.0"

# Before any library is imported: afterwards is too late.
stop_reporting()
hush_imports()

_HOMES = {
    "Awq": "compress.quantization.awq",
    "Bundle": "bundle",
    "CalibrationSet": "calibration.source",
    "Checkpoint": "checkpoint",
    "Codebook": "compress.quantization.codebook",
    "CodebookRule": "compress.quantization.codebook_rules",
    "Conversation": "runtime.conversation",
    "Distill": "compress.distillation.stage",
    "Ecoflap": "compress.pruning.ecoflap",
    "Gblm": "compress.pruning.gblm",
    "Gptq": "compress.quantization.gptq",
    "Magnitude": "compress.pruning.magnitude",
    "MixedPrecision": "compress.quantization.mixed",
    "ModelSpec": "modelspec",
    "PocketVLMError": "errors",
    "Progress": "context",
    "PruneDepth": "compress.pruning.depth",
    "PruneRule": "compress.pruning.rules",
    "PruneWidth": "compress.pruning.width",
    "QuantizeCache": "compress.quantization.cache",
    "Recipe": "recipes.load",
    "ReduceTokens": "compress.tokens.stage",
    "Rotate": "compress.quantization.rotation",
    "RoundToNearest": "compress.quantization.rtn",
    "RunContext": "context",
    "RunResult": "pipeline.run",
    "Sample": "calibration.source",
    "SkipVisual": "compress.pruning.skip_visual",
    "SparseGpt": "compress.pruning.sparsegpt",
    "SparseGptGptq": "compress.pruning.sparsegpt_gptq",
    "StageRecord": "checkpoint",
    "ToCoreml": "export.coreml.target",
    "ToExecutorch": "export.executorch.target",
    "ToOnnx": "export.onnx.target",
    "Wanda": "compress.pruning.wanda",
    "WeightRule": "compress.quantization.rules",
    "compress_checkpoint": "pipeline.run",
    "load_checkpoint": "pipeline.sources",
    "load_recipe": "recipes.load",
    "plan": "pipeline.plan",
    "run": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its home when it is first asked for."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'pocketvlm' has no attribute {name!r}")
    return getattr(import_module(f"pocketvlm.{_HOMES[name]}"), name)
