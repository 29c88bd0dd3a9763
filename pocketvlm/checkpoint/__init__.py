"""Checkpoint: a model with its processor, its specification and its history.

`config` reads config.json; `weight_files`, `tensors` and `names` say which files hold the weights,
what is in them and which weight each tensor is, and `folder` resolves all of that before anything
is loaded. `build` and `load` make the model, `save` and `manifest` write and read the directories
of this package, and `checkpoint` is the class that all stages work on.
"""

from pocketvlm.checkpoint.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.checkpoint.folder import ModelFolder, read_model_folder
from pocketvlm.checkpoint.manifest import CHECKPOINT_SCHEMA, ReducerBuilder
from pocketvlm.checkpoint.records import Source, StageRecord
from pocketvlm.checkpoint.vision import Vision, combine_vision

__all__ = [
    "CHECKPOINT_SCHEMA",
    "Checkpoint",
    "ModelFolder",
    "ReducerBuilder",
    "Source",
    "StageRecord",
    "Vision",
    "combine_vision",
    "read_config",
    "read_model_folder",
    "read_spec",
]
