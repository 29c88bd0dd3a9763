"""Processor: how a checkpoint turns pictures into pixels and messages into token ids.

Hugging Face's combined processors pull in torchvision through their video halves, so this loads
the image processor and the tokenizer on their own, and expands the image placeholder itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.foreign_code import STOCK_ONLY, refuse_foreign_code
from pocketvlm.image_processor import ImageProcessor, quiet_fallbacks
from pocketvlm.modelspec import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PROCESSOR_FILES", "Message", "Processor", "user_message"]

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


def user_message(text: str, images: int = 1) -> Message:
    """A user's turn: `images` pictures, then the text."""
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Processor:
    """Image processor, tokenizer and chat template of one checkpoint.

    Attributes:
        tokenizer: A fast Hugging Face tokenizer.
        image_processor: What turns pictures into pixels.
        chat_template: The Jinja template that turns messages into a prompt.
        files: The directory's own processor files, by name.
        spec: The model's specification.
    """

    tokenizer: Any
    image_processor: ImageProcessor
    chat_template: str
    files: dict[str, bytes]
    spec: ModelSpec

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> Processor:
        """Loads the processor of a checkpoint directory, offline.

        Raises:
            CheckpointError: The tokenizer, image processor or chat template is missing or broken.
        """
        from transformers import AutoTokenizer

        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path}: tokenizer.json is missing; a fast tokenizer is needed")
        refuse_foreign_code(path)
        image_processor = ImageProcessor.load(path, spec)
        try:
            with quiet_fallbacks():
                tokenizer = AutoTokenizer.from_pretrained(str(path), **STOCK_ONLY)
        except Exception as error:  # the libraries raise anything from KeyError to a Rust panic
            first_line = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path}: tokenizer cannot be read: {first_line}") from error
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            chat_template=_read_chat_template(path, tokenizer),
            files={
                name: (path / name).read_bytes()
                for name in PROCESSOR_FILES
                if (path / name).is_file()
            },
            spec=spec,
        )

    def save(self, path: Path) -> None:
        """Writes the directory's own processor files, byte by byte as they were read."""
        for name, content in self.files.items():
            (path / name).write_bytes(content)

    @property
    def notes(self) -> tuple[str, ...]:
        """Settings of the directory's processor that are not followed."""
        return self.image_processor.notes

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Preprocesses pictures into float32 [len(images), channels, size, size].

        Tiling is off: one picture is one tile, which is what a phone's vision graph takes.
        """
        return self.image_processor.pixels(images)

    def prompt_text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Renders messages; every image is one placeholder, not yet expanded."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    def expand_images(self, text: str) -> str:
        """Replaces each placeholder by as many as the image has visual tokens, unreduced."""
        spec = self.spec
        block = spec.image_prefix + spec.image_token * spec.visual_tokens + spec.image_suffix
        return text.replace(spec.image_token, block)

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, each image expanded to all N of its placeholders."""
        text = self.prompt_text(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = self.tokenizer.encode(self.expand_images(text), add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces at both ends removed."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        if "generation_config.json" in self.files:
            eos = json.loads(self.files["generation_config.json"]).get("eos_token_id")
            if eos is not None:
                return tuple(eos) if isinstance(eos, list) else (int(eos),)
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (int(eos),)


def _read_chat_template(path: Path, tokenizer: Any) -> str:
    jinja, legacy = path / "chat_template.jinja", path / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if legacy.is_file():
        return str(json.loads(legacy.read_text(encoding="utf-8"))["chat_template"])
    processor = path / "processor_config.json"
    if processor.is_file():
        template = json.loads(processor.read_text(encoding="utf-8")).get("chat_template")
        if template:
            return str(template)
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.chat_template)
    raise CheckpointError(f"{path}: no chat template; expected chat_template.jinja")
