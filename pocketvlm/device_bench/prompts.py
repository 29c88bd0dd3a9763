"""The conversation of a workload in the words of one bundle, fitted before anything is measured.

The controller has the bundle's tokenizer and chat template, so a runner needs neither to know what
it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import ANSWER_MARK, Turn
from pocketvlm.device_bench.workload import Workload, fit_prompt
from pocketvlm.errors import InputError
from pocketvlm.image_file import read_image
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import Message, TextCodec, assistant_message, user_message

__all__ = ["fit_turns", "render_turns"]


def fit_turns(bundle: Bundle, workload: Workload, image: bytes | None) -> tuple[Turn, ...]:
    """The turns of a workload, whose prompt has exactly its number of tokens.

    Args:
        bundle: The bundle that will answer.
        workload: The shape.
        image: The encoded picture, or `None` for text alone.

    Raises:
        InputError: The workload does not fit the model.
    """
    codec = TextCodec.from_bundle(bundle)
    images = int(image is not None)

    def count_tokens(text: str) -> int:
        ids = codec.encode([user_message(text, images=images)])
        return sum(token != codec.image_token_id for token in ids)

    text = fit_prompt(count_tokens, workload.prompt_tokens)
    _require_positions(bundle, codec, workload, text, image)
    return render_turns(codec, [Turn(text=text, pictures=tuple(range(images)))])


def render_turns(codec: TextCodec, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns with what the chat template makes of each and of those before it."""
    rendered: list[Turn] = []
    messages: list[Message] = []
    for turn in turns:
        messages.append(user_message(turn.text, images=len(turn.pictures)))
        rendered.append(replace(turn, rendered=codec.prompts.render(messages)))
        messages.append(assistant_message(ANSWER_MARK))
    return tuple(rendered)


def _require_positions(
    bundle: Bundle, codec: TextCodec, workload: Workload, text: str, image: bytes | None
) -> None:
    manifest = bundle.manifest
    grids = []
    if image is not None:
        preprocessor = ImagePreprocessor.from_bundle(bundle)
        grids.append(preprocessor.grid(read_image(image, "the workload's picture")))
    full, kept = manifest.visual_tokens_full, manifest.visual_tokens
    prompt = len(codec.encode([user_message(text, images=len(grids))], grids))
    if manifest.positions != "original":
        prompt -= sum(grid.placeholders(full) - grid.most_rows(full, kept) for grid in grids)
    needed, limit = prompt + workload.new_tokens, manifest.generation.max_positions
    if needed > limit:
        raise InputError(
            f"workload {workload.name!r} takes {needed} positions ({prompt} of the prompt, "
            f"{workload.new_tokens} new); {bundle.path} has {limit}"
        )
