"""pocketvlm turns a vision-language checkpoint into a phone-ready artifact that can be trusted.

```python
from pocketvlm import CalibrationSet, Gptq, RunContext, WeightRule, load_checkpoint

checkpoint = load_checkpoint("my-finetuned-vlm")
calibration = CalibrationSet.from_folder("my-pictures")
gptq = Gptq(rules=(WeightRule(part="decoder", bits=4, group_size=32),))
checkpoint = gptq.apply(checkpoint, calibration, RunContext())
```

Importing the package loads neither torch nor transformers: each name below is imported on first
use.
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
    from pocketvlm.compress.pruning.depth.stage import PruneDepth
    from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
    from pocketvlm.compress.pruning.unstructured.gblm import Gblm
    from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
    from pocketvlm.compress.pruning.unstructured.pruner import Prune
    from pocketvlm.compress.pruning.unstructured.rules import PruneRule
    from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
    from pocketvlm.compress.pruning.unstructured.sparsegpt_gptq import SparseGptGptq
    from pocketvlm.compress.pruning.unstructured.wanda import Wanda
    from pocketvlm.compress.pruning.width.stage import PruneWidth
    from pocketvlm.compress.quantization.affine.awq import Awq
    from pocketvlm.compress.quantization.affine.gptq import Gptq
    from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
    from pocketvlm.compress.quantization.affine.rules import WeightRule
    from pocketvlm.compress.quantization.codebook.rules import CodebookRule
    from pocketvlm.compress.quantization.codebook.stage import Codebook
    from pocketvlm.compress.quantization.kv_cache import QuantizeCache
    from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
    from pocketvlm.compress.quantization.transforms.rotation import Rotate
    from pocketvlm.compress.tokens.schedule.stage import DropTokens
    from pocketvlm.compress.tokens.stage import ReduceTokens
    from pocketvlm.context import Progress, RunContext
    from pocketvlm.errors import PocketVLMError
    from pocketvlm.export.coreml.target import ToCoreml
    from pocketvlm.export.executorch.target import ToExecutorch
    from pocketvlm.export.onnx.target import ToOnnx
    from pocketvlm.models.spec import ModelSpec
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
    "DropTokens",
    "Ecoflap",
    "Gblm",
    "Gptq",
    "Magnitude",
    "MixedPrecision",
    "ModelSpec",
    "PocketVLMError",
    "Progress",
    "Prune",
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

# Must run before any library is imported.
stop_reporting()
hush_imports()

_HOMES = {
    "Awq": "compress.quantization.affine.awq",
    "Bundle": "bundle",
    "CalibrationSet": "calibration.source",
    "Checkpoint": "checkpoint",
    "Codebook": "compress.quantization.codebook.stage",
    "CodebookRule": "compress.quantization.codebook.rules",
    "Conversation": "runtime.conversation",
    "Distill": "compress.distillation.stage",
    "Ecoflap": "compress.pruning.unstructured.ecoflap",
    "Gblm": "compress.pruning.unstructured.gblm",
    "Gptq": "compress.quantization.affine.gptq",
    "Magnitude": "compress.pruning.unstructured.magnitude",
    "MixedPrecision": "compress.quantization.mixed.stage",
    "ModelSpec": "models.spec",
    "PocketVLMError": "errors",
    "Progress": "context",
    "Prune": "compress.pruning.unstructured.pruner",
    "PruneDepth": "compress.pruning.depth.stage",
    "PruneRule": "compress.pruning.unstructured.rules",
    "PruneWidth": "compress.pruning.width.stage",
    "QuantizeCache": "compress.quantization.kv_cache",
    "Recipe": "recipes.load",
    "ReduceTokens": "compress.tokens.stage",
    "Rotate": "compress.quantization.transforms.rotation",
    "RoundToNearest": "compress.quantization.affine.rtn",
    "RunContext": "context",
    "RunResult": "pipeline.run",
    "Sample": "calibration.source",
    "DropTokens": "compress.tokens.schedule.stage",
    "SparseGpt": "compress.pruning.unstructured.sparsegpt",
    "SparseGptGptq": "compress.pruning.unstructured.sparsegpt_gptq",
    "StageRecord": "checkpoint",
    "ToCoreml": "export.coreml.target",
    "ToExecutorch": "export.executorch.target",
    "ToOnnx": "export.onnx.target",
    "Wanda": "compress.pruning.unstructured.wanda",
    "WeightRule": "compress.quantization.affine.rules",
    "compress_checkpoint": "pipeline.run",
    "load_checkpoint": "pipeline.sources",
    "load_recipe": "recipes.load",
    "plan": "pipeline.plan",
    "run": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'pocketvlm' has no attribute {name!r}")
    return getattr(import_module(f"pocketvlm.{_HOMES[name]}"), name)
