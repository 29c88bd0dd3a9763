"""Processor: how a checkpoint turns pictures into pixels and messages into token ids.

Hugging Face's combined processors pull in torchvision through their video part, so this loads the
image processor and the tokenizer separately; prompts are written by `prompt.codec`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import read_json, write_json
from pocketvlm.models.images.cutting import cut_pictures
from pocketvlm.models.images.empty_tiles import EmptyTiles
from pocketvlm.models.images.reading import parse_image_settings, read_image_settings
from pocketvlm.models.images.tilings import TileGrid, Tiling
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import refuse_foreign_code
from pocketvlm.processor.image_processor import ImageProcessor
from pocketvlm.processor.tokenizer import StockTokenizer, read_stock_tokenizer
from pocketvlm.prompt.codec import PromptCodec
from pocketvlm.prompt.generation_settings import GenerationSettings, read_generation_settings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PROCESSOR_FILES", "RUNTIME_FILES", "Message", "Processor", "user_message"]

Message = dict[str, Any]
"""One chat message: `role`, and `content` as text or as a list of image and text items."""

PROCESSOR_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Files of a checkpoint directory that travel with it unchanged."""

RUNTIME_FILES: tuple[str, ...] = (
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Those of them that a bundle copies unchanged; its text files are written by this package."""


def user_message(text: str, images: int = 1) -> Message:
    """A user's turn: `images` pictures, then the text."""
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Processor:
    """Image processor, tokenizer and chat template of one checkpoint.

    Attributes:
        text: The tokenizer as transformers loads it, with the chat template.
        image_processor: Turns pictures into pixels.
        generation: What ends and steers answers.
        files: The directory's own processor files, by name.
        notes: Settings of the directory's processor that are not followed.
    """

    text: StockTokenizer
    image_processor: ImageProcessor
    generation: GenerationSettings
    files: dict[str, bytes]
    notes: tuple[str, ...]

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> Processor:
        """Loads the processor of a checkpoint directory, offline.

        Raises:
            CheckpointError: The tokenizer, image processor or chat template is missing or broken.
        """
        refuse_foreign_code(path)
        settings = read_image_settings(path, spec.family, error=CheckpointError)
        text = read_stock_tokenizer(path, spec.sized_by(settings))
        image_processor = ImageProcessor.load(path, text.spec)
        files = {
            name: (path / name).read_bytes() for name in PROCESSOR_FILES if (path / name).is_file()
        }
        template = text.codec.template
        if template.origin.name not in files:  # one of several named templates
            files["chat_template.jinja"] = template.source.encode()
        generation, unapplied = read_generation_settings(path, error=CheckpointError)
        return cls(
            text=text,
            image_processor=image_processor,
            generation=generation,
            files=files,
            notes=(*image_processor.notes, *text.notes, *unapplied),
        )

    @property
    def spec(self) -> ModelSpec:
        """The model's specification, with the placeholder as the tokenizer spells it."""
        return replace(
            self.text.spec,
            tiling=self.tiling,
            leaves_tiles_out=self.empty_tiles is not None,
        )

    @property
    def codec(self) -> PromptCodec:
        """Messages to token ids and back, as in a bundle's runtime."""
        return self.text.codec

    @property
    def chat_template(self) -> str:
        """The Jinja template that turns messages into a prompt."""
        return self.codec.template.source

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; prompts are written by `codec`."""
        return self.text.tokenizer

    def save(self, path: Path) -> None:
        """Writes the directory's own processor files, byte by byte as they were read."""
        for name, content in self.files.items():
            (path / name).write_bytes(content)

    def save_for_runtime(self, path: Path) -> None:
        """Writes what a bundle's runtime reads: text files as transformers loads them.

        Raises:
            OSError: A file cannot be written.
        """
        own = {name: self.files[name] for name in RUNTIME_FILES if name in self.files}
        for name, content in (own | self.text.runtime_files()).items():
            (path / name).write_bytes(content)
        config = path / "processor_config.json"
        if config.is_file() and "chat_template" in (document := read_json(config)):
            # It would be found first, and may be one of several.
            write_json(config, {k: v for k, v in document.items() if k != "chat_template"})

    def pixels(self, images: Sequence[Image], grids: Sequence[TileGrid] | None = None) -> Tensor:
        """Pixels of all tiles, float32 [tiles, channels, height, width], picture by picture."""
        return self.image_processor.pixels(images, grids)

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut; `None` where each is one tile."""
        return self.image_processor.settings.tiling

    @property
    def empty_tiles(self) -> EmptyTiles | None:
        """What leaves out tiles that show nothing; `None` where all are seen."""
        return self.image_processor.settings.empty_tiles

    def without_empty(self, image: Image, grid: TileGrid) -> TileGrid:
        """The tiles of a picture that are seen, of those that its size has."""
        return self.image_processor.without_empty(image, grid)

    def with_tiling(self, tiling: Tiling) -> Processor:
        """The same with the settings that cut pictures in this way."""
        return self._with_settings(tiling.settings)

    def with_empty_contrast(self, contrast: int | None) -> Processor:
        """The same without tiles of less contrast, which show nothing; with all for `None`."""
        return self._with_settings({"empty_tile_contrast": contrast})

    def with_picture_size(self, height: int, width: int) -> Processor:
        """The same with another size that pictures are fitted to, where the model takes any."""
        changed = self._with_settings({"fitted_size": {"height": height, "width": width}})
        return replace(changed, text=self.text.with_spec(changed.image_processor.spec))

    def _with_settings(self, changes: Mapping[str, Any]) -> Processor:
        """The same with other settings of its image processor, in the file that states them too."""
        where = self.image_processor.settings.where
        document = json.loads(self.files[where.name])
        own = document["image_processor"] if where.name == "processor_config.json" else document
        own.update(changes)
        settings = parse_image_settings(own, where, self.spec.family, error=CheckpointError)
        files = {**self.files, where.name: (json.dumps(document, indent=2) + "\n").encode()}
        images = self.image_processor.with_settings(settings, changes)
        return replace(self, image_processor=images, files=files)

    def tiles(self, images: Sequence[Image]) -> list[int]:
        """How many rows of `pixels` are each picture's."""
        return [grid.tiles for grid in self.grids(images)]

    def grids(self, images: Sequence[Image]) -> list[TileGrid]:
        """The tiles of all upright pictures of a conversation that are seen."""
        return cut_pictures(self, [image.size for image in images], images.__getitem__)

    def encode(
        self,
        messages: Sequence[Message],
        grids: Sequence[TileGrid] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation; arguments and errors are those of `PromptCodec.encode`."""
        return self.codec.encode(messages, grids, add_generation_prompt=add_generation_prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens, stripped."""
        return self.codec.decode(token_ids)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.generation.eos_token_ids
