"""Checkpoint layouts that other tools read: GPTQ (v1 and v2) and VPTQ.

Pure functions between a form and the tensors of one layer, exact in both directions: no code, scale
or codebook entry changes on the way. What a layout has no place for is refused. Whole directories
are written by `pocketvlm.save_layout` and read by `Checkpoint.load`.
"""

from pocketvlm.layouts.gptq import GptqSettings, from_gptq, to_gptq
from pocketvlm.layouts.gptq_config import GptqLayout, gptq_config
from pocketvlm.layouts.stored import StoredLayout, read_stored_layout
from pocketvlm.layouts.vptq import VptqLayout, from_vptq, to_vptq, vptq_layer_config

__all__ = [
    "GptqLayout",
    "GptqSettings",
    "StoredLayout",
    "VptqLayout",
    "from_gptq",
    "from_vptq",
    "gptq_config",
    "read_stored_layout",
    "to_gptq",
    "to_vptq",
    "vptq_layer_config",
]
