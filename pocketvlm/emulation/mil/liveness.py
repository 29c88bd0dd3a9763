"""Which updates of a program may be made in place, so that no layer copies a long cache.

A `slice_update` defines a new value. If the old one is no longer read, its memory can be reused.
What may share memory is over-approximated: views by operator, states by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketvlm.emulation.mil.package import Operation

__all__ = ["find_in_place_updates"]

_VIEWS = {
    "cast",
    "expand_dims",
    "identity",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reshape",
    "reverse",
    "slice_by_index",
    "slice_by_size",
    "split",
    "squeeze",
    "transpose",
}
"""Operators whose results may be views of `x`."""

_UNKNOWN = {"einsum"}
"""Operators whose results may share memory with an argument, or not."""

_FOREIGN = -1
"""Memory that this call did not make: inputs, constants, states from before."""


def find_in_place_updates(
    operations: Sequence[Operation], last_use: Mapping[str, int], outputs: Sequence[str]
) -> frozenset[int]:
    """Numbers of the `slice_update`s that may overwrite their `x`.

    Args:
        operations: Everything but constants, in order.
        last_use: For each value that is read, the number of the last operation that reads it.
        outputs: Values that outlive the call.
    """
    memory: dict[str, int] = {}
    held: dict[str, int] = {}
    found: set[int] = set()
    for number, operation in enumerate(operations):
        kind = operation.kind
        if kind == "write_state":
            held[_name(operation, "input")] = memory.get(_name(operation, "data"), _FOREIGN)
            continue
        own = number
        if kind == "read_state":
            own = held.get(_name(operation, "input"), _FOREIGN)
        elif kind in _VIEWS:
            own = memory.get(_name(operation, "x"), _FOREIGN)
        elif kind in _UNKNOWN:
            own = _FOREIGN
        elif kind == "slice_update":
            there = memory.get(_name(operation, "x"), _FOREIGN)
            update = memory.get(_name(operation, "update"), _FOREIGN)
            lives = {
                name
                for name, place in memory.items()
                if place == there and (name in outputs or last_use.get(name, -1) > number)
            }
            states = [state for state, place in held.items() if place == there]
            if (
                there not in (_FOREIGN, update)
                and not lives
                and all(_is_written_next(operations, number, state) for state in states)
            ):
                found.add(number)
                own = there
        for output in operation.outputs:
            memory[output.name] = own
    return frozenset(found)


def _is_written_next(operations: Sequence[Operation], number: int, state: str) -> bool:
    """Whether nothing reads a state after an operation before it is written."""
    for operation in operations[number + 1 :]:
        if operation.kind in ("read_state", "write_state") and _name(operation, "input") == state:
            return operation.kind == "write_state"
    return False


def _name(operation: Operation, parameter: str) -> str:
    """The value that a parameter names; a literal has no name."""
    arguments = operation.inputs.get(parameter, ("",))
    return arguments[0] if isinstance(arguments[0], str) else ""
