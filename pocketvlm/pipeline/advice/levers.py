"""Which lever pays for which model: the time to the first token if each halved what it works on.

A lever is a stage of a recipe, planned on the model as the recipe leaves it, so that what is said
of it is what `plan` says once the stage is in the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.schedule.exit import Exit
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.set_resolution import SetResolution
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.device_bench.prediction.roofline import Times
from pocketvlm.errors import RecipeError, UnsupportedError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.plan_memory import predict_memory
from pocketvlm.stages import PlanState, Stage, Target

__all__ = ["Lever", "Levers", "weigh_levers"]

TimesOf = Callable[[PlanState], Times]


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One stage, and what the model takes with it.

    Attributes:
        name: What it works on.
        stage: The stage with its options, as a recipe has it; empty for the model as planned.
        refused: Why the model cannot have it; empty where it can.
        times: Predicted times with it; `None` where it is refused.
        cache_bytes: The KV cache of a photo and a short chat.
    """

    name: str
    stage: str = ""
    refused: str = ""
    times: Times | None = None
    cache_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Levers:
    """The model as planned, and every lever.

    Attributes:
        planned: Without a lever.
        rows: With each, the one that saves most time to the first token first, refused ones last.
    """

    planned: Lever
    rows: tuple[Lever, ...]

    def lines(self) -> list[str]:
        """The table for people."""
        times = self.planned.times
        if times is None:  # never: the planned model is not refused
            return []
        head = ("vision_ms", "prefill_ms", "ttft_user_ms", "saved", "cache MB")
        share = times.vision_ms / times.ttft_user_ms
        return [
            f"levers         {'each at about half of what it works on':<46}"
            + "".join(f"{name:>13}" for name in head),
            *(self._line(lever) for lever in (self.planned, *self.rows)),
            f"               {share:.0%} of the wait is the tower, "
            f"{times.prefill_ms / times.ttft_user_ms:.0%} the decoder's prefill",
        ]

    def _line(self, lever: Lever) -> str:
        if lever.times is None or self.planned.times is None:
            return f"  {lever.name:<22} refused: {lever.refused}"
        found, saved = lever.times, self.planned.times.ttft_user_ms - lever.times.ttft_user_ms
        return (
            f"  {lever.name:<22} {lever.stage:<36}{found.vision_ms:>13.1f}{found.prefill_ms:>13.1f}"
            f"{found.ttft_user_ms:>13.1f}{saved:>13.1f}{lever.cache_bytes / 1e6:>13.2f}"
        )


def weigh_levers(
    state: PlanState, targets: Sequence[Target], times_of: TimesOf, *, tiles: int
) -> Levers:
    """Plans every lever on a model.

    Args:
        state: The model as its recipe leaves it.
        targets: What it is exported to.
        times_of: Times of a planned model.
        tiles: Tiles of the picture that is asked about.
    """
    planned = _weighed(state, targets, times_of, Lever(name="as planned"))
    rows = []
    for name, stage, shown in _stages(state, tiles):
        lever = Lever(name=name, stage=shown)
        try:
            changed = stage.plan(state)
        except (RecipeError, UnsupportedError) as error:
            rows.append(replace(lever, refused=str(error).partition(": ")[2] or str(error)))
            continue
        if isinstance(stage, SetResolution):  # which plans a model that keeps all of its tokens
            kept = state.visual_tokens / state.spec.visual_tokens
            changed = replace(changed, visual_tokens=max(1, round(kept * changed.visual_tokens)))
        reasons = [reason for target in targets for reason in target.refuse(changed)]
        if reasons:
            rows.append(replace(lever, refused=reasons[0]))
        else:
            rows.append(_weighed(changed, targets, times_of, lever))
    rows.sort(key=lambda lever: math.inf if lever.times is None else lever.times.ttft_user_ms)
    return Levers(planned=planned, rows=tuple(rows))


def _weighed(state: PlanState, targets: Sequence[Target], times_of: TimesOf, lever: Lever) -> Lever:
    return replace(
        lever, times=times_of(state), cache_bytes=predict_memory(state, targets).cache_bytes
    )


def _stages(state: PlanState, tiles: int) -> Iterator[tuple[str, Stage, str]]:
    """What each lever works on, the stage, and how a recipe writes it."""
    spec = state.spec
    if tiles > 1:
        most = tiles // 2
        yield "tiles", LimitTiles(max_tiles=most), f"limit_tiles: max_tiles {most} of {tiles}"
    if spec.tower.takes_any_size:
        height, width = _half_size(spec)
        shown = f"set_resolution: {height} x {width} of {spec.tower.height} x {spec.tower.width}"
        yield "resolution", SetResolution(height=height, width=width), shown
    merges = spec.tower.merges
    patches = merges[-1].patches if merges else spec.tower.patches
    shown = f"merge_tokens: keep {patches // 2} of {patches}"
    yield "tokens in tower", MergeTokens(keep=max(1, patches // 2)), shown
    keep = max(1, state.visual_tokens // 2)
    shown = f"reduce_tokens: keep {keep} of {state.visual_tokens}"
    yield "tokens before decoder", ReduceTokens(keep=keep), shown
    schedule = state.visual_schedule
    depth = spec.decoder.depth if schedule is None else schedule.drops[0].layers
    layers = max(1, depth // 2)
    shown = f"drop_tokens: exit after {layers} of {depth}"
    yield "tokens in decoder", DropTokens(schedule=Exit(first_layers=layers)), shown


def _half_size(spec: ModelSpec) -> tuple[int, int]:
    """Height and width of about half the pixels, in whole cells and windows."""
    tower = spec.tower
    windows = {block.attention.window for block in tower.blocks} - {None}
    patches = math.lcm(spec.projector.merge_factor, *(side for side in windows if side))
    step = tower.patch_size * patches

    def shorter(pixels: int) -> int:
        return max(step, round(pixels * 0.5**0.5 / step) * step)

    return shorter(tower.height), shorter(tower.width)
