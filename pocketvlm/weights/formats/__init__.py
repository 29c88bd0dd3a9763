"""Checkpoint layouts that other tools read: GPTQ (v1 and v2), compressed-tensors, and VPTQ.

Pure functions between a form and the tensors of one layer, exact in both directions: no code, scale
or codebook entry changes on the way. What a layout has no place for is refused. Whole directories
are written by `pocketvlm.checkpoint.convert` and read by `Checkpoint.load`.
"""

from pocketvlm.weights.formats.compressed_tensors import (
    from_compressed_tensors,
    to_compressed_tensors,
)
from pocketvlm.weights.formats.compressed_tensors_config import (
    CompressedTensorsLayout,
    compressed_tensors_config,
)
from pocketvlm.weights.formats.detect import StoredLayout, read_stored_layout
from pocketvlm.weights.formats.gptq import from_gptq, to_gptq
from pocketvlm.weights.formats.gptq_config import GptqLayout, gptq_config
from pocketvlm.weights.formats.settings import AffineSettings
from pocketvlm.weights.formats.vptq import VptqLayout, from_vptq, to_vptq, vptq_layer_config

__all__ = [
    "AffineSettings",
    "CompressedTensorsLayout",
    "GptqLayout",
    "StoredLayout",
    "VptqLayout",
    "compressed_tensors_config",
    "from_compressed_tensors",
    "from_gptq",
    "from_vptq",
    "gptq_config",
    "read_stored_layout",
    "to_compressed_tensors",
    "to_gptq",
    "to_vptq",
    "vptq_layer_config",
]
