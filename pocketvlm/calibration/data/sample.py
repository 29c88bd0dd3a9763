"""Sample: pictures, a conversation about them, and the expected answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pocketvlm.errors import CalibrationError, InputError
from pocketvlm.files.reader import read_bytes
from pocketvlm.image_file import MAX_FILE_BYTES, image_size, open_image
from pocketvlm.models.images.cutting import PictureCutter, cut_pictures
from pocketvlm.models.images.tilings import ONE_TILE, TileGrid
from pocketvlm.prompt.messages import Message, Turn, chat_messages, place_pictures, user_turn

__all__ = ["PictureSource", "Sample"]

PictureSource = Path | Image.Image
"""A decoded picture, or its file."""


@dataclass(frozen=True, init=False, eq=False)
class Sample:
    """Pictures, a conversation about them that ends with a question, and the expected answer.

    Attributes:
        images: The pictures, in the order of their places; empty for text alone.
        turns: The conversation up to the question, with the place of every picture.
        answer: The expected answer.
        kind: The kind of question, if known.
        where: File and line that the sample came from, for messages.
    """

    images: tuple[PictureSource, ...]
    turns: tuple[Turn, ...]
    answer: str
    kind: str | None
    where: str

    def __init__(
        self,
        *,
        answer: str,
        question: str | None = None,
        turns: Sequence[Turn] | None = None,
        image: PictureSource | None = None,
        images: Sequence[PictureSource] = (),
        kind: str | None = None,
        where: str = "sample",
    ) -> None:
        """Gives every picture its place, by the rule of `messages.place_pictures`.

        Args:
            answer: The expected answer.
            question: The question, if it is the whole conversation.
            turns: The conversation, in place of `question`; its last turn is the user's question.
            image: The only picture.
            images: The pictures, in place of `image`.
            kind: The kind of question.
            where: File and line, for messages.

        Raises:
            CalibrationError: Pictures and their places do not match.
            TypeError: There is no question, or both of two exclusive arguments are given.
        """
        if (question is None) == (turns is None):
            raise TypeError("a sample has either a question or turns")
        if image is not None and images:
            raise TypeError("a sample has either an image or images")
        pictures = tuple(images) if image is None else (image,)
        spoken = (user_turn(question),) if question is not None else tuple(turns or ())
        try:
            placed = place_pictures(spoken, len(pictures))
        except ValueError as error:
            raise CalibrationError(f"{where}: {error}") from error
        values = {
            "images": pictures,
            "turns": placed,
            "answer": answer,
            "kind": kind,
            "where": where,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text

    @property
    def image(self) -> PictureSource | None:
        """The only picture; `None` for text alone.

        Raises:
            CalibrationError: There are several.
        """
        if len(self.images) > 1:
            raise CalibrationError(
                f"{self.where}: has {len(self.images)} images where one is expected"
            )
        return self.images[0] if self.images else None

    def messages(self) -> list[Message]:
        """The conversation up to the question, as chat templates take it."""
        return chat_messages(self.turns)

    def answered_messages(self) -> list[Message]:
        """The same with the expected answer at the end."""
        return chat_messages((*self.turns, Turn(role="assistant", parts=(self.answer,))))

    def open_image(self, number: int | None = None) -> Image.Image:
        """Decodes a picture, upright, exactly as the runtime reads an app's pictures.

        Args:
            number: Which one; `None` for the only one.

        Raises:
            CalibrationError: There is none, there are several and `number` is `None`, or it cannot
                be decoded.
        """
        image = self.image if number is None else self.images[number]
        if image is None:
            raise CalibrationError(f"{self.where}: has no image where one is needed")
        if isinstance(image, Image.Image):
            return image
        try:
            return open_image(image)
        except InputError as error:
            raise CalibrationError(f"{self.where}: {error}") from error

    def image_sizes(self) -> list[tuple[int, int]]:
        """Width and height of every picture, read without decoding.

        Raises:
            CalibrationError: A file is missing, not a picture, or too large.
        """
        return [self._size(image) for image in self.images]

    def grids(self, cutter: PictureCutter) -> list[TileGrid]:
        """The tiles of every picture that are seen.

        Args:
            cutter: A checkpoint's processor or a bundle's preprocessor. Where each picture is one
                tile, no file is opened.

        Raises:
            CalibrationError: As `image_sizes`, and where content counts as `open_image`.
        """
        if cutter.tiling is None:
            return [ONE_TILE] * len(self.images)
        return cut_pictures(cutter, self.image_sizes(), self.open_image)

    def _size(self, image: PictureSource) -> tuple[int, int]:
        if isinstance(image, Image.Image):
            return image.size
        try:
            return image_size(image)
        except InputError as error:
            raise CalibrationError(f"{self.where}: {error}") from error

    def digest(self) -> bytes:
        """Digest of the text, the places of the pictures, and the pictures."""
        words = [
            [turn.role, [part if isinstance(part, str) else None for part in turn.parts]]
            for turn in self.turns
        ]
        found = hashlib.sha256(json.dumps([words, self.answer]).encode())
        for image in self.images:
            if isinstance(image, Image.Image):
                found.update(f"{image.mode} {image.size}".encode())
                found.update(hashlib.sha256(image.tobytes()).digest())
            else:
                content = read_bytes(image, error=CalibrationError, max_bytes=MAX_FILE_BYTES)
                found.update(hashlib.sha256(content).digest())
        return found.digest()
