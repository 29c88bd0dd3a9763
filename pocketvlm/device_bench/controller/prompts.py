"""The conversation of a workload in the words of one bundle, fitted before anything is measured.

The controller has the bundle's tokenizer and chat template, so a runner needs neither to know what
it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.controller.shown import ShownPicture
from pocketvlm.device_bench.protocol import ANSWER_MARK, Turn
from pocketvlm.device_bench.workload import Workload, fit_text
from pocketvlm.errors import InputError
from pocketvlm.runtime.text import Message, TextCodec, assistant_message, user_message

__all__ = ["fit_turns", "render_turns"]


def fit_turns(
    bundle: Bundle, workload: Workload, pictures: Sequence[ShownPicture]
) -> tuple[Turn, ...]:
    """The turns of a workload, each of exactly its number of tokens.

    Args:
        bundle: The bundle that will answer.
        workload: The shape.
        pictures: The pictures as the bundle sees them, all of which the first turn shows.

    Raises:
        InputError: The workload does not fit the model.
    """
    codec = TextCodec.from_bundle(bundle)
    turns: list[Turn] = []
    for number in range(workload.turns):
        shown = tuple(range(len(pictures))) if number == 0 else ()
        text = fit_text(_token_counter(codec, turns, shown), workload.prompt_tokens)
        turns.append(Turn(text=text, pictures=shown))
    _require_positions(bundle, codec, workload, turns[0], pictures)
    return render_turns(codec, turns)


def render_turns(codec: TextCodec, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns with what the chat template makes of each and of those before it.

    Raises:
        InputError: The template refuses the conversation, or leaves an answer out.
    """
    rendered: list[Turn] = []
    messages: list[Message] = []
    for turn in turns:
        messages.append(user_message(turn.text, images=len(turn.pictures)))
        text = codec.prompts.render(messages)
        if text.count(ANSWER_MARK) != len(rendered):
            raise InputError("the chat template does not write each earlier answer once")
        rendered.append(replace(turn, rendered=text))
        messages.append(assistant_message(ANSWER_MARK))
    return tuple(rendered)


def _token_counter(
    codec: TextCodec, earlier: Sequence[Turn], pictures: tuple[int, ...]
) -> Callable[[str], int]:
    """Counts the tokens that a turn of this text adds to the conversation, visual ones left out."""

    def count_all(text: str) -> int:
        ids = codec.encode([user_message(text, images=len(pictures))])
        return sum(token != codec.image_token_id for token in ids)

    def count_added(text: str) -> int:
        # What the template writes after an answer is not a prompt by itself, and begins inside one.
        last = (
            render_turns(codec, [*earlier, Turn(text=text, pictures=pictures)])[-1].rendered or ""
        )
        added = last.rpartition(ANSWER_MARK)[2]
        return len(codec.tokenizer.encode(added, add_special_tokens=False).ids)

    return count_added if earlier else count_all


def _require_positions(
    bundle: Bundle,
    codec: TextCodec,
    workload: Workload,
    first: Turn,
    pictures: Sequence[ShownPicture],
) -> None:
    manifest = bundle.manifest
    message = user_message(first.text, images=len(pictures))
    ids = codec.encode(
        [message],
        [picture.grid for picture in pictures],
        counts=[picture.placeholders for picture in pictures],
    )
    prompt = len(ids) + (workload.turns - 1) * workload.prompt_tokens
    if manifest.positions != "original":
        prompt -= sum(one.grid.placeholders(one.placeholders) - one.most_rows for one in pictures)
    new = workload.turns * workload.new_tokens
    needed, limit = prompt + new, manifest.generation.max_positions
    if needed > limit:
        raise InputError(
            f"workload {workload.name!r} takes {needed} positions ({prompt} of the prompt, "
            f"{new} new); {bundle.path} has {limit}"
        )
