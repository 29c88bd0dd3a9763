"""An answer from ExecuTorch's own `MultimodalRunner`, the loop that apps on a phone call.

It proves that the program is what that runner expects: prompt, picture and generation are its
business, and nothing of this package lies between. It tells text and no token ids, keeps no
conversation, and its native code writes to the terminal as it likes, which is kept from it here.
Its Python binding cannot hand over a piece of text that ends inside of a character; such an answer
is taken over by the loop of this package, which gives the same tokens. So is one that settings of
generation_config.json steer, because that runner knows none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.image_file import open_image
from pocketvlm.runtime.conversation import (
    Conversation,
    PictureInput,
    question_turn,
    require_room,
)
from pocketvlm.runtime.executorch.program import load_program, open_program
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.runtime.native_output import quiet_terminal
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.splice import image_runs
from pocketvlm.runtime.text import TextCodec

__all__ = ["UnspeakablePieceError", "answer_once", "answer_with_multimodal_runner"]


class UnspeakablePieceError(ValueError):
    """A token of the answer is part of a character, which the binding cannot hand over."""


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
    runner = ExecutorchRunner(bundle, threads=threads)
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
            bundle, prompt, image, max_new_tokens=max_new_tokens, on_token=speak
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
) -> str:
    """Asks one question, greedily.

    Args:
        bundle: An opened bundle with an ExecuTorch program.
        prompt: The question.
        image: A picture or several, which stand before the text; `None` for text alone.
        max_new_tokens: Tokens after which the answer is cut.
        on_token: Called with each piece of text.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The bundle has no program, or it does not load or run.
        InputError: Nothing was asked.
        UnspeakablePieceError: The answer holds a character that several tokens make up.
    """
    turn, images = question_turn(prompt, image)
    file = bundle.file(bundle.component("executorch", "decoder").file)
    codec = TextCodec.from_bundle(bundle)
    if not codec.generation.is_plain:
        settings = ", ".join(codec.generation.to_json())
        raise InputError(
            f"{bundle.path}: MultimodalRunner takes the likeliest token and cannot apply {settings}"
        )
    ids = codec.encode([turn.to_message()])
    ends = {codec.tokenizer.id_to_token(token) for token in codec.eos_token_ids}
    pieces: list[str] = []
    with open_program(bundle) as (program, _), quiet_terminal() as heard:
        load_program(program, file)  # registers the operators, and says what is wrong with the file
        native = _native_runner()
        inputs = _inputs(native, bundle, codec, ids, images)

        def take(piece: str) -> None:
            if piece not in ends:
                pieces.append(piece)
                with heard():
                    on_token(piece)

        config = native.GenerationConfig(
            echo=False, max_new_tokens=max_new_tokens, temperature=0.0, warming=True
        )
        try:
            runner = native.MultimodalRunner(str(program), str(bundle.file("tokenizer.json")), None)
            runner.generate(inputs, config, take)
        except UnicodeDecodeError as error:
            raise UnspeakablePieceError(str(error)) from error
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise BundleError(f"{file}: MultimodalRunner cannot run it: {first_line}") from error
    return "".join(pieces)


def _native_runner() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that warn about each other's versions
        from executorch.extension.llm import runner
    return runner


def _inputs(
    native: Any,
    bundle: Bundle,
    codec: TextCodec,
    ids: Sequence[int],
    images: Sequence[PictureInput],
) -> list[Any]:
    """The prompt around its pictures, whose own rows replace their placeholders."""
    if not images:
        return [native.make_token_input(list(ids))]
    import torch

    preprocessor = ImagePreprocessor.from_bundle(bundle)
    placeholders = bundle.manifest.visual_tokens_full
    starts = image_runs(
        ids, len(images), image_token_id=codec.image_token_id, placeholders=placeholders
    )
    inputs: list[Any] = []
    end = 0
    for start, image in zip(starts, images, strict=True):
        if end < start:
            inputs.append(native.make_token_input(list(ids[end:start])))
        picture = image if isinstance(image, Image) else open_image(Path(image))
        inputs.append(native.make_image_input(torch.from_numpy(preprocessor.pixels(picture))))
        end = start + placeholders
    if end < len(ids):
        inputs.append(native.make_token_input(list(ids[end:])))
    return inputs
