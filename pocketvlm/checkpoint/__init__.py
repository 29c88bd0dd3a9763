"""Checkpoint: a model with its processor, its specification and everything that was done to it.

`config` reads config.json, `weight_files` says which files hold the weights, `load` builds the
model from them, `save` and `manifest` write and read the directories of this package, and
`checkpoint` is the class that all stages work on.
"""

from pocketvlm.checkpoint.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.checkpoint.manifest import CHECKPOINT_SCHEMA, ReducerBuilder
from pocketvlm.checkpoint.records import Source, StageRecord

__all__ = [
    "CHECKPOINT_SCHEMA",
    "Checkpoint",
    "ReducerBuilder",
    "Source",
    "StageRecord",
    "read_config",
    "read_spec",
]
