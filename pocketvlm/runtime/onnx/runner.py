"""Runs a bundle's ONNX graphs, with a KV cache that is allocated once and never copied.

Every layer's key and value buffer is bound both as `past` and as `present` of the decoder, so that
GroupQueryAttention writes new rows in place. A step of generation touches only buffers that were
bound when the runner was made: token id, embedding, position, length, logits. The cache is
allocated without being touched, so that its pages cost memory as rows are written.

Where a bundle has a graph for long calls, it runs all of their rows but the last, and the decoder
runs that one, which is asked for logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle, Component
from pocketvlm.errors import BundleError
from pocketvlm.runtime.onnx.engine import naming_graph
from pocketvlm.runtime.onnx.engine import onnxruntime as ort
from pocketvlm.runtime.onnx.fresh_memory import fresh_zeros
from pocketvlm.runtime.onnx.made_weights import make_weights
from pocketvlm.runtime.onnx.sessions import (
    bind_input,
    bind_output,
    load_graph,
    return_freed_memory,
    shrinking_run,
)
from pocketvlm.runtime.runner import PREFILL_PIECE_ROWS, Runner, States
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
        spill_folder: Path | None = None,
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
            spill_folder: Where the weights that are made for long calls lie in a file, whose pages
                the system takes back when memory is short; `None` for memory.

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
        # Before anything else takes memory: a layer is several times its size while it is made.
        has_prefill = bundle.manifest.has("onnx", "prefill")
        self._made = make_weights(bundle, self.threads, spill_folder) if has_prefill else {}
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
        # Unused capacity costs no memory.
        self._cache = {
            name: fresh_zeros(shape, dtype) for name in stated if name.endswith((".key", ".value"))
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
        bind_input(self._embed_step, "input_ids", self._token)
        bind_output(self._embed_step, "embeds", self._embeds)
        self._decode_step = self._bind_decoder()
        bind_input(self._decode_step, "embeds", self._embeds)
        bind_input(self._decode_step, "position_ids", self._position)
        if self._schedule is not None:
            bind_input(self._decode_step, "text_rows", self._single_row)
        if self._has_mutual:
            bind_input(self._decode_step, "mutual", self._alone)
        self._sessions = {"decoder": (self._decoder, self._bind_decoder())}
        self._least_prefill_rows = 0
        if has_prefill:
            self._prepare_prefill(bundle.component("onnx", "prefill"))

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
            embeds, indices = session.run(
                ["embeds", "indices"], {"pixel_values": pixels}, shrinking_run()
            )
        return_freed_memory()
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
        return_freed_memory()

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
        if self._is_long(rows, mutual):
            self._fill("prefill", embeds[:, :-1], position_ids[:, :-1], mutual)
            embeds, position_ids = embeds[:, -1:], position_ids[:, -1:]
        elif rows > PREFILL_PIECE_ROWS and self._schedule is None and not self._has_mutual:
            # All pieces but the last: rows that a schedule drops, or that see each other, are not
            # parted.
            start = (rows - 1) // PREFILL_PIECE_ROWS * PREFILL_PIECE_ROWS
            self._fill("decoder", embeds[:, :start], position_ids[:, :start], None)
            embeds, position_ids = embeds[:, start:], position_ids[:, start:]
        if embeds.shape[1] > 1:
            self._run_rows("decoder", embeds, position_ids, text_rows, mutual)
        else:
            if embeds is not self._embeds:
                np.copyto(self._embeds, embeds)
            np.copyto(self._position, position_ids)
            with self._naming("decoder"):
                self._decoder.run_with_iobinding(self._decode_step)
            self._keep_states()
        self._advance(rows)
        return self._logits[0, 0]

    def _is_long(self, rows: int, mutual: npt.NDArray[np.int64] | None) -> bool:
        """Whether the graph for long calls runs all rows but the last, which others do not see."""
        least = self._least_prefill_rows
        return 0 < least <= rows and (mutual is None or mutual[-1] < 0)

    def _fill(
        self,
        role: Literal["decoder", "prefill"],
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        mutual: npt.NDArray[np.int64] | None,
    ) -> None:
        """Fills the cache in pieces, as no row of a piece looks at those of later ones.

        What attention and the widest products take grows with the rows of a call: for 761 rows of
        SmolVLM-256M it was 47 to 62 MB, and is 18 in pieces, in the same time.
        """
        rows = embeds.shape[1]
        # All rows that see each other are in one call.
        piece = rows if self._has_mutual else PREFILL_PIECE_ROWS
        for start in range(0, rows, piece):
            part = slice(start, min(start + piece, rows))
            numbers = None if mutual is None else mutual[part]
            self._run_rows(role, embeds[:, part], position_ids[:, part], None, numbers)
            self._past_length[0] += part.stop - part.start

    def _run_rows(
        self,
        role: Literal["decoder", "prefill"],
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        text_rows: npt.NDArray[np.int64] | None,
        mutual: npt.NDArray[np.int64] | None,
    ) -> None:
        rows = embeds.shape[1]
        session, binding = self._sessions[role]
        # The binding keeps pointers, not arrays: they must live until the run is over.
        embeds = np.ascontiguousarray(embeds, np.float32)
        position_ids = np.ascontiguousarray(position_ids, np.int64)
        bind_input(binding, "embeds", embeds)
        bind_input(binding, "position_ids", position_ids)
        if text_rows is not None:
            bind_input(binding, "text_rows", text_rows)
        numbers = np.full((1, rows), -1) if mutual is None else mutual[None]
        if self._has_mutual:
            numbers = np.ascontiguousarray(numbers, np.int64)
            bind_input(binding, "mutual", numbers)
        with self._naming(role):
            session.run_with_iobinding(binding)
        self._keep_states()

    def _keep_states(self) -> None:
        for name, state in self._past.items():
            np.copyto(state, self._present[name])

    def _states(self) -> States:
        return self._past

    def _prepare_prefill(self, component: Component) -> None:
        session = self._load(component)
        binding = self._bind_cache(session)
        for name, weights in self._made.items():
            bind_input(binding, name, weights)
        self._sessions["prefill"] = (session, binding)
        self._least_prefill_rows = component.least_rows or 0

    def _bind_decoder(self) -> ort.IOBinding:
        """A binding of everything that never moves: cache, length and logits."""
        binding = self._bind_cache(self._decoder)
        if self._schedule is not None:
            bind_input(binding, "past_stage_lengths", self._past_stage_lengths)
        bind_output(binding, "logits", self._logits)
        return binding

    def _bind_cache(self, session: ort.InferenceSession) -> ort.IOBinding:
        binding = session.io_binding()
        bind_input(binding, "past_length", self._past_length)
        for name, buffer in self._cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        for name, state in self._past.items():
            bind_input(binding, f"past.{name}", state)
            bind_output(binding, f"present.{name}", self._present[name])
        return binding

    def _naming(self, role: str) -> AbstractContextManager[None]:
        return naming_graph(self._bundle.path / self._bundle.component("onnx", role).file)

    def _load(self, component: Component) -> ort.InferenceSession:
        return load_graph(self._bundle, component, self.threads)


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
