"""Stock: the model and the processor as transformers itself loads them from a folder.

This is the oracle of the source check, so it shares as little as possible with the rest of the
package: the library reads weights, processor and generation settings with its own code. Only what
would run foreign code or fetch a kernel is kept from it, and pictures go through its Pillow
backend, one tile each, as in a bundle.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pocketvlm.checkpoint import ModelFolder, read_config
from pocketvlm.checkpoint.config import parse_config
from pocketvlm.errors import CheckpointError
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.machine import available_memory_bytes
from pocketvlm.models.images.reading import read_image_settings
from pocketvlm.models.images.settings import ImageSettings
from pocketvlm.processor.foreign_code import STOCK_ONLY, refuse_foreign_code
from pocketvlm.processor.image_processor import as_tiles, load_stock_pictures
from pocketvlm.processor.patches import fit_picture, join_patches
from pocketvlm.processor.tokenizer import bounded_templates
from pocketvlm.prompt.messages import Picture, Turn

__all__ = ["StockAnswer", "StockModel", "StockUnavailable"]

_BYTES_A_WEIGHT = 4  # it computes in float32
_USABLE_SHARE = 0.8  # of the free memory


class StockUnavailable(Exception):  # noqa: N818  (a state that a report names, not a failure)
    """The stock classes cannot be loaded here; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StockAnswer:
    """The stock classes' result for one conversation.

    Attributes:
        pixels: float32 [pictures, channels, side, side].
        token_ids: The prompt.
        logits: float32 [length, vocabulary] after the prompt's tokens.
        generated: Tokens of a greedy answer under the model's own generation configuration, end
            token included.
        scores: float32 [generated, vocabulary], by which each of them was chosen.
    """

    pixels: Floats
    token_ids: list[int]
    logits: Floats
    generated: list[int]
    scores: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class StockModel:
    """A model and a processor of the library.

    Attributes:
        model: The model, float32.
        processor: The combined processor.
        notes: Where it differs from the library's own choice.
        fitting: How pictures are fitted to one size before the library sees them, where the model
            takes any size.
        patch: Pixels along one side of a patch.
    """

    model: Any
    processor: Any
    notes: tuple[str, ...]
    patch: int
    fitting: ImageSettings | None = None

    @classmethod
    def load(cls, folder: ModelFolder) -> StockModel:
        """Loads both from a folder.

        Raises:
            StockUnavailable: The library cannot, or there is no memory for a second model.
        """
        if folder.manifest is not None:
            raise StockUnavailable("the folder was written by pocketvlm, not by transformers")
        if folder.layout is not None:
            raise StockUnavailable(
                "the folder holds quantized layers, which transformers leaves to other packages"
            )
        _hold_memory(folder)
        refuse_foreign_code(folder.path)
        from transformers import AutoModelForImageTextToText

        fitting = None
        if folder.spec.tower.takes_any_size:
            fitting = read_image_settings(folder.path, folder.spec.family, error=CheckpointError)
        with _quiet():
            try:
                processor, notes = _load_processor(folder)
                model = AutoModelForImageTextToText.from_pretrained(
                    str(folder.path),
                    config=parse_config(read_config(folder.path)),
                    dtype=torch.float32,
                    use_safetensors=True,
                    **STOCK_ONLY,
                ).eval()
            except Exception as error:  # the library may raise anything
                raise StockUnavailable(f"transformers cannot load it: {_line(error)}") from error
        if fitting is not None:
            processor.image_processor.do_resize = False
        return cls(
            model=model,
            processor=processor,
            notes=notes,
            patch=folder.spec.tower.patch_size,
            fitting=fitting,
        )

    def prompt(
        self, turns: Sequence[Turn], images: Sequence[Image.Image]
    ) -> tuple[list[int], Floats]:
        """Token ids and pixels float32 [tiles, channels, height, width] of a conversation.

        Raises:
            StockUnavailable: The library cannot.
        """
        with _refusing():
            inputs = self._prepare(turns, images)
        pixels = self._pixels(inputs["pixel_values"].to(torch.float32))
        return inputs["input_ids"][0].tolist(), pixels.numpy()

    def answer(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], *, max_new_tokens: int
    ) -> StockAnswer:
        """Asks the model about pictures.

        Raises:
            StockUnavailable: The library cannot.
        """
        with _refusing(), torch.inference_mode():
            inputs = self._prepare(turns, images)
            logits = self.model(**inputs).logits[0]
            out = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_scores=True,
                return_dict_in_generate=True,
            )
        token_ids = inputs["input_ids"][0].tolist()
        pixels = self._pixels(inputs["pixel_values"].to(torch.float32))
        return StockAnswer(
            pixels=pixels.numpy(),
            token_ids=token_ids,
            logits=logits.to(torch.float32).numpy(),
            generated=out.sequences[0, len(token_ids) :].tolist(),
            scores=np.stack([score[0].to(torch.float32).numpy() for score in out.scores]),
        )

    def _prepare(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the library's processor hands its model."""
        if self.fitting is not None:
            images = [fit_picture(image, self.fitting) for image in images]
        inputs = self.processor.apply_chat_template(
            _messages(turns, images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return {name: inputs[name] for name in self._inputs() if name in inputs}

    def _pixels(self, values: Tensor) -> Tensor:
        """Pixels as a picture has them, from what the library hands its model."""
        if self.fitting is None:
            return as_tiles(values, self.patch)
        pictures = self.processor.image_processor
        return join_patches(
            values,
            self.fitting.picture_size,
            patch=pictures.patch_size,
            merge=pictures.merge_size,
        )

    def _inputs(self) -> list[str]:
        """What the model takes of what the processor makes; labels are for training."""
        taken = inspect.signature(self.model.forward).parameters
        return [name for name in taken if name != "labels"]


def _load_processor(folder: ModelFolder) -> tuple[Any, tuple[str, ...]]:
    import transformers
    from transformers import AutoProcessor, AutoTokenizer

    path, notes = str(folder.path), []
    pictures = load_stock_pictures(
        folder.path, read_image_settings(folder.path, folder.spec.family, error=CheckpointError)
    )
    try:
        processor = AutoProcessor.from_pretrained(path, **STOCK_ONLY)
    except Exception:
        stand_in = folder.spec.processor.stand_in
        if stand_in is None:
            raise
        tokenizer = AutoTokenizer.from_pretrained(path, **STOCK_ONLY)
        count = folder.spec.processor.count_setting
        counted = {} if count is None else {count: folder.spec.visual_tokens}
        kind = _without_videos(getattr(transformers, stand_in))
        processor = kind(image_processor=pictures, tokenizer=tokenizer, **counted)
        processor.chat_template = kind.get_processor_dict(path)[0].get("chat_template")
        first = folder.spec.processor.classes[0]
        notes.append(
            f"{first} cannot be loaded without packages that a picture does not need; "
            + (
                f"{stand_in}, which writes the same prompt for pictures, stands in for it"
                if stand_in != first
                else "it is made without that"
            )
        )
    processor.image_processor = pictures
    if processor.chat_template is None and processor.tokenizer.chat_template is not None:
        processor.chat_template = processor.tokenizer.chat_template
        notes.append("the chat template is the tokenizer's: the library's processor has none here")
    if processor.chat_template is None:
        processor.chat_template = folder.spec.chat_template
    return processor, tuple(notes)


def _without_videos(kind: Any) -> Any:
    """A stock class whose constructor asks nothing of the parts that it is not given."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})


def _messages(turns: Sequence[Turn], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    remaining = iter(images)
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": next(remaining)}
                if isinstance(part, Picture)
                else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def _hold_memory(folder: ModelFolder) -> None:
    weights = sum(linear.out_features * linear.in_features for linear in folder.spec.linears())
    needed, free = weights * _BYTES_A_WEIGHT, available_memory_bytes()
    if needed > free * _USABLE_SHARE:
        raise StockUnavailable(
            f"a second copy of the model in float32 needs {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free"
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns whatever the library raises into one line."""
    with _quiet(), bounded_templates():
        try:
            yield
        except Exception as error:  # the library may raise anything
            raise StockUnavailable(f"transformers cannot run it: {_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's notices, warnings and progress bars off the terminal."""
    from transformers.utils import logging as stock_logging

    logger = logging.getLogger("transformers")
    level, showed_bars = logger.level, stock_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    stock_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if showed_bars:
            stock_logging.enable_progress_bar()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"  # noqa: PLR2004  (one line)
