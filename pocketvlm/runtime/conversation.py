"""The loop of an app: pictures and prompts in, streamed answers out, over any `Runner`.

Every turn renders the whole conversation through the chat template and compares its rows with
those that the KV cache holds. What both share at the start is kept; only what is new is run. A
template that renders the past differently from how it was generated therefore costs time, never
correctness, and `Answer.rewound_rows` says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.prompt.messages import Turn, place_pictures, user_turn
from pocketvlm.runtime.answer import Answer, StageClock, StopReason
from pocketvlm.runtime.detokenize import TextStream
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.generate import StopRules, generate, prompt_rows
from pocketvlm.runtime.pictures import (
    EncodedPicture,
    KnownPicture,
    OpenedPicture,
    PictureInput,
    Shown,
    UnseenPicture,
)
from pocketvlm.runtime.room import Room, least_room
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.sampling import GREEDY, Sampling
from pocketvlm.runtime.splice import PromptLayout, VisualFeatures, lay_out_prompt
from pocketvlm.runtime.text import Message, TextCodec, assistant_message
from pocketvlm.runtime.vision import (
    ANY_VISION,
    VisionChoice,
    choose_vision,
    open_vision,
)

__all__ = ["Conversation", "question_turn"]

_POLICIES = ("original", "consecutive")


def question_turn(
    prompt: str | Turn, image: Shown | Sequence[Shown] | None
) -> tuple[Turn, list[Shown]]:
    """A user's turn with the place of every picture, and the pictures.

    Text that a user types is never a place, whatever it says.

    Raises:
        InputError: Nothing is asked, or pictures and places do not match.
    """
    images: list[Shown]
    if image is None:
        images = []
    elif not isinstance(image, Sequence) or isinstance(image, str | bytes):
        images = [image]
    else:
        images = list(image)
    turn = user_turn(prompt, len(images)) if isinstance(prompt, str) else prompt
    if turn.role != "user":
        raise InputError(f"a question is the user's, not the {turn.role}'s")
    if not turn.text.strip() and not images:
        raise InputError("there is nothing to answer: the prompt is empty and has no picture")
    try:
        (placed,) = place_pictures([turn], len(images))
    except ValueError as error:
        raise InputError(str(error)) from error
    return placed, images


class Conversation:
    """Turns about any number of pictures, with one KV cache.

    Attributes:
        messages: The finished turns; a turn that fails or is abandoned leaves them as they were.
        answers: The finished answers.
    """

    def __init__(
        self, bundle: Bundle, *, runner: Runner | None = None, codec: TextCodec | None = None
    ) -> None:
        """Prepares a bundle for use.

        Args:
            bundle: An opened bundle.
            runner: The engine, which this conversation resets and then owns; `None` for the
                first of `engines.ENGINES` that the bundle has graphs for.
            codec: The bundle's tokenizer and chat template, where they were read already.

        Raises:
            BundleError: The bundle cannot be run.
        """
        manifest = bundle.manifest
        if manifest.positions not in _POLICIES:
            raise BundleError(
                f"{bundle.path}: positions are {manifest.positions!r}; known are "
                f"{', '.join(_POLICIES)}"
            )
        self.messages: list[Message] = []
        self.answers: list[Answer] = []
        self._manifest = manifest
        self._codec = TextCodec.from_bundle(bundle) if codec is None else codec
        self._vision = open_vision(bundle)
        self._runner = open_engine(bundle) if runner is None else runner
        self._runner.reset()
        self._pictures: list[EncodedPicture] = []
        self._serial = 0
        # What the runner's cache holds, whatever became of the turn that put it there: the first
        # `runner.length` rows of the layout with the tokens after it.
        self._cached_layout: PromptLayout | None = None
        self._cached_ids: list[int] = []

    def reset(self) -> None:
        """Starts over; the graphs stay loaded."""
        self.messages.clear()
        self.answers.clear()
        self._pictures.clear()
        self._cached_layout = None
        self._cached_ids = []
        self._runner.reset()

    def encode_ahead(
        self, image: PictureInput, *, vision: VisionChoice = ANY_VISION
    ) -> EncodedPicture:
        """Shows a picture to its vision graph before anybody has asked about it.

        An app calls this while its user types: a turn that is given the result waits neither for
        preprocessing nor for the tower. A picture that is cut otherwise beside others of its turn
        is encoded again then.

        Args:
            image: The picture.
            vision: Which vision graph sees it, where the bundle has several.

        Raises:
            InputError: The picture cannot be used, no vision graph is the one that is asked for, or
                it has no room beside the pictures so far.
        """
        opened = OpenedPicture.of(image)
        graph = choose_vision(self._vision, opened.size, vision)
        cut = self._cuts([*self._pictures, opened])[-1]
        unseen = opened.cut(graph, cut)
        self._require_least([*self._pictures, unseen])
        return self._encode(unseen, StageClock())

    def ask(
        self,
        prompt: str | Turn,
        image: Shown | Sequence[Shown] | None = None,
        *,
        vision: VisionChoice = ANY_VISION,
        max_new_tokens: int = 64,
        on_token: Callable[[str], None] | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Asks, and returns the finished answer.

        Args:
            prompt: The question; may be empty beside a picture. A `Turn` says where among its
                words the pictures stand; else they stand before the text.
            image: The picture of this turn, or several, each given or encoded ahead; `None` for
                text alone, or for another question about earlier pictures.
            vision: Which vision graph sees the pictures of this turn, where the bundle has several;
                earlier ones keep theirs.
            max_new_tokens: Tokens after which the answer is cut.
            on_token: Called with each piece of text as soon as it is certain.
            sampling: How tokens are chosen.

        Raises:
            InputError: Nothing was asked, the picture cannot be used, no vision graph is the one
                that is asked for, or the conversation does not fit the model any more.
        """
        stream = self.stream(
            prompt, image, vision=vision, max_new_tokens=max_new_tokens, sampling=sampling
        )
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                return end.value
            if on_token is not None:
                on_token(piece)

    def stream(
        self,
        prompt: str | Turn,
        image: Shown | Sequence[Shown] | None = None,
        *,
        vision: VisionChoice = ANY_VISION,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        ignore_end: bool = False,
        clock: StageClock | None = None,
    ) -> Generator[str, None, Answer]:
        """Like `ask`, as a generator of pieces of text; the answer is its return value.

        The turn counts once the generator is exhausted (the answer is then `answers[-1]` too); a
        caller who abandons it takes the question back.

        Args:
            prompt: As in `ask`.
            image: As in `ask`.
            vision: As in `ask`.
            max_new_tokens: As in `ask`.
            sampling: As in `ask`.
            ignore_end: Whether generation continues after a token that ends an answer, as a
                measurement of a fixed length does.
            clock: Collects the times; `None` for a new one.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
        turn, images = question_turn(prompt, image)
        clock = StageClock() if clock is None else clock
        ends = () if ignore_end else self._codec.eos_token_ids
        shown = self._cut(images, vision)
        clock.lap("preprocess")
        messages = [*self.messages, turn.to_message()]
        prompt_ids = self._codec.encode(
            messages,
            [picture.cut for picture in shown],
            counts=[picture.graph.rows.per_tile for picture in shown],
        )
        self._require_least(shown, prompt_ids)
        clock.lap("tokenize")
        pictures = [
            self._encode(picture, clock) if isinstance(picture, UnseenPicture) else picture
            for picture in shown
        ]
        tiles = [tile for picture in pictures for tile in picture.rows]
        layout = self._lay_out(prompt_ids, tiles)
        self._require(
            Room(
                rows=len(layout.codes),
                positions=layout.next_position,
                pictures=len(pictures),
                visual_rows=int(layout.is_visual.sum()),
            )
        )
        clock.lap("tokenize")
        held = self._runner.length
        shared = self._shared_rows(layout)
        # The last row is always run: its logits are what the first token is chosen from.
        kind = self._manifest.kv_cache.mutual_rows
        wanted = layout.whole_start(min(shared, len(layout.codes) - 1), kind)
        reused = self._runner.truncate(wanted)
        text, token_ids = TextStream(self._codec.decode_raw), list[int]()
        self._cached_layout, self._cached_ids = layout, token_ids
        rows = prompt_rows(layout, tiles, self._runner, start=reused, mutual_rows=kind)
        clock.lap("embed")
        tokens = generate(
            self._runner,
            rows,
            StopRules(
                max_new_tokens=max_new_tokens,
                end_token_ids=ends,
                max_positions=self._manifest.generation.max_positions,
            ),
            sampling=sampling,
            adjust=lambda logits, said: self._codec.generation.adjust(logits, prompt_ids, said),
            lap=clock.lap,
        )
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                stop_reason: StopReason = end.value
                break
            if token in ends:
                continue
            token_ids.append(token)
            piece = text.push(token)
            clock.lap("detokenize")
            if piece:
                yield piece
                self._require_current(token_ids)
                clock.skip()
        piece = text.finish()
        clock.lap("detokenize")
        if piece:
            yield piece
            self._require_current(token_ids)
        answer = Answer(
            text=text.text,
            token_ids=tuple(token_ids),
            stop_reason=stop_reason,
            rewound_rows=held - shared + wanted - reused,
            timings=clock.timings(
                prompt_tokens=len(layout.codes) - reused,
                visual_tokens=int(layout.is_visual[reused:].sum()),
                reused_tokens=reused,
            ),
        )
        self.messages = [*messages, assistant_message(answer.text)]
        self._pictures = pictures
        self.answers.append(answer)
        return answer

    def _cut(self, images: Sequence[Shown], vision: VisionChoice) -> list[KnownPicture]:
        """All pictures so far and new ones; a known one is to be seen again if cut otherwise."""
        shown = [*self._pictures, *(self._taken(image, vision) for image in images)]
        pictures: list[KnownPicture] = []
        for one, cut in zip(shown, self._cuts(shown), strict=True):
            if isinstance(one, OpenedPicture):
                graph = choose_vision(self._vision, one.size, vision)
                pictures.append(one.cut(graph, cut))
            elif one.cut == cut:
                pictures.append(one)
            else:
                pictures.append(OpenedPicture.of(one.source).cut(one.graph, cut))
        return pictures

    def _require_least(
        self, pictures: Sequence[KnownPicture], prompt_ids: Sequence[int] = ()
    ) -> None:
        """Refuses what has no room whatever the pictures show, before a vision graph runs.

        Args:
            pictures: Those of the conversation.
            prompt_ids: Its prompt; none while nothing was asked about a picture.
        """
        text = sum(token != self._codec.image_token_id for token in prompt_ids)
        room = least_room(pictures, text, keeps_positions=self._keeps_positions)
        if self._problem(room):
            # Which tiles show nothing is known by their pixels alone.
            seen = [
                one.without_empty() if isinstance(one, UnseenPicture) else one for one in pictures
            ]
            self._require(least_room(seen, text, keeps_positions=self._keeps_positions))

    def _problem(self, room: Room) -> str | None:
        return room.problem(
            capacity=self._runner.capacity, max_positions=self._manifest.generation.max_positions
        )

    def _require(self, room: Room) -> None:
        if problem := self._problem(room):
            raise InputError(problem)

    @property
    def _keeps_positions(self) -> bool:
        return self._manifest.positions == "original"

    def _cuts(self, pictures: Sequence[EncodedPicture | OpenedPicture]) -> Sequence[TileGrid]:
        """How pictures are cut; graphs differ in how many pixels a tile has, never in that."""
        return self._vision[0].preprocessor.grids_by_size([one.size for one in pictures])

    def _taken(self, shown: Shown, vision: VisionChoice) -> EncodedPicture | OpenedPicture:
        """A new picture, decoded unless it was encoded ahead."""
        if not isinstance(shown, EncodedPicture):
            return OpenedPicture.of(shown)
        if shown.graph not in self._vision:
            raise InputError("the picture was encoded ahead by another conversation")
        if not shown.graph.has(vision):
            raise InputError(f"the picture was encoded ahead by another graph than for {vision}")
        return self._renumbered(shown)

    def _renumbered(self, picture: EncodedPicture) -> EncodedPicture:
        """A picture with new serials: it may be shown in several turns."""
        rows = [
            replace(row, serial=serial)
            for serial, row in enumerate(picture.rows, start=self._serial + 1)
        ]
        self._serial += len(rows)
        return replace(picture, rows=rows)

    def _encode(self, picture: UnseenPicture, clock: StageClock) -> EncodedPicture:
        graph = picture.graph
        grid, pixels = graph.preprocessor.cut(picture.image, picture.cut)
        clock.lap("preprocess")
        # Never reused, so that rows of an abandoned turn's picture match no other one.
        serial = self._serial + 1
        rows = graph.rows.encode(self._runner, pixels, grid, serial=serial, variant=graph.name)
        self._serial += len(rows)
        clock.lap("vision")
        return EncodedPicture(
            source=picture.source,
            size=picture.image.size,
            graph=graph,
            cut=picture.cut,
            grid=grid,
            rows=rows,
        )

    def _lay_out(self, prompt_ids: list[int], tiles: list[VisualFeatures]) -> PromptLayout:
        return lay_out_prompt(
            prompt_ids,
            tiles,
            image_token_id=self._codec.image_token_id,
            keeps_positions=self._keeps_positions,
            axes=self._manifest.position_axes,
        )

    def _shared_rows(self, layout: PromptLayout) -> int:
        """Rows of a new layout, from its start, that the cache holds."""
        if self._cached_layout is None:
            return 0
        cached = self._cached_layout.extended(self._cached_ids).first(self._runner.length)
        return cached.shared_rows(layout)

    def _require_current(self, token_ids: list[int]) -> None:
        """Refuses to continue with a stream whose cache another turn has taken over."""
        if self._cached_ids is not token_ids:
            raise RuntimeError("another turn began while this answer was being streamed")
