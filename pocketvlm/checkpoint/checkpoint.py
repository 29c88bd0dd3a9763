"""Checkpoint: a model with its processor, its specification and its history.

A checkpoint is loaded from a Hugging Face directory (safetensors only) or from one that `save`
wrote. Weight matrices keep the type in which they are stored and are widened on use, so that a bf16
model takes its file size in memory and computes in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.bundle import TileBudget, VisionVariant, VisualSchedule
from pocketvlm.checkpoint.build import build_model
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.checkpoint.folder import read_model_folder
from pocketvlm.checkpoint.load import install_weights, load_cache_grid, load_weights
from pocketvlm.checkpoint.manifest import (
    ReducerBuilder,
    read_schedule,
    read_tile_budget,
    restore_vision,
    with_token_merges,
)
from pocketvlm.checkpoint.records import Source, StageRecord
from pocketvlm.checkpoint.save import write_checkpoint
from pocketvlm.checkpoint.vision import Vision
from pocketvlm.checkpoint.weight_files import verify_blobs
from pocketvlm.errors import CheckpointError
from pocketvlm.files.publish import replace_directory
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor import Processor
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.kv_cache import KVCacheScales
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = ["Checkpoint"]

_LAYOUT_KEYS = ("quantization_config", "transformers_weights")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model on its way to the phone.

    The newest checkpoint owns the model: a stage may change it in place and returns a new
    `Checkpoint` that holds it.

    Attributes:
        model: The stock transformers model; its weight matrices are `FormLinear` and
            `FormEmbedding` modules.
        processor: Tokenizer and image processor.
        spec: The model's specification.
        config: Content of config.json.
        source: Where the weights came from.
        reducer: The visual-token reduction, or `None` for all tokens.
        other_vision: Vision graphs that are exported beside the one for `spec` and `reducer`.
        tile_budget: Which of them sees which tile of a picture where answers are generated; `None`
            where the first sees all, as it does in calibration.
        cache_grid: Scales that the KV cache is rounded to, or `None` if it stays float32.
        visual_schedule: Where visual rows leave the decoder
            (`pocketvlm.reference_graph.visual_schedule`), or `None` where all run through it.
        history: One record per stage, in order.
    """

    model: nn.Module
    processor: Processor
    spec: ModelSpec
    config: Mapping[str, Any]
    source: Source
    reducer: TokenReducer | None = None
    other_vision: tuple[Vision, ...] = ()
    tile_budget: TileBudget | None = None
    cache_grid: KVCacheScales | None = None
    visual_schedule: VisualSchedule | None = None
    history: tuple[StageRecord, ...] = ()

    @classmethod
    def load(
        cls, path: Path | str, *, reducers: Mapping[str, ReducerBuilder] | None = None
    ) -> Checkpoint:
        """Loads a Hugging Face directory, or one that `save` or `save_layout` wrote.

        Layers in the layout of another tool (GPTQ, VPTQ) keep their codes.

        Args:
            path: The directory.
            reducers: Builders of visual-token reducers by stage tag, for directories whose
                history holds one; `pocketvlm.load_checkpoint` passes all of them.

        Raises:
            CheckpointError: The directory is missing, damaged or holds pickled weights only.
            UnsupportedError: The model's family is not supported.
        """
        folder = read_model_folder(Path(path))
        manifest = folder.manifest
        processor = Processor.load(folder.path, folder.spec)
        spec = processor.spec  # with the placeholder as the tokenizer spells it
        digests = verify_blobs(folder.files)
        model = build_model(folder.spec)
        load_weights(model, folder)
        checkpoint = cls(
            model=model,
            processor=processor,
            spec=spec,
            # The forms say now what the directory's layout was; `save` stores them differently.
            config={k: v for k, v in folder.config.items() if k not in _LAYOUT_KEYS},
            source=Source(
                name=folder.path.resolve().name,
                sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
                weight_bytes=sum(file.stat().st_size for file in folder.files),
                notes=(*folder.notes, *processor.notes),
            ),
        )
        if manifest is None:
            return checkpoint
        spec = with_token_merges(spec, manifest, folder.path)
        vision, *others = restore_vision(manifest, spec, reducers or {}, folder.path)
        return replace(
            checkpoint,
            spec=spec,
            source=manifest.source,
            reducer=vision.reducer,
            other_vision=tuple(others),
            tile_budget=read_tile_budget(manifest, (vision, *others), folder.path),
            cache_grid=load_cache_grid(folder),
            visual_schedule=read_schedule(manifest, spec, folder.path),
            history=manifest.history,
        )

    def save(self, path: Path | str) -> None:
        """Writes the checkpoint with its history; replaces `path` only when complete."""
        path = Path(path)
        with replace_directory(path) as folder:
            write_checkpoint(self, folder, path)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a tile that enter the decoder."""
        return self.spec.visual_tokens if self.reducer is None else self.reducer.keep

    @property
    def vision_variant(self) -> VisionVariant:
        """The vision graph for `spec` and `reducer`, as a manifest describes it."""
        return self.spec.vision_variant(self.visual_tokens)

    @property
    def other_sizes(self) -> tuple[PictureSize, ...]:
        """Sizes of pictures beside that of `spec`, for which there are vision graphs."""
        tower = self.spec.tower
        own = PictureSize(height=tower.height, width=tower.width)
        sizes = dict.fromkeys(vision.size for vision in self.other_vision)
        return tuple(size for size in sizes if size != own)

    def each_vision(self) -> tuple[Checkpoint, ...]:
        """The checkpoint with each of its vision graphs alone, all around the same model."""
        first = replace(self, other_vision=(), tile_budget=None)
        return (first, *map(self._seeing, self.other_vision))

    def _seeing(self, vision: Vision) -> Checkpoint:
        tower, size, processor = self.spec.tower, vision.size, self.processor
        if (tower.height, tower.width) != (size.height, size.width):
            processor = processor.with_picture_size(size.height, size.width)
        return replace(
            self,
            spec=self.spec.with_picture_size(size.height, size.width),
            processor=processor,
            reducer=vision.reducer,
            other_vision=(),
            tile_budget=None,
        )

    def form(self, name: str) -> WeightForm:
        """The stored weight of a layer."""
        return self.layer(name).form

    def layer(self, name: str) -> FormLinear | FormEmbedding:
        """The module of a weight matrix by its name in `ModelSpec.linears`."""
        module = self.model.get_submodule(name)
        if not isinstance(module, FormLinear | FormEmbedding):
            raise TypeError(f"{name} is a {type(module).__name__}, not a weight matrix")
        return module

    def set_form(self, name: str, form: WeightForm) -> None:
        """Replaces the stored weight of a layer, in place; a tied head follows its embedding."""
        layer = self.layer(name)
        if form.shape != layer.form.shape:
            raise ValueError(f"{name}: a weight {form.shape} cannot replace {layer.form.shape}")
        layer.form = form
        decoder = self.spec.decoder
        if decoder.tied_head and name == decoder.embedding:
            self.layer(decoder.head).form = form

    @property
    def device(self) -> torch.device:
        """Where the model computes; its weight matrices stay in main memory or in their files."""
        return next(self.model.parameters()).device

    def move(self, device: torch.device) -> None:
        """Has the model compute somewhere else, with everything that it computes with."""
        self.model.to(device)
        for reducer in (self.reducer, *(vision.reducer for vision in self.other_vision)):
            if reducer is not None:
                reducer.to(device)

    def forms(self) -> dict[LinearSpec, WeightForm]:
        """Every weight matrix with its stored form, in order of execution."""
        return {linear: self.form(linear.name) for linear in self.spec.linears()}

    def vectors(self) -> dict[str, Tensor]:
        """Everything that is not a weight matrix: biases, norms, position tables, by name."""
        return {name: value.detach() for name, value in self.model.named_parameters()}

    def rebuild(
        self,
        config: Mapping[str, Any],
        forms: Mapping[str, WeightForm],
        vectors: Mapping[str, Tensor],
    ) -> Checkpoint:
        """The checkpoint with other shapes: a new model for a changed config.json.

        Args:
            config: The changed content of config.json.
            forms: Weight of every linear and of the embedding, by the new model's names, including
                blocks of the tower that are never run; a tied head follows its embedding.
            vectors: Everything else, as `vectors` names it.

        Raises:
            CheckpointError: The config cannot be understood, a shape does not fit it, or layers
                would be renumbered although visual rows are dropped between them.
            UnsupportedError: The config asks for something that the family does not support.
            KeyError: A weight or a vector is missing.
        """
        tower = self.spec.tower
        spec = read_spec(config)
        if tower.merges:
            spec = spec.with_token_merges(tower.merges)
        if tower.takes_any_size:
            spec = spec.with_picture_size(tower.height, tower.width)
        spec = replace(
            spec,
            image_token=self.spec.image_token,  # as the tokenizer spells them
            image_prefix=self.spec.image_prefix,
            image_suffix=self.spec.image_suffix,
            tile_marker=self.spec.tile_marker,
            whole_marker=self.spec.whole_marker,
            image_mark=self.spec.image_mark,
            tiling=self.spec.tiling,
        )
        if self.visual_schedule is not None and spec.decoder.depth != self.spec.decoder.depth:
            raise CheckpointError(
                f"visual rows are dropped between the {self.spec.decoder.depth} layers of the "
                f"decoder, and {spec.decoder.depth} would be left; remove layers before drop_tokens"
            )
        model = build_model(spec)
        install_weights(
            model,
            spec,
            lambda name, _: forms[name],
            lambda name, _: vectors[name].to(torch.float32),
        )
        return replace(self, model=model, spec=spec, config=dict(config))

    def extend(self, record: StageRecord, **changes: Any) -> Checkpoint:
        """The checkpoint after a stage: with one more record, and whatever else changed."""
        return replace(self, history=(*self.history, record), **changes)
