"""Bundles of one model that differ after the tower alone, answered with one run of it per tile.

Methods that reduce tokens leave the tower as it is. What of a bundle's vision graph is node for
node that of the bundle of all tokens runs once for each tile; its outputs are kept, and every
bundle runs the rest of its own graph on them. Of every bundle the first tiles are encoded by its
whole graph as well, and must give the same tokens.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from pocketvlm.bundle import Bundle
from pocketvlm.runtime.onnx.engine import onnxruntime as ort
from pocketvlm.runtime.onnx.engine import require_exact_sums
from pocketvlm.runtime.onnx.runner import DEFAULT_CAPACITY, OnnxRunner

__all__ = ["SharedTower"]

_CHECKED_TILES = 8
_TOLERANCE = 1e-4
_PIXELS = "pixel_values"


class SharedTower:
    """What the tower of one model has made of tiles, for all bundles that hold the same tower.

    Attributes:
        runs: How often it ran.
    """

    def __init__(self, whole: Bundle, folder: Path) -> None:
        """Takes the bundle whose tower is shared, that of all tokens, and a folder for graphs."""
        self._file = _vision_file(whole)
        self._folder = folder
        self.runs = 0
        self._graph = onnx.load(self._file, load_external_data=False).graph
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}
        self._made: dict[bytes, dict[str, npt.NDArray[np.generic]]] = {}

    def open(self, bundle: Bundle, threads: int | None, rows: int) -> OnnxRunner:
        """Opens a bundle as `ENGINES` does, with a runner that asks this tower."""
        return _SharingRunner(bundle, self, threads=threads, rows=rows)

    def rest_of(self, bundle: Bundle) -> tuple[ort.InferenceSession, tuple[str, ...]]:
        """What the bundle does after the shared tower.

        Returns:
            Its graph, and the names of its inputs: outputs of the tower.
        """
        file = _vision_file(bundle)
        model = onnx.load(file, load_external_data=False)
        graph = model.graph
        known = {_without_offset(one) for one in self._graph.initializer}
        same = {one.name for one in graph.initializer if _without_offset(one) in known}
        nodes = {node.SerializeToString() for node in self._graph.node}
        shared, from_pixels = {_PIXELS, *same}, {_PIXELS}
        last = {output.name for output in graph.output}
        rest, borders = [], dict[str, None]()
        for node in graph.node:
            if not from_pixels.isdisjoint(node.input):
                from_pixels.update(node.output)
            known_node = node.SerializeToString() in nodes and last.isdisjoint(node.output)
            if known_node and shared.issuperset(filter(None, node.input)):
                shared.update(node.output)
                if not from_pixels.isdisjoint(node.output):
                    continue
            rest.append(node)
        for name in (name for node in rest for name in node.input):
            if name in shared and name in from_pixels:
                borders[name] = None
        del graph.node[:]
        graph.node.extend(rest)
        del graph.input[:]
        graph.input.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in borders
        )
        return self._load(model, file), tuple(borders)

    def encode(
        self, pixels: npt.NDArray[np.float32], names: tuple[str, ...]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs of the tower for one tile; what is not known of it is made."""
        key = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        made = self._made.setdefault(key, {_PIXELS: pixels} if _PIXELS in names else {})
        missing = tuple(name for name in names if name not in made)
        if missing:
            found = self._session(missing).run(missing, {_PIXELS: pixels})
            self.runs += 1
            made.update(zip(missing, found, strict=True))
        return {name: made[name] for name in names}

    def _session(self, names: tuple[str, ...]) -> ort.InferenceSession:
        if names not in self._sessions:
            model = onnx.load(self._file, load_external_data=False)
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
            self._sessions[names] = self._load(model, self._file)
        return self._sessions[names]

    def _load(self, model: onnx.ModelProto, file: Path) -> ort.InferenceSession:
        """Loads a part of a file's graph; a bundle's own folder holds signed files alone."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            for name in {_location(one) for one in model.graph.initializer} - {None}:
                shutil.copy(file.with_name(str(name)), folder)
            part = Path(folder) / "part.onnx"
            onnx.save(model, part)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.inter_op_num_threads = options.intra_op_num_threads = 1
            require_exact_sums(options)
            return ort.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])


class _SharingRunner(OnnxRunner):
    """A bundle whose tiles are seen by the tower of another."""

    def __init__(
        self, bundle: Bundle, tower: SharedTower, *, threads: int | None, rows: int
    ) -> None:
        super().__init__(
            bundle, threads=threads, capacity=rows if rows > DEFAULT_CAPACITY else None
        )
        self._tower = tower
        self._rest, self._borders = tower.rest_of(bundle)
        self._unchecked = _CHECKED_TILES

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """As the bundle's own graph, which sees the first tiles as well.

        Raises:
            RuntimeError: The two do not agree.
        """
        embeds, indices = self._rest.run(
            ["embeds", "indices"], self._tower.encode(pixels, self._borders)
        )
        if self._unchecked:
            self._unchecked -= 1
            own, chosen = super().encode_image(pixels, variant)
            if not np.array_equal(chosen, indices) or np.abs(own - embeds).max() > _TOLERANCE:
                raise RuntimeError(f"{self._bundle.path}: a shared tower gives other tokens")
        return embeds, indices


def _vision_file(bundle: Bundle) -> Path:
    return bundle.file(bundle.component("onnx", "vision").file)


def _without_offset(tensor: onnx.TensorProto) -> bytes:
    """A tensor without its place among the weights, which the bundle's other graphs move."""
    plain = onnx.TensorProto()
    plain.CopyFrom(tensor)
    for entry in plain.external_data:
        if entry.key == "offset":
            entry.value = ""
    return plain.SerializeToString()


def _location(tensor: onnx.TensorProto) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
