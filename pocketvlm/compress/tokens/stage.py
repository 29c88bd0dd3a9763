"""The stage that reduces visual tokens, and the one table of the scores that it knows.

Tokens are removed physically and their number is static, so that sequence, KV cache and graph
all shrink with it. A new method is one module with a `build` beside these, and one line in
`SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline import random_tokens, uniform_stride
from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.compress.tokens.pool import average_pool
from pocketvlm.compress.tokens.rank import cls_attention, distinct_features, received_attention
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.reducer import POSITION_POLICIES, PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["SCORES", "ReduceTokens", "ScoreName"]

ScoreName = Literal[
    "auto",
    "cls_attention",
    "received_attention",
    "distinct_features",
    "uniform_stride",
    "random_tokens",
    "average_pool",
]


SCORES: Mapping[str, Callable[[ModelSpec, ReducerOptions], TokenReducer]] = {
    "cls_attention": cls_attention.build,
    "received_attention": received_attention.build,
    "distinct_features": distinct_features.build,
    "uniform_stride": uniform_stride.build,
    "random_tokens": random_tokens.build,
    "average_pool": average_pool.build,
}
"""Every method by the name that a recipe gives it."""


@dataclass(frozen=True, kw_only=True)
class ReduceTokens(Stage):
    """Keeps `keep` visual tokens of every image.

    Attributes:
        score: What a token is worth; `auto` is `cls_attention` where the tower has a [CLS] token
            and `distinct_features` where it has none (`docs/methods/visual_tokens.md` has the
            measurement that decided against `received_attention`).
        keep: A share of the tokens (a float in (0, 1], rounded to the nearest count, for
            `average_pool` to the nearest count that a grid has), or their number (an integer).
        positions: Whether kept tokens keep their rotary positions among all N (`original`), or
            are counted anew (`consecutive`).
        seed: Which subset `random_tokens` draws.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"all_tokens"})
    provides: ClassVar[frozenset[str]] = frozenset({"reduced_tokens"})
    # A quantizer must see the sequence that the phone will run, so it comes later.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"reduced_tokens", "quantized_weights", "quantized_cache"}
    )

    method: Literal["reduce_tokens"] = "reduce_tokens"
    score: ScoreName = "auto"
    keep: float | int = 0.5
    positions: PositionPolicy = "original"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score not in get_args(ScoreName):
            raise ValueError(
                f"score is {self.score!r}; allowed are {', '.join(get_args(ScoreName))}"
            )
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

    def resolved_score(self, spec: ModelSpec) -> str:
        """The method that scores this model's tokens; never `auto`."""
        if self.score != "auto":
            return self.score
        return "cls_attention" if spec.tower.has_cls else "distinct_features"

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
        count = max(1, round(self.keep * total))
        if self.score == "average_pool":
            reachable = average_pool.reachable_counts(round(total**0.5))
            return min(reachable, key=lambda candidate: abs(candidate - count))
        return count

    def reducer(self, spec: ModelSpec) -> TokenReducer:
        """The module that reduces this model's tokens.

        Raises:
            RecipeError: `keep` does not suit the model.
            UnsupportedError: The score does not suit its tower.
        """
        options = ReducerOptions(
            keep=self.resolved_keep(spec), positions=self.positions, seed=self.seed
        )
        return SCORES[self.resolved_score(spec)](spec, options).eval()

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer visual tokens."""
        return replace(state, visual_tokens=self.reducer(state.spec).keep)

    @classmethod
    def build_reducer(cls, parameters: Mapping[str, Any], spec: ModelSpec) -> TokenReducer:
        """The reducer of a saved checkpoint, from the parameters in its history."""
        return cls(**parameters).reducer(spec)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Gives the checkpoint its reducer; the weights stay as they are.

        Raises:
            RecipeError: `keep` does not suit the model, or tokens are reduced already.
            UnsupportedError: The score does not suit its tower.
        """
        if checkpoint.reducer is not None:
            raise RecipeError(
                f"reduce_tokens: visual tokens are reduced to {checkpoint.reducer.keep} already; "
                "a checkpoint is reduced once"
            )
        spec = checkpoint.spec
        reducer = self.reducer(spec)
        ctx.report(self.method, 1, 1, f"{reducer.keep} of {spec.visual_tokens} tokens")
        return StageResult(
            checkpoint=replace(checkpoint, reducer=reducer),
            is_calibrated=False,
            metrics={
                "score": self.resolved_score(spec),
                "keep": reducer.keep,
                "of": spec.visual_tokens,
                "kept_share": reducer.keep / spec.visual_tokens,
            },
        )
