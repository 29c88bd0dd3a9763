"""Runs a bundle's ONNX graphs, with a KV cache that is allocated once and never copied.

Every layer's key and value buffer is bound both as `past` and as `present` of the decoder, so that
GroupQueryAttention writes new rows in place. A step of generation touches only buffers that were
bound when the runner was made: token id, embedding, position, length, logits. The cache is
allocated without being touched, so that its pages cost memory as rows are written.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle, Component
from pocketvlm.errors import BundleError
from pocketvlm.runtime.onnx.engine import (
    LOAD_ERRORS,
    first_line,
    naming_graph,
    require_exact_sums,
)
from pocketvlm.runtime.onnx.engine import onnxruntime as ort
from pocketvlm.runtime.onnx.external_data import require_signed_data
from pocketvlm.runtime.runner import Runner, States
from pocketvlm.runtime.versions import require_runtime

__all__ = ["DEFAULT_CAPACITY", "OnnxRunner"]

DEFAULT_CAPACITY = 2048
"""Rows of KV cache unless the caller asks for another number, or the model has fewer positions."""


_PAST = "past."
_MAX_STATE = 2**24


class OnnxRunner(Runner):
    """A bundle's three ONNX graphs on this machine's CPU.

    Attributes:
        threads: Threads of the vision and decoder graphs; 0 lets ONNX Runtime take all cores.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        capacity: int | None = None,
        keep_vision: int | None = None,
    ) -> None:
        """Loads the graphs and allocates the cache.

        Args:
            bundle: An opened bundle.
            threads: Threads for the heavy graphs; `None` for one a physical core.
            capacity: Rows of KV cache; `None` for `DEFAULT_CAPACITY`, or fewer where the model
                has fewer positions.
            keep_vision: Vision graphs that stay in memory, those that were used last; `None` for
                one, or for all that a tile budget chooses among. With 0, one is loaded for each
                picture and freed after it: slower, and smaller while an answer is generated.

        Raises:
            BundleError: The bundle has no ONNX graphs, or one does not load or does not match.
        """
        cache = bundle.manifest.kv_cache
        dtype = np.dtype(cache.dtype)
        positions = bundle.manifest.generation.max_positions
        require_runtime(bundle, "onnx", ort.__version__)
        self.engine = f"ONNX Runtime {ort.__version__}"
        super().__init__(
            capacity=min(DEFAULT_CAPACITY, positions) if capacity is None else capacity,
            schedule=cache.visual_schedule,
        )
        self.threads = threads or 0
        self._bundle = bundle
        budget = bundle.manifest.tile_budget
        chosen = 1 if budget is None else len(budget.counts)
        self._keep_vision = chosen if keep_vision is None else keep_vision
        whole = None if budget is None else bundle.manifest.variant_of(budget.whole).name
        first = bundle.component("onnx", "vision", variant=whole)
        self._vision = {first.file: self._load(first)} if self._keep_vision else {}
        self._embedding = self._load(bundle.component("onnx", "embedding"))
        self._decoder = self._load(bundle.component("onnx", "decoder"))
        shape = (1, cache.kv_heads, self.capacity, cache.head_dim)
        stated = _past_shapes(self._decoder, bundle)
        # np.zeros leaves fresh pages to the system, so unused capacity costs no memory.
        self._cache = {
            name: np.zeros(shape, dtype) for name in stated if name.endswith((".key", ".value"))
        }
        # No buffer is both read and written by a layer that keeps a state.
        self._past, self._present = (
            {
                name: np.zeros(size, np.float32)
                for name, size in stated.items()
                if name not in self._cache
            }
            for _ in range(2)
        )
        width, vocabulary = _last_dim(self._embedding, bundle), _last_dim(self._decoder, bundle)
        self._token = np.zeros((1, 1), np.int64)
        self._embeds = np.zeros((1, 1, width), np.float32)
        self._position = np.zeros((_position_axes(self._decoder), 1), np.int64)
        self._past_length = np.zeros(1, np.int64)
        self._past_stage_lengths = self.stage_lengths
        self._single_row = np.zeros(1, np.int64)
        self._has_mutual = cache.mutual_rows is not None
        self._alone = np.full((1, 1), -1, np.int64)
        self._logits = np.zeros((1, 1, vocabulary), np.float32)
        self._embed_step = self._embedding.io_binding()
        _bind_input(self._embed_step, "input_ids", self._token)
        _bind_output(self._embed_step, "embeds", self._embeds)
        self._decode_step = self._bind_decoder()
        _bind_input(self._decode_step, "embeds", self._embeds)
        _bind_input(self._decode_step, "position_ids", self._position)
        if self._schedule is not None:
            _bind_input(self._decode_step, "text_rows", self._single_row)
        if self._has_mutual:
            _bind_input(self._decode_step, "mutual", self._alone)
        self._decode_rows = self._bind_decoder()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache at full capacity."""
        return sum(buffer.nbytes for buffer in self._cache.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the cache's rows that are filled: fewer where a layer is given fewer."""
        layers = len(self._cache) // 2
        rows = layers * self._length
        if self._schedule is not None:
            held = [self._length, *self.stage_lengths.tolist()]
            rows = sum(held[self._schedule.stage_of(layer)] for layer in range(layers))
        return self.cache_bytes // (layers * self.capacity) * rows

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        component = self._bundle.component("onnx", "vision", variant=variant)
        session = self._vision.pop(component.file, None)
        if session is None:
            self._forget_vision(self._keep_vision - 1)  # before another takes memory
            session = self._load(component)
        with naming_graph(self._bundle.path / component.file):
            embeds, indices = session.run(["embeds", "indices"], {"pixel_values": pixels})
        self._vision[component.file] = session
        del session
        self._forget_vision(self._keep_vision)
        return embeds, indices

    def _forget_vision(self, left: int) -> None:
        """Frees vision graphs but those that were used last."""
        if len(self._vision) <= max(left, 0):
            return
        while len(self._vision) > max(left, 0):
            del self._vision[next(iter(self._vision))]
        _return_freed_memory()

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]; of a single token, the decoder's own buffer."""
        if len(token_ids) == 1:
            self._token[0, 0] = token_ids[0]
            with self._naming("embedding"):
                self._embedding.run_with_iobinding(self._embed_step)
            return self._embeds
        ids = np.asarray(token_ids, np.int64)[None]
        with self._naming("embedding"):
            (embeds,) = self._embedding.run(["embeds"], {"input_ids": ids})
        return embeds

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows, writes them to the cache, and returns the last one's logits."""
        rows = embeds.shape[1]
        self._require_room(rows)
        self._past_length[0] = self._length
        text_rows: npt.NDArray[np.int64] | None = None
        if self._schedule is not None:
            self._past_stage_lengths[:] = self.stage_lengths
            text_rows = self._text_rows(rows, is_visual)
        if rows == 1:
            if embeds is not self._embeds:
                np.copyto(self._embeds, embeds)
            np.copyto(self._position, position_ids)
            with self._naming("decoder"):
                self._decoder.run_with_iobinding(self._decode_step)
        else:
            # The binding keeps pointers, not arrays: both must live until the run is over.
            embeds = np.ascontiguousarray(embeds, np.float32)
            position_ids = np.ascontiguousarray(position_ids, np.int64)
            _bind_input(self._decode_rows, "embeds", embeds)
            _bind_input(self._decode_rows, "position_ids", position_ids)
            if text_rows is not None:
                _bind_input(self._decode_rows, "text_rows", text_rows)
            numbers = np.full((1, rows), -1) if mutual is None else mutual[None]
            if self._has_mutual:
                numbers = np.ascontiguousarray(numbers, np.int64)
                _bind_input(self._decode_rows, "mutual", numbers)
            with self._naming("decoder"):
                self._decoder.run_with_iobinding(self._decode_rows)
        for name, state in self._past.items():
            np.copyto(state, self._present[name])
        self._advance(rows)
        return self._logits[0, 0]

    def _states(self) -> States:
        return self._past

    def _bind_decoder(self) -> ort.IOBinding:
        """A binding of everything that never moves: cache, length and logits."""
        binding = self._decoder.io_binding()
        _bind_input(binding, "past_length", self._past_length)
        if self._schedule is not None:
            _bind_input(binding, "past_stage_lengths", self._past_stage_lengths)
        _bind_output(binding, "logits", self._logits)
        for name, buffer in self._cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        for name, state in self._past.items():
            _bind_input(binding, f"past.{name}", state)
            _bind_output(binding, f"present.{name}", self._present[name])
        return binding

    def _naming(self, role: str) -> AbstractContextManager[None]:
        return naming_graph(self._bundle.path / self._bundle.component("onnx", role).file)

    def _load(self, component: Component) -> ort.InferenceSession:
        role = component.role
        require_signed_data(self._bundle, component.file)
        file = self._bundle.file(component.file)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        require_exact_sums(options)
        # The embedding is a lookup: its own pool would only spin beside the decoder's.
        options.intra_op_num_threads = 1 if role == "embedding" else self.threads
        if role == "vision":
            # Its threads must not spin while the decoder's work.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            # It runs once per picture: keeping its activations would cost memory, and save nothing.
            options.enable_cpu_mem_arena = False
            options.enable_mem_pattern = False
        try:
            session = ort.InferenceSession(
                str(file), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except (*LOAD_ERRORS, UnicodeDecodeError) as error:
            raise BundleError(
                f"{file}: ONNX Runtime cannot load it: {first_line(error)}"
            ) from error
        _require_signature(component, session, file)
        # Weights that are expanded in steps leave several times their size to be freed.
        _return_freed_memory()
        return session


def _return_freed_memory() -> None:
    """Has glibc give back what was freed; it keeps 180 MB of a SmolVLM-256M tower otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _require_signature(component: Component, session: ort.InferenceSession, file: Any) -> None:
    """Refuses a graph whose inputs or outputs are not those that the manifest names."""
    for kind, said, found in (
        ("inputs", component.inputs, session.get_inputs()),
        ("outputs", component.outputs, session.get_outputs()),
    ):
        names = {signature.name for signature in said}
        there = {value.name for value in found}
        if names != there:
            raise BundleError(
                f"{file}: has the {kind} {', '.join(sorted(there ^ names))} that only one of graph "
                f"and manifest knows"
            )


def _past_shapes(session: ort.InferenceSession, bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """What the decoder keeps of its past, by name; lengths that the caller chooses are 1.

    Raises:
        BundleError: It is more than any model keeps of a row.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in session.get_inputs():
        if value.name.startswith(_PAST):
            sizes = tuple(size if isinstance(size, int) else 1 for size in value.shape)
            if not 0 < math.prod(sizes) <= _MAX_STATE:
                raise BundleError(f"{bundle.path}: the decoder keeps {value.name} of {sizes}")
            shapes[value.name.removeprefix(_PAST)] = sizes
    return shapes


def _last_dim(session: ort.InferenceSession, bundle: Bundle) -> int:
    output = session.get_outputs()[0]
    size = output.shape[-1]
    if not isinstance(size, int):
        raise BundleError(f"{bundle.path}: the last dimension of {output.name!r} is not fixed")
    return size


def _position_axes(decoder: ort.InferenceSession) -> int:
    (axes,) = (value.shape[0] for value in decoder.get_inputs() if value.name == "position_ids")
    return int(axes)


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
