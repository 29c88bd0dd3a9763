"""What each vision graph of a planned model costs, where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.device_bench.devices import Device
from pocketvlm.pipeline.plan_memory import predict_memory
from pocketvlm.pipeline.predict import DevicePrediction, predict_on
from pocketvlm.stages import PlanState, Target
from pocketvlm.stages.photo import photo_tokens

__all__ = ["PlannedGraph", "planned_graphs"]


@dataclass(frozen=True, kw_only=True)
class PlannedGraph:
    """One vision graph, as a photo of 640 x 480 and a short chat use it.

    Attributes:
        name: Its name in the manifest.
        visual_tokens: Tokens per tile after reduction.
        visual_tokens_full: Tokens per tile before it.
        photo_tokens: Visual tokens of the photo that enter the decoder.
        kv_cache_bytes: Bytes of the decoder's cache.
        prediction: Times on the device that was asked for; `None` without one.
    """

    name: str
    visual_tokens: int
    visual_tokens_full: int
    photo_tokens: int
    kv_cache_bytes: int
    prediction: DevicePrediction | None

    def line(self) -> str:
        """The graph for people."""
        found = (
            f"vision graph   {self.name}: {self.visual_tokens} of {self.visual_tokens_full} "
            f"tokens, KV cache {self.kv_cache_bytes / 1e6:.2f} MB"
        )
        times = None if self.prediction is None else self.prediction.times
        if times is None:
            return found
        return (
            f"{found}, vision_ms {times.vision_ms:.1f}, ttft_user_ms {times.ttft_user_ms:.1f} "
            "predicted"
        )


def planned_graphs(
    state: PlanState, profile: Device | None, targets: Sequence[Target]
) -> tuple[PlannedGraph, ...]:
    """Every vision graph, in the order of the manifest; none where there is one alone.

    Args:
        state: The model as its stages leave it.
        profile: The device that times are predicted for.
        targets: What is exported.
    """
    if not state.other_vision:
        return ()
    return tuple(
        PlannedGraph(
            name=vision.vision_variant.name,
            visual_tokens=vision.visual_tokens,
            visual_tokens_full=vision.spec.visual_tokens,
            photo_tokens=photo_tokens(vision),
            kv_cache_bytes=predict_memory(vision, targets).cache_bytes,
            prediction=None if profile is None else predict_on(profile, vision, targets),
        )
        for vision in state.each_vision()
    )
