"""The artifact on disk: a signed folder, and the manifest that describes what is in it."""

from pocketvlm.bundle.bundle import Bundle, sign_bundle, write_manifest
from pocketvlm.bundle.manifest import (
    BUNDLE_SCHEMA,
    CacheLayout,
    Component,
    Generation,
    Manifest,
    MutualRows,
    PromptLayout,
    Role,
    RuntimeNeeds,
    TensorSignature,
)
from pocketvlm.bundle.positions import PositionGrid
from pocketvlm.bundle.tile_budget import TileBudget, share_out
from pocketvlm.bundle.variants import MOST_VARIANTS, VisionVariant
from pocketvlm.bundle.visual_schedule import VisualDrop, VisualSchedule

__all__ = [
    "BUNDLE_SCHEMA",
    "MOST_VARIANTS",
    "Bundle",
    "CacheLayout",
    "Component",
    "Generation",
    "Manifest",
    "MutualRows",
    "PositionGrid",
    "PromptLayout",
    "Role",
    "RuntimeNeeds",
    "TensorSignature",
    "TileBudget",
    "VisionVariant",
    "VisualDrop",
    "VisualSchedule",
    "share_out",
    "sign_bundle",
    "write_manifest",
]
