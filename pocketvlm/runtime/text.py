"""The text half of a bundle: its tokenizer, chat template and picture block, ready to use.

How prompts are written is `PromptCodec`'s, the same code that the checkpoint's own prompts come
from; here it is filled from the files and the manifest of a bundle alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.files.reader import locate, read_text
from pocketvlm.json_io import read_json
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.prompt.chat_template import Message, find_chat_template
from pocketvlm.prompt.codec import PromptCodec, read_tokenizer
from pocketvlm.prompt.generation_settings import GenerationSettings
from pocketvlm.prompt.picture_text import PictureText

__all__ = ["Message", "TextCodec", "assistant_message", "user_message"]


def user_message(text: str, images: int = 0) -> Message:
    """A user's turn: `images` pictures, then the text."""
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """A finished answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextCodec:
    """Messages to token ids and back, for one bundle.

    Attributes:
        prompts: What writes and reads prompts.
        generation: What ends and steers answers.
    """

    prompts: PromptCodec
    generation: GenerationSettings

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> TextCodec:
        """Reads tokenizer.json, the chat template and the manifest's prompt block.

        Raises:
            BundleError: One of them is missing, damaged, or contradicts another.
        """
        path, manifest = bundle.path, bundle.manifest
        prompt = manifest.prompt
        image_token, image_token_id = prompt.image_token, prompt.image_token_id
        file = locate(path, "tokenizer.json", error=BundleError)
        tokenizer = read_tokenizer(read_text(file, error=BundleError), file, error=BundleError)
        if tokenizer.token_to_id(image_token) != image_token_id:
            raise BundleError(
                f"{path}: tokenizer.json has {image_token!r} at "
                f"{tokenizer.token_to_id(image_token)}, the manifest at {image_token_id}"
            )
        config = _read_tokenizer_config(path)
        template = find_chat_template(path, error=BundleError)
        template.check(error=BundleError)
        words = config.get("chat_control_tokens")
        return cls(
            prompts=PromptCodec(
                tokenizer=tokenizer,
                template=template,
                variables=_named_tokens(config),
                picture=PictureText(
                    placeholder=image_token,
                    count=manifest.visual_tokens_full,
                    prefix=prompt.image_prefix,
                    suffix=prompt.image_suffix,
                    tile_marker=prompt.tile_marker,
                    whole_marker=prompt.whole_marker,
                    mark=prompt.image_mark,
                ),
                image_token_id=image_token_id,
                embedding_rows=prompt.embedding_rows,
                control_words=tuple(map(str, words)) if isinstance(words, list) else None,
                is_prefix=prompt.is_prefix,
            ),
            generation=GenerationSettings.from_stock(
                {
                    **manifest.generation.settings,
                    "eos_token_id": list(manifest.generation.eos_token_ids),
                },
                f"{path / 'manifest.json'}: generation.settings",
                error=BundleError,
            ),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which reads special tokens as control."""
        return self.prompts.tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.generation.eos_token_ids

    @property
    def image_token_id(self) -> int:
        """The id that stands in a prompt once per visual token."""
        return self.prompts.image_token_id

    def encode(
        self,
        messages: Sequence[Message],
        grids: Sequence[TileGrid] | None = None,
        *,
        counts: Sequence[int] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation; arguments and errors are those of `PromptCodec.encode`."""
        return self.prompts.encode(
            messages, grids, counts=counts, add_generation_prompt=add_generation_prompt
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces at both ends removed."""
        return self.prompts.decode(token_ids)

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces kept."""
        return self.prompts.decode_raw(token_ids)


def _read_tokenizer_config(path: Path) -> dict[str, Any]:
    if not (path / "tokenizer_config.json").exists():
        return {}
    return read_json(locate(path, "tokenizer_config.json", error=BundleError))


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """What the template may call `bos_token`, `eos_token`, `image_token` and so on."""
    named: dict[str, str] = {}
    for name, token in config.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named
