"""How large a weight's gradient is, over samples: means in memory for one block, then in files."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pocketvlm.calibration.gradients.layer_gradients import LayerGradient
from pocketvlm.calibration.walk.activations import float64_device
from pocketvlm.compress.layerwise.scratch import find_tensors, keep_tensors
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import StorageError

__all__ = ["GradientNorm", "GradientNorms", "NormMean", "shrink_scatter"]

GradientNorm = Literal["l1", "l2"]
"""Over samples n: `l1` is mean |g_n|, `l2` is sqrt(mean g_n^2)."""

_KEY = "norms"
_SIGNAL = "signal"


def shrink_scatter(means: Tensor, noise: float) -> tuple[Tensor, float]:
    """Means over few samples, without the part of their scatter that the samples' own explains.

    A layer's means lie around the product of their rows' and columns' means, each of which is
    taken over hundreds of elements. How far they lie from it is partly noise, whose power the
    samples' variances tell; the distance is shortened by its share (James and Stein, 1961).

    Args:
        means: Not negative, [rows, columns].
        noise: Variance of the means, summed over elements.

    Returns:
        The means, and the share of the squared distance that is not noise, from 0 to 1.
    """
    overall = float(means.mean(dtype=torch.float64))
    if overall == 0:
        return means, 0.0
    typical = torch.outer(means.mean(dim=1), means.mean(dim=0) / overall)
    scatter = _squared_length(means - typical)
    signal = max(0.0, 1 - noise / scatter) if scatter > 0 else 0.0
    return typical.lerp_(means, signal), signal


class NormMean:
    """Accumulates one layer's norm over samples, element by element, in float32.

    A running mean: no sum grows until it swallows what is added, and the result depends neither on
    how many samples there are nor on how they were batched. Signs are dropped sample by sample;
    the mean of the gradients themselves is zero wherever training has converged.

    Args:
        norm: Which norm.

    Attributes:
        samples: Samples seen.
    """

    def __init__(self, norm: GradientNorm) -> None:
        self.samples = 0
        self._norm = norm
        self._mean: Tensor | None = None
        self._power = 0.0

    def add(self, step: LayerGradient) -> None:
        """Adds a batch, sample by sample: each has its own gradient."""
        for inputs, outputs in zip(step.inputs, step.outputs, strict=True):
            gradient = outputs.T @ inputs
            size = gradient.abs_() if self._norm == "l1" else gradient.square_()
            self.samples += 1
            self._power += (_squared_length(size) - self._power) / self.samples
            self._mean = size if self._mean is None else self._mean.lerp_(size, 1 / self.samples)

    def join(self, ranks: Ranks) -> None:
        """Makes it the norm over the samples of all ranks, added in order of rank."""
        if self._mean is None or ranks.count == 1:
            return
        counted = np.array([self.samples, self.samples * self._power])
        total = self._mean.mul_(self.samples).cpu()
        ranks.add_up(counted)
        ranks.add_up(total.numpy())
        self.samples = int(counted[0])
        self._mean = total.div_(self.samples)
        self._power = float(counted[1]) / self.samples

    @property
    def noise(self) -> float:
        """Variance of the mean of |g|, or of g^2, summed over elements; that of one is unknown."""
        if self._mean is None or self.samples < 2:  # noqa: PLR2004  (a variance needs two)
            return math.inf
        return max(0.0, self._power - _squared_length(self._mean)) / (self.samples - 1)

    def result(self, *, shrink: bool = False) -> tuple[Tensor, float]:
        """The norms; nothing can be added after it.

        Args:
            shrink: Whether what `shrink_scatter` finds to be noise is taken off.

        Returns:
            float32 [out_features, in_features], and the share of scatter that is not noise.

        Raises:
            ValueError: No sample was added.
        """
        if self._mean is None:
            raise ValueError("a norm needs at least one sample")
        mean = self._mean.to(float64_device(self._mean.device))
        shrunk, signal = shrink_scatter(mean, self.noise)
        mean = shrunk if shrink else mean
        return (mean if self._norm == "l1" else mean.sqrt_()), signal


def _squared_length(values: Tensor) -> float:
    """Sum of squares, where there is float64."""
    values = values.to(float64_device(values.device))
    return float(values.square().sum(dtype=torch.float64))


class GradientNorms:
    """The norms of many layers, each in one file that is whole or not there.

    Memory holds the means of one block at a time, disk four bytes per weight.

    Args:
        folder: Where files are kept, so that a killed run finds them; `None` for a temporary
            folder that goes when this object does.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="pocketvlm-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        """The norm of a layer's gradient, float32 [out_features, in_features].

        Raises:
            StorageError: It was there, and is damaged now.
        """
        return self.read(name)[0]

    def read(self, name: str) -> tuple[Tensor, float]:
        """The norm of a layer's gradient, and the share of its scatter that is not noise.

        Raises:
            StorageError: It was there, and is damaged now.
        """
        found = self._find(name)
        if found is None:
            raise StorageError(f"{self._path(name)}: is missing or damaged; run the command again")
        return found

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all of these layers are there and whole."""
        found = (self._find(name) for name in names)
        return all(each is not None and bool(torch.isfinite(each[0]).all()) for each in found)

    def share(self, names: Iterable[str], ranks: Ranks) -> None:
        """Gives all ranks the files of the first."""
        for name in names:
            ranks.spread_file(self._path(name), 0)

    def collect(
        self,
        steps: Iterable[LayerGradient],
        names: Iterable[str],
        norm: GradientNorm,
        on_layer: Callable[[str], None] = lambda _: None,
        *,
        shrink: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Takes the norms of some layers from a walk.

        Args:
            steps: What a walk yields.
            names: The layers; others pass by.
            norm: Which norm.
            on_layer: Called with a layer's name once it is written.
            shrink: Whether scatter that is noise is taken off.
            ranks: The processes, each of which walks over other samples.
        """
        wanted = set(names)
        open_means: dict[str, NormMean] = {}
        for step in steps:
            if step.name not in wanted:
                continue
            open_means.setdefault(step.name, NormMean(norm)).add(step)
            if step.is_last:
                mean = open_means.pop(step.name)
                mean.join(ranks)
                norms, signal = mean.result(shrink=shrink)
                keep_tensors(self._path(step.name), {_KEY: norms.cpu()}, {_SIGNAL: signal})
                on_layer(step.name)

    def _find(self, name: str) -> tuple[Tensor, float] | None:
        found = find_tensors(self._path(name))
        if found is None or _SIGNAL not in found[1]:
            return None
        return found[0][_KEY], float(found[1][_SIGNAL])

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self._folder / f"{name[-80:]}-{digest}.safetensors"
