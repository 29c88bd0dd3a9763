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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketvlm.bundle import Bundle
    from pocketvlm.calibration.source import CalibrationSet, Sample
    from pocketvlm.checkpoint import Checkpoint, StageRecord
    from pocketvlm.compress.quantization.gptq import Gptq
    from pocketvlm.compress.quantization.rtn import RoundToNearest
    from pocketvlm.compress.quantization.rules import WeightRule
    from pocketvlm.compress.tokens.stage import ReduceTokens
    from pocketvlm.context import Progress, RunContext
    from pocketvlm.errors import PocketVLMError
    from pocketvlm.export.onnx import ToOnnx
    from pocketvlm.modelspec import ModelSpec
    from pocketvlm.pipeline.plan import plan
    from pocketvlm.pipeline.run import RunResult, compress_checkpoint, run
    from pocketvlm.pipeline.sources import load_checkpoint
    from pocketvlm.recipes.load import Recipe, load_recipe
    from pocketvlm.runtime.conversation import Conversation

__all__ = [
    "Bundle",
    "CalibrationSet",
    "Checkpoint",
    "Conversation",
    "Gptq",
    "ModelSpec",
    "PocketVLMError",
    "Progress",
    "Recipe",
    "ReduceTokens",
    "RoundToNearest",
    "RunContext",
    "RunResult",
    "Sample",
    "StageRecord",
    "ToOnnx",
    "WeightRule",
    "__version__",
    "compress_checkpoint",
    "load_checkpoint",
    "load_recipe",
    "plan",
    "run",
]

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle",
    "CalibrationSet": "calibration.source",
    "Checkpoint": "checkpoint",
    "Conversation": "runtime.conversation",
    "Gptq": "compress.quantization.gptq",
    "ModelSpec": "modelspec",
    "PocketVLMError": "errors",
    "Progress": "context",
    "Recipe": "recipes.load",
    "ReduceTokens": "compress.tokens.stage",
    "RoundToNearest": "compress.quantization.rtn",
    "RunContext": "context",
    "RunResult": "pipeline.run",
    "Sample": "calibration.source",
    "StageRecord": "checkpoint",
    "ToOnnx": "export.onnx",
    "WeightRule": "compress.quantization.rules",
    "compress_checkpoint": "pipeline.run",
    "load_checkpoint": "pipeline.sources",
    "load_recipe": "recipes.load",
    "plan": "pipeline.plan",
    "run": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its home when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pocketvlm' has no attribute {name!r}")
    return getattr(import_module(f"pocketvlm.{_HOMES[name]}"), name)
