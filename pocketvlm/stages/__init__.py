"""The contract of stages and targets: everything that they can do is said by their types.

`plan_state` is what a recipe makes of a model before any compute, `stage` and `target` are the base
classes, `flags` checks the order of stages, and `walk_options` holds what stages that look at
layer inputs have in common. The tables of stages and targets are `recipes/stages.py`.
"""

from pocketvlm.stages.flags import INITIAL_FLAGS, check_order
from pocketvlm.stages.plan_state import FLOAT_CACHE_BITS, PlannedVision, PlanState
from pocketvlm.stages.stage import Stage, StageResult, run_stage
from pocketvlm.stages.target import Explanation, Prediction, Target

__all__ = [
    "FLOAT_CACHE_BITS",
    "INITIAL_FLAGS",
    "Explanation",
    "PlanState",
    "PlannedVision",
    "Prediction",
    "Stage",
    "StageResult",
    "Target",
    "check_order",
    "run_stage",
]
