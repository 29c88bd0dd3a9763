"""The stage that reduces visual tokens, and the one table of the reducers that it knows.

Tokens are removed physically and their number is static, so that sequence, KV cache and graph
all shrink with it. A new reducer is one module beside these and one line in `AnyReducer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.auto import Auto
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.diverse.determinantal import Determinantal
from pocketvlm.compress.tokens.diverse.important_diverse import ImportantDiverse
from pocketvlm.compress.tokens.diverse.max_min import MaxMinDistance
from pocketvlm.compress.tokens.imported import Imported
from pocketvlm.compress.tokens.merge.dominant_merged import DominantMerged
from pocketvlm.compress.tokens.merge.similar import Similar
from pocketvlm.compress.tokens.pool.average_pool import AveragePool
from pocketvlm.compress.tokens.pool.thumbnail_sampled import ThumbnailSampled
from pocketvlm.compress.tokens.rank.attention_rows import AttentionRows
from pocketvlm.compress.tokens.rank.cls_attention import ClsAttention
from pocketvlm.compress.tokens.rank.cls_ensemble import ClsEnsemble
from pocketvlm.compress.tokens.rank.distinct_features import DistinctFeatures
from pocketvlm.compress.tokens.rank.feature_norm import FeatureNorm
from pocketvlm.compress.tokens.rank.received_attention import ReceivedAttention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.reducer import POSITION_POLICIES, PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["REDUCERS", "AnyReducer", "ReduceTokens"]

AnyReducer = (
    Auto
    | ClsAttention
    | ClsEnsemble
    | ReceivedAttention
    | DistinctFeatures
    | FeatureNorm
    | AttentionRows
    | ImportantDiverse
    | MaxMinDistance
    | Determinantal
    | DominantMerged
    | Similar
    | UniformStride
    | RandomTokens
    | AveragePool
    | ThumbnailSampled
    | Imported
)
"""Everything that a recipe may name as `reducer`."""
REDUCERS: Mapping[str, type[Reducer]] = {kind.kind: kind for kind in get_args(AnyReducer)}
"""The same by name."""

_AUTO = Auto()


@dataclass(frozen=True, kw_only=True)
class ReduceTokens(Stage):
    """Keeps `keep` visual tokens of every image.

    Attributes:
        reducer: What becomes of the tokens.
        keep: A share of the tokens (a float in (0, 1], rounded to the nearest number that the
            reducer can leave), or their number (an integer).
        positions: Whether kept tokens keep their rotary positions among all N (`original`), or
            are recounted (`consecutive`).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"all_tokens"})
    provides: ClassVar[frozenset[str]] = frozenset({"reduced_tokens"})
    # A quantizer must see the sequence that the phone will run, so it comes later.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"reduced_tokens", "quantized_weights", "quantized_cache"}
    )

    carries_taps: ClassVar[bool] = True

    method: Literal["reduce_tokens"] = "reduce_tokens"
    reducer: AnyReducer = _AUTO
    keep: float | int = 0.5
    positions: PositionPolicy = "original"

    def __post_init__(self) -> None:
        if self.positions not in POSITION_POLICIES:
            raise ValueError(
                f"positions is {self.positions!r}; allowed are {', '.join(POSITION_POLICIES)}"
            )
        is_count = isinstance(self.keep, int) and not isinstance(self.keep, bool)
        if is_count and self.keep < 1:
            raise ValueError(f"keep is {self.keep}; a count is at least 1")
        if not is_count and not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            raise ValueError(
                f"keep is {self.keep!r}; allowed are a share in (0, 1] or a whole number of tokens"
            )

    def resolved_keep(self, spec: ModelSpec) -> int:
        """The number of tokens that remain of this model's.

        Raises:
            RecipeError: It is more than there are.
        """
        total = spec.visual_tokens
        if isinstance(self.keep, int):
            if self.keep > total:
                raise RecipeError(
                    f"reduce_tokens: keep {self.keep} is more than the {total} visual tokens of "
                    f"an image; allowed are 1 to {total}"
                )
            return self.keep
        reducer = self.reducer.choose(spec)
        return reducer.nearest_count(spec, max(1, round(self.keep * total)))

    def build(self, spec: ModelSpec) -> TokenReducer:
        """The module that reduces this model's tokens.

        Raises:
            RecipeError: `keep` does not suit the model.
            UnsupportedError: The reducer does not suit its tower.
        """
        if self.positions == "consecutive" and spec.position_grid is not None:
            raise RecipeError(
                "reduce_tokens: positions are rows and columns of a picture in this model, which "
                "cannot be recounted; allowed is original"
            )
        keep = self.resolved_keep(spec)
        return self.reducer.build(spec, keep=keep, positions=self.positions).eval()

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer visual tokens."""
        return replace(state, visual_tokens=self.build(state.spec).keep)

    @classmethod
    def build_reducer(cls, parameters: Mapping[str, Any], spec: ModelSpec) -> TokenReducer:
        """The reducer of a saved checkpoint, from the parameters in its history.

        Args:
            parameters: The configuration of the stage, as JSON values; also as it was recorded
                before reducers had their own options.
            spec: The model.

        Raises:
            ValueError: A value is none that the stage can have.
            KeyError: There is no such reducer.
            TypeError: There is no such option.
            CheckpointError: It is code that only the checkpoint names.
        """
        given = dict(parameters)
        if "reducer" not in given:
            kind, seed = given.pop("score"), given.pop("seed")
            given["reducer"] = {"kind": kind, **({"seed": seed} if kind == "random_tokens" else {})}
        options = dict(given.pop("reducer"))
        reducer: Any = REDUCERS[options["kind"]](**options)
        if isinstance(reducer, Imported):
            reducer.require_trusted()
        return cls(reducer=reducer, **given).build(spec)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Gives the checkpoint its reducer; the weights stay as they are.

        Raises:
            RecipeError: `keep` does not suit the model, or tokens are reduced already.
            UnsupportedError: The reducer does not suit its tower.
        """
        if checkpoint.reducer is not None:
            raise RecipeError(
                f"reduce_tokens: visual tokens are reduced to {checkpoint.reducer.keep} already; "
                "a checkpoint is reduced once"
            )
        spec = checkpoint.spec
        reducer = self.build(spec)
        ctx.report(self.method, 1, 1, f"{reducer.keep} of {spec.visual_tokens} tokens")
        return StageResult(
            checkpoint=replace(checkpoint, reducer=reducer),
            is_calibrated=False,
            metrics={
                "reducer": self.reducer.choose(spec).kind,
                "keep": reducer.keep,
                "of": spec.visual_tokens,
                "kept_share": reducer.keep / spec.visual_tokens,
            },
        )
