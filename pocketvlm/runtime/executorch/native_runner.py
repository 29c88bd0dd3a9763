"""An answer from ExecuTorch's own `MultimodalRunner`, the loop that apps on a phone call.

It shows that the program is what that runner expects: it handles prompt, picture and generation,
and no code of this package is involved. It returns text without token ids and keeps no
conversation; like every program, it runs in a separate process (`process`). Its Python binding
cannot pass on a token that is part of a character, and it knows no settings of
generation_config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.errors import InputError
from pocketvlm.prompt.messages import Turn
from pocketvlm.runtime.conversation import question_turn
from pocketvlm.runtime.executorch.process import ProgramProcess, UnspeakablePieceError
from pocketvlm.runtime.pictures import PictureInput, Shown, open_picture
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.splice import image_runs
from pocketvlm.runtime.text import TextCodec

__all__ = ["UnspeakablePieceError", "answer_with_multimodal_runner", "prompt_parts"]


def answer_with_multimodal_runner(
    bundle: Bundle,
    prompt: str | Turn,
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
        InputError: Nothing was asked, or the bundle has settings of generation, or pictures whose
            tiles make up one map.
        UnspeakablePieceError: The answer holds a character that several tokens make up.
    """
    turn, images = question_turn(prompt, image)
    codec = TextCodec.from_bundle(bundle)
    if bundle.manifest.kv_cache.mutual_rows == "prompt":
        raise InputError(
            f"{bundle.path}: MultimodalRunner gives a prompt to the model piece by piece, and all "
            "rows of this model's prompts see each other"
        )
    if not codec.generation.is_plain:
        settings = ", ".join(codec.generation.to_json())
        raise InputError(
            f"{bundle.path}: MultimodalRunner takes the likeliest token and cannot apply {settings}"
        )
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
            prompt_parts(bundle, codec, turn, images),
            max_new_tokens=max_new_tokens,
            on_piece=take,
        )
    return "".join(pieces)


def prompt_parts(
    bundle: Bundle, codec: TextCodec, turn: Turn, images: Sequence[Shown]
) -> list[Sequence[int] | npt.NDArray[np.float32]]:
    """The prompt around its pictures, whose own rows replace their placeholders.

    Returns:
        Token ids, and between them the pixels of each tile, float32 [1, C, S, S].
    """
    if bundle.manifest.tile_budget is not None:
        raise InputError(
            f"{bundle.path}: MultimodalRunner runs one vision graph, and tiles of this bundle's "
            "pictures are seen by several"
        )
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    pictures = [open_picture(image) for image in images]
    grids = preprocessor.grids(pictures)
    if any(grid.is_map for grid in grids):
        raise InputError(
            f"{bundle.path}: MultimodalRunner shows tile after tile, and the tiles of this model's "
            "pictures make up one map"
        )
    if any(grid.left_out for grid in grids):
        raise InputError(
            f"{bundle.path}: MultimodalRunner counts positions row by row, and a tile of the "
            "picture shows nothing and has no row"
        )
    ids = codec.encode([turn.to_message()], grids)
    tiles = [tile[None] for picture in pictures for tile in preprocessor.pixels(picture)]
    placeholders = bundle.manifest.visual_tokens_full
    lengths = [placeholders] * len(tiles)
    starts = image_runs(ids, lengths, image_token_id=codec.image_token_id)
    parts: list[Sequence[int] | npt.NDArray[np.float32]] = []
    end = 0
    for start, tile in zip(starts, tiles, strict=True):
        if end < start:
            parts.append(ids[end:start])
        parts.append(tile)
        end = start + placeholders
    if end < len(ids):
        parts.append(ids[end:])
    return parts
