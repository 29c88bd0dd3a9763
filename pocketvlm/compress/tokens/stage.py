"""The stage that reduces visual tokens, and the one table of the reducers that it knows.

Tokens are removed physically and their number is static, so that sequence, KV cache and graph
all shrink with it. A new reducer is one module beside these and one line in `AnyReducer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pocketvlm.bundle import TileBudget
from pocketvlm.checkpoint import Checkpoint, combine_vision
from pocketvlm.compress.tokens.auto import Auto
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.diverse.determinantal import Determinantal
from pocketvlm.compress.tokens.diverse.important_diverse import ImportantDiverse
from pocketvlm.compress.tokens.diverse.max_min import MaxMinDistance
from pocketvlm.compress.tokens.imported import Imported
from pocketvlm.compress.tokens.keep import require_keep
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
from pocketvlm.compress.tokens.tile_budgets.detail import Detail
from pocketvlm.compress.tokens.tile_budgets.hired import Hired
from pocketvlm.compress.tokens.tile_budgets.whole_finer import WholeFiner
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.reducer import POSITION_POLICIES, PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlannedVision, PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["REDUCERS", "AnyReducer", "AnyTileBudget", "ReduceTokens"]

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

AnyTileBudget = WholeFiner | Detail | Hired
"""Everything that a recipe may name as `tile_budget`."""

_AUTO = Auto()


@dataclass(frozen=True, kw_only=True)
class ReduceTokens(Stage):
    """Keeps `keep` visual tokens of every image.

    Attributes:
        reducer: What becomes of the tokens.
        keep: A share of the tokens (a float in (0, 1], rounded to the nearest number that the
            reducer can leave), or their number (an integer). Several make a vision graph each,
            over the same weights, of which an app chooses question by question, or `tile_budget`
            tile by tile; what follows is calibrated with the first.
        positions: Whether kept tokens keep their rotary positions among all N (`original`), or
            are recounted (`consecutive`).
        tile_budget: How many tokens each tile of a cut picture has, of the numbers in `keep`;
            `None` for as many of each.
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
    keep: float | int | tuple[float | int, ...] = 0.5
    positions: PositionPolicy = "original"
    tile_budget: AnyTileBudget | None = None

    def __post_init__(self) -> None:
        if self.positions not in POSITION_POLICIES:
            raise ValueError(
                f"positions is {self.positions!r}; allowed are {', '.join(POSITION_POLICIES)}"
            )
        if not self.keeps:
            raise ValueError("keep is an empty list; at least one number or share is needed")
        for keep in self.keeps:
            require_keep("keep", keep)

    @property
    def keeps(self) -> tuple[float | int, ...]:
        """What is kept by each vision graph, first the one that calibration runs."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    def resolved_keeps(self, spec: ModelSpec) -> tuple[int, ...]:
        """The numbers of tokens that remain of this model's.

        Raises:
            RecipeError: One is more than there are, or two are the same.
        """
        counts = tuple(self._resolved_keep(spec, keep) for keep in self.keeps)
        if len(set(counts)) < len(counts):
            size = f"{spec.tower.width} x {spec.tower.height}"
            raise RecipeError(
                f"reduce_tokens: keep leaves {', '.join(map(str, counts))} of the "
                f"{spec.visual_tokens} visual tokens of a picture of {size}; numbers must differ"
            )
        return counts

    def _resolved_keep(self, spec: ModelSpec, keep: float) -> int:
        total = spec.visual_tokens
        if isinstance(keep, int):
            if keep > total:
                raise RecipeError(
                    f"reduce_tokens: keep {keep} is more than the {total} visual tokens of "
                    f"an image; allowed are 1 to {total}"
                )
            return keep
        reducer = self.reducer.choose(spec)
        return reducer.nearest_count(spec, max(1, round(keep * total)))

    def build(self, spec: ModelSpec) -> TokenReducer:
        """The module that reduces this model's tokens, the first one where there are several."""
        return self.build_each(spec)[0]

    def build_each(self, spec: ModelSpec) -> tuple[TokenReducer, ...]:
        """The modules that reduce this model's tokens, one for each of `keeps`.

        Raises:
            RecipeError: `keep` does not suit the model.
            UnsupportedError: The reducer does not suit its tower.
        """
        if self.positions == "consecutive" and spec.position_grid is not None:
            raise RecipeError(
                "reduce_tokens: positions are rows and columns of a picture in this model, which "
                "cannot be recounted; allowed is original"
            )
        return tuple(
            self.reducer.build(spec, keep=keep, positions=self.positions).eval()
            for keep in self.resolved_keeps(spec)
        )

    def budget(self, spec: ModelSpec, sizes: Sequence[PictureSize] = ()) -> TileBudget | None:
        """How many tokens each tile of this model has; `None` for as many of each.

        Args:
            spec: The model.
            sizes: Sizes of pictures beside the model's, for which there are vision graphs.

        Raises:
            RecipeError: `tile_budget` does not suit the model, or `keep`.
        """
        if self.tile_budget is None:
            return None
        if sizes:
            raise RecipeError(
                "reduce_tokens: tile_budget is for tiles of one size, and set_resolution names "
                f"{len(sizes) + 1}"
            )
        try:
            return self.tile_budget.plan(
                spec,
                self.resolved_keeps(spec),
                self.reducer.choose(spec),
                partial(self._resolved_keep, spec),
            )
        except RecipeError as error:
            raise RecipeError(
                f"reduce_tokens: {str(error).removeprefix('reduce_tokens: ')}"
            ) from error

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer visual tokens."""
        sizes = [vision.size for vision in state.other_vision]
        first, *others = (
            PlannedVision(size=vision.size, visual_tokens=vision.reducer.keep)
            for vision in combine_vision(state.spec, sizes, self.build_each)
            if vision.reducer is not None
        )
        return replace(
            state,
            visual_tokens=first.visual_tokens,
            other_vision=tuple(others),
            tile_budget=self.budget(state.spec, sizes),
        )

    @classmethod
    def build_reducers(
        cls, parameters: Mapping[str, Any], spec: ModelSpec
    ) -> tuple[TokenReducer, ...]:
        """The reducers of a saved checkpoint, from the parameters in its history.

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
        if isinstance(given["keep"], list):
            given["keep"] = tuple(given["keep"])
        given.pop("tile_budget", None)  # the checkpoint's manifest has what it became
        options = dict(given.pop("reducer"))
        reducer: Any = REDUCERS[options["kind"]](**options)
        if isinstance(reducer, Imported):
            reducer.require_trusted()
        return cls(reducer=reducer, **given).build_each(spec)

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
        first, *others = combine_vision(spec, checkpoint.other_sizes, self.build_each)
        budget = self.budget(spec, checkpoint.other_sizes)
        checkpoint = replace(
            checkpoint,
            reducer=first.reducer,
            other_vision=tuple(others),
            tile_budget=budget,
        )
        kept = [each.visual_tokens for each in checkpoint.each_vision()]
        ctx.report(
            self.method, 1, 1, f"{' or '.join(map(str, kept))} of {spec.visual_tokens} tokens"
        )
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            metrics={
                "reducer": self.reducer.choose(spec).kind,
                "keep": kept[0],
                "of": spec.visual_tokens,
                "kept_share": kept[0] / spec.visual_tokens,
                **({"each": kept} if others else {}),
                **({} if budget is None else {"tile_budget": budget.describe()}),
            },
        )
