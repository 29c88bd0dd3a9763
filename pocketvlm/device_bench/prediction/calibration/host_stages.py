"""What an answer costs outside of graphs: decoding a picture, making pixels, choosing tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from PIL import Image

from pocketvlm.device_bench.workload import draw_picture
from pocketvlm.image_file import read_image
from pocketvlm.runtime.sampling import GREEDY

__all__ = ["HostStages", "host_stage_seconds"]

_SIDE, _RESIZED = 640, 512
_VOCABULARIES = (32_768, 131_072)
_RUNS = 9


@dataclass(frozen=True, kw_only=True)
class HostStages:
    """Rates of the stages outside of graphs; `Rates` documents them."""

    decoded_pixels_s: float
    resized_pixels_s: float
    sampled_logits_s: float
    token_us: float


def host_stage_seconds() -> HostStages:
    """Times the stages on generated content."""
    content = draw_picture(_SIDE)

    def decode() -> Image.Image:
        picture = read_image(content, "a generated picture")
        picture.load()
        return picture.convert("RGB")

    picture = decode()

    def resize() -> object:
        array = np.asarray(picture.resize((_RESIZED, _RESIZED), Image.Resampling.BICUBIC))
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        return np.stack([table[channel] for channel in np.moveaxis(array, -1, 0)])

    random = np.random.default_rng(0)
    generator = GREEDY.generator()
    seconds = []
    for size in _VOCABULARIES:
        logits = random.standard_normal(size, np.float32)
        seconds.append(_median_s(partial(GREEDY.choose, logits, generator)))
    few, many = _VOCABULARIES
    logit_s = max((seconds[1] - seconds[0]) / (many - few), 1e-13)
    return HostStages(
        decoded_pixels_s=_SIDE**2 / _median_s(decode),
        resized_pixels_s=_RESIZED**2 / _median_s(resize),
        sampled_logits_s=1 / logit_s,
        token_us=max(seconds[0] - logit_s * few, 1e-8) * 1e6,
    )


def _median_s(run: Callable[[], object]) -> float:
    samples = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return median(samples)
