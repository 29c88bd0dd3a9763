"""The one table of everything that a recipe may name.

A new method is one module, one line here, one test file, one page in the docs and one line in the
changelog. What an entry has to be able to do is said by `pocketvlm.stages` and tested by
`tests/contracts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketvlm.checkpoint import ReducerBuilder
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.sparsegpt_gptq import SparseGptGptq
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.codebook.stage import Codebook
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens.add_grid import AddGrid
from pocketvlm.compress.tokens.choose_grid import ChooseGrid
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.set_resolution import SetResolution
from pocketvlm.compress.tokens.skip_empty_tiles import SkipEmptyTiles
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.stages import Stage, Target
from pocketvlm.weights.layout import LayerBytes

__all__ = ["REDUCER_BUILDERS", "STAGES", "TARGETS", "layer_bytes_by_target"]


STAGES: tuple[type[Stage], ...] = (
    PruneDepth,
    PruneWidth,
    Prune,
    SetResolution,
    LimitTiles,
    ChooseGrid,
    AddGrid,
    SkipEmptyTiles,
    MergeTokens,
    ReduceTokens,
    DropTokens,
    Distill,
    Rotate,
    Awq,
    RoundToNearest,
    Gptq,
    SparseGptGptq,
    Codebook,
    MixedPrecision,
    QuantizeCache,
)
TARGETS: tuple[type[Target], ...] = (ToOnnx, ToCoreml, ToExecutorch)

REDUCER_BUILDERS: Mapping[str, ReducerBuilder] = {
    "reduce_tokens": ReduceTokens.build_reducers,
}
"""How a saved checkpoint gets its visual-token reducers back, by stage tag."""


def layer_bytes_by_target(targets: Sequence[Target]) -> Mapping[str, LayerBytes]:
    """What a layer takes in the files of each target, by its tag.

    Args:
        targets: Those of the recipe; a target that is not among them counts with its defaults.
    """
    defaults = [target() for target in TARGETS]
    return {target.method: target.layer_bytes for target in (*defaults, *targets)}
