"""An answer from ExecuTorch's own `MultimodalRunner`, the loop that apps on a phone call.

It proves that the program is what that runner expects: prompt, picture and generation are its
business, and nothing of this package lies between. It tells text and no token ids and keeps no
conversation; like every program, it runs in a process of its own (`process`). Its Python binding
cannot hand over a piece of text that ends inside of a character; such an answer is taken over by
the loop of this package, which gives the same tokens. So is one that settings of
generation_config.json steer, because that runner knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from pocketvlm.bundle import Bundle
from pocketvlm.errors import InputError
from pocketvlm.image_file import open_image
from pocketvlm.runtime.conversation import (
    Conversation,
    PictureInput,
    question_turn,
    require_room,
)
from pocketvlm.runtime.executorch.process import ProgramProcess, UnspeakablePieceError
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.splice import image_runs
from pocketvlm.runtime.text import TextCodec

__all__ = ["UnspeakablePieceError", "answer_once", "answer_with_multimodal_runner"]


def answer_once(
    bundle: Bundle,
    prompt: str,
    image: PictureInput | Sequence[PictureInput] | None = None,
    *,
    max_new_tokens: int = 64,
    threads: int | None = None,
    on_token: Callable[[str], None] = lambda _: None,
) -> str:
    """Asks one question, by `MultimodalRunner` where it can answer, by this package where not.

    Args:
        bundle: An opened bundle with an ExecuTorch program.
        prompt: The question.
        image: A picture or several, which stand before the text; `None` for text alone.
        max_new_tokens: Tokens after which the answer is cut.
        threads: Threads of the kernels; `None` leaves them as they are.
        on_token: Called with each piece of text.

    Raises:
        PocketVLMError: As `answer_with_multimodal_runner`.
    """
    with closing(ExecutorchRunner(bundle, threads=threads)) as runner:
        _require_room(bundle, runner.capacity, prompt, image)
        if bundle.manifest.generation.settings:  # that runner would take the likeliest token
            talk = Conversation(bundle, runner=runner)
            return talk.ask(prompt, image, max_new_tokens=max_new_tokens, on_token=on_token).text
        spoken: list[str] = []

        def speak(piece: str) -> None:
            spoken.append(piece)
            on_token(piece)

        try:
            return answer_with_multimodal_runner(
                bundle,
                prompt,
                image,
                max_new_tokens=max_new_tokens,
                on_token=speak,
                process=runner.process,
            )
        except UnspeakablePieceError:
            talk = Conversation(bundle, runner=runner)
            text = talk.ask(prompt, image, max_new_tokens=max_new_tokens).text
            on_token(text.removeprefix("".join(spoken)))
            return text


def _require_room(
    bundle: Bundle,
    capacity: int,
    prompt: str,
    image: PictureInput | Sequence[PictureInput] | None,
) -> None:
    """Refuses what does not fit before a picture is looked at, in the words of `Conversation`."""
    turn, images = question_turn(prompt, image)
    manifest = bundle.manifest
    taken = len(TextCodec.from_bundle(bundle).encode([turn.to_message()]))
    reduced = taken - len(images) * (manifest.visual_tokens_full - manifest.visual_tokens)
    positions = taken if manifest.positions == "original" else reduced
    require_room(manifest, rows=reduced, positions=positions, capacity=capacity)


def answer_with_multimodal_runner(
    bundle: Bundle,
    prompt: str,
    image: PictureInput | Sequence[PictureInput] | None = None,
    *,
    max_new_tokens: int = 64,
    on_token: Callable[[str], None] = lambda _: None,
    process: ProgramProcess | None = None,
) -> str:
    """Asks one question, greedily.

    Args:
        bundle: An opened bundle with an ExecuTorch program.
        prompt: The question.
        image: A picture or several, which stand before the text; `None` for text alone.
        max_new_tokens: Tokens after which the answer is cut.
        on_token: Called with each piece of text.
        process: The process that has loaded the program; `None` for a new one.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The bundle has no program, or it does not load or run.
        InputError: Nothing was asked.
        UnspeakablePieceError: The answer holds a character that several tokens make up.
    """
    turn, images = question_turn(prompt, image)
    codec = TextCodec.from_bundle(bundle)
    if not codec.generation.is_plain:
        settings = ", ".join(codec.generation.to_json())
        raise InputError(
            f"{bundle.path}: MultimodalRunner takes the likeliest token and cannot apply {settings}"
        )
    ids = codec.encode([turn.to_message()])
    ends = {codec.tokenizer.id_to_token(token) for token in codec.eos_token_ids}
    pieces: list[str] = []

    def take(piece: str) -> None:
        if piece not in ends:
            pieces.append(piece)
            on_token(piece)

    with ExitStack() as own:
        if process is None:
            process = own.enter_context(closing(ProgramProcess(bundle)))
        process.generate(
            str(bundle.file("tokenizer.json")),
            _parts(bundle, codec, ids, images),
            max_new_tokens=max_new_tokens,
            on_piece=take,
        )
    return "".join(pieces)


def _parts(
    bundle: Bundle, codec: TextCodec, ids: Sequence[int], images: Sequence[PictureInput]
) -> list[Sequence[int] | npt.NDArray[np.float32]]:
    """The prompt around its pictures, whose own rows replace their placeholders."""
    if not images:
        return [ids]
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    placeholders = bundle.manifest.visual_tokens_full
    starts = image_runs(
        ids, len(images), image_token_id=codec.image_token_id, placeholders=placeholders
    )
    parts: list[Sequence[int] | npt.NDArray[np.float32]] = []
    end = 0
    for start, image in zip(starts, images, strict=True):
        if end < start:
            parts.append(ids[end:start])
        picture = image if isinstance(image, Image) else open_image(Path(image))
        parts.append(preprocessor.pixels(picture))
        end = start + placeholders
    if end < len(ids):
        parts.append(ids[end:])
    return parts
