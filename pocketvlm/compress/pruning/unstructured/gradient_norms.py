"""How large a weight's gradient is, over samples: means in memory for one block, then in files."""

from __future__ import annotations

import hashlib
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
from pocketvlm.compress.layerwise.scratch import find_tensors, keep_tensors
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import StorageError

__all__ = ["GradientNorm", "GradientNorms", "NormMean"]

GradientNorm = Literal["l1", "l2"]
"""Over samples n: `l1` is mean |g_n|, `l2` is sqrt(mean g_n^2)."""

_KEY = "norms"


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

    def add(self, step: LayerGradient) -> None:
        """Adds a batch, sample by sample: each has its own gradient."""
        for inputs, outputs in zip(step.inputs, step.outputs, strict=True):
            gradient = outputs.T @ inputs
            size = gradient.abs_() if self._norm == "l1" else gradient.square_()
            self.samples += 1
            self._mean = size if self._mean is None else self._mean.lerp_(size, 1 / self.samples)

    def join(self, ranks: Ranks) -> None:
        """Makes it the norm over the samples of all ranks, added in order of rank."""
        if self._mean is None or ranks.count == 1:
            return
        counted = np.array([self.samples])
        total = self._mean.mul_(self.samples).cpu()
        ranks.add_up(counted)
        ranks.add_up(total.numpy())
        self.samples = int(counted[0])
        self._mean = total.div_(self.samples)

    def result(self) -> Tensor:
        """float32 [out_features, in_features]; nothing can be added after it.

        Raises:
            ValueError: No sample was added.
        """
        if self._mean is None:
            raise ValueError("a norm needs at least one sample")
        return self._mean if self._norm == "l1" else self._mean.sqrt_()


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
        norms = self._find(name)
        if norms is None:
            raise StorageError(f"{self._path(name)}: is missing or damaged; run the command again")
        return norms

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all of these layers are there and whole."""
        found = (self._find(name) for name in names)
        return all(norms is not None and bool(torch.isfinite(norms).all()) for norms in found)

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
        ranks: Ranks = ALONE,
    ) -> None:
        """Takes the norms of some layers from a walk.

        Args:
            steps: What a walk yields.
            names: The layers; others pass by.
            norm: Which norm.
            on_layer: Called with a layer's name once it is written.
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
                norms = mean.result().cpu()
                keep_tensors(self._path(step.name), {_KEY: norms}, {})
                on_layer(step.name)

    def _find(self, name: str) -> Tensor | None:
        found = find_tensors(self._path(name))
        return None if found is None else found[0][_KEY]

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self._folder / f"{name[-80:]}-{digest}.safetensors"
