"""What a runner prints, read within bounds, whatever it prints."""

from __future__ import annotations

import signal
from collections.abc import Callable

from pocketvlm.device_bench.protocol import Event, Failure, Result, parse_event, parse_result
from pocketvlm.printable import printable_line

__all__ = ["EventCallback", "RunnerOutput", "ignore_event", "last_words"]

EventCallback = Callable[[Event], None]
_LONGEST_LINE_BYTES = 2**26
"""The result of ten minutes of answers has some 10 MB."""
_MOST_EVENT_BYTES = 2**28
_LAST_WORDS = 240
_KILL = 9
_EVENT = b'"event"'
"""In every event, and hardly in other lines: most of these are not parsed."""


def ignore_event(event: Event) -> None:
    """Does nothing."""


class RunnerOutput:
    """The standard output of one runner, as it arrives: events, and the last line."""

    def __init__(
        self,
        on_event: EventCallback = ignore_event,
        *,
        skips_text: bool = False,
        longest_line_bytes: int = _LONGEST_LINE_BYTES,
        most_event_bytes: int = _MOST_EVENT_BYTES,
    ) -> None:
        """Nothing has arrived.

        Args:
            on_event: Called for every event.
            skips_text: Whether a client adds lines, which are not JSON; the runner's last line is
                then the last that is.
            longest_line_bytes: What of a longer line is kept, which is then no event or result.
            most_event_bytes: Bytes of events until the others are refused.
        """
        self._on_event = on_event
        self._skips_text = skips_text
        self._longest_line_bytes = longest_line_bytes
        self._most_event_bytes = most_event_bytes
        self._events: list[Event] = []
        self._event_bytes = 0
        self._line = bytearray()
        self._is_cut = False
        self._last: str | None = None
        self._ends_with_event = False

    @property
    def events(self) -> tuple[Event, ...]:
        """All events so far."""
        return tuple(self._events)

    @property
    def is_flood(self) -> bool:
        """Whether there are more events than any measurement has."""
        return self._event_bytes > self._most_event_bytes

    def feed(self, data: bytes) -> None:
        """Takes the next bytes."""
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._extend(piece)
            self._end_line()
        self._extend(rest)

    def outcome(self, status: int, err: str) -> Result | Failure:
        """What the runner said, now that it has ended.

        Args:
            status: Its exit status; negative for the signal that ended it.
            err: The end of its standard error.
        """
        self._end_line()
        if self.is_flood:
            return self.failure(
                f"the runner sent more than {self._most_event_bytes} bytes of events"
            )
        if status < 0:
            hint = "; the system does this when memory runs out" if status == -_KILL else ""
            return self.failure(
                f"the runner was ended by {_signal_name(-status)}{hint}{last_words(err)}"
            )
        outcome = None if self._last is None or self._ends_with_event else parse_result(self._last)
        if isinstance(outcome, Failure):
            return self.failure(outcome.reason)
        if outcome is None:
            log = "" if self._last is None or self._ends_with_event else self._last
            words = last_words(err) or last_words(log)
            return self.failure(f"the runner ended with status {status} and no result{words}")
        if status != 0:
            return self.failure(f"the runner ended with status {status}{last_words(err)}")
        return outcome

    def failure(self, reason: str) -> Failure:
        """A failure with the events that had arrived."""
        self._end_line()
        return Failure(reason=printable_line(reason), events=self.events)

    def _extend(self, piece: bytes) -> None:
        room = self._longest_line_bytes - len(self._line)
        self._is_cut = self._is_cut or len(piece) > room
        self._line += piece[:room]

    def _end_line(self) -> None:
        if not self._line or (self._skips_text and not self._line.startswith(b"{")):
            self._line, self._is_cut = bytearray(), False
            return
        self._ends_with_event = False
        if self._is_cut:
            self._last = f"a line of more than {self._longest_line_bytes} bytes"
        else:
            self._last = self._line.decode("utf-8", "replace").rstrip("\r")
            event = parse_event(self._last) if _EVENT in self._line else None
            self._ends_with_event = event is not None
            if event is not None and not self.is_flood:
                self._event_bytes += len(self._line)
                self._events.append(event)
                self._on_event(event)
        self._line, self._is_cut = bytearray(), False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_words(err: str) -> str:
    """The last line of a program's messages, as the end of a sentence; empty without one."""
    lines = err.strip().splitlines()
    return f": {printable_line(lines[-1])[:_LAST_WORDS]}" if lines else ""
