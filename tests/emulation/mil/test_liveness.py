"""Updates in place: where they may be made, and that nobody notices them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.emulation.mil import program as mil_program
from pocketvlm.emulation.mil.layout import slice_update_in_place
from pocketvlm.emulation.mil.program import MilProgram
from tests.emulation.mil.rig import open_program, toolkit, write_package

SHAPE = (4, 3)
ROW = np.ones((1, 3), np.float16)


def put(mb: Any, x: Any, row: int, update: Any) -> Any:
    return mb.slice_update(x=x, update=update, begin=[row, 0], end=[row + 1, 3])


def total(mb: Any, *values: Any) -> Any:
    return mb.concat(values=[mb.reduce_sum(x=v, axes=[0], keep_dims=True) for v in values], axis=0)


def chain(mb: Any, x: Any, cache: Any) -> Any:
    """As the decoder: each layer writes, stores and reads back."""
    first = put(mb, mb.read_state(input=cache), 0, ROW)
    held = mb.coreml_update_state(state=cache, value=first)
    seen = mb.slice_by_index(x=held, begin=[0, 0], end=[2, 3])
    used = mb.add(x=x, y=mb.reduce_sum(x=seen, axes=[0], keep_dims=True))
    second = put(mb, held, 1, mb.slice_by_size(x=used, begin=[0, 0], size=[1, 3]))
    held = mb.coreml_update_state(state=cache, value=second)
    third = put(mb, held, 2, ROW * 3)
    return total(mb, mb.coreml_update_state(state=cache, value=third), used)


def old_value_is_read(mb: Any, x: Any, cache: Any) -> Any:
    first = put(mb, mb.read_state(input=cache), 0, ROW)
    second = put(mb, first, 1, ROW * 2)
    return total(mb, first, mb.coreml_update_state(state=cache, value=second), x)


def old_view_is_read(mb: Any, x: Any, cache: Any) -> Any:
    first = put(mb, mb.read_state(input=cache), 0, ROW)
    view = mb.transpose(x=mb.reshape(x=first, shape=[3, 4]), perm=[1, 0])
    second = put(mb, first, 1, ROW * 2)
    return total(mb, mb.coreml_update_state(state=cache, value=second), view, x)


def state_is_read_between(mb: Any, x: Any, cache: Any) -> Any:
    first = put(mb, mb.read_state(input=cache), 0, ROW)
    held = mb.coreml_update_state(state=cache, value=first)
    second = put(mb, held, 1, ROW * 2)
    before = mb.read_state(input=cache)
    return total(mb, before, second, x)


def state_is_never_written_again(mb: Any, x: Any, cache: Any) -> Any:
    first = put(mb, mb.read_state(input=cache), 0, ROW)
    held = mb.coreml_update_state(state=cache, value=first)
    return total(mb, put(mb, held, 1, ROW * 2), x)


def update_is_a_view(mb: Any, x: Any, cache: Any) -> Any:
    made = mb.add(x=mb.read_state(input=cache), y=x)
    row = mb.slice_by_index(x=made, begin=[1, 0], end=[2, 3])
    return total(mb, mb.coreml_update_state(state=cache, value=put(mb, made, 0, row)))


def input_is_updated(mb: Any, x: Any, cache: Any) -> Any:
    first = put(mb, x, 0, ROW * 5)
    return total(mb, mb.coreml_update_state(state=cache, value=mb.add(x=first, y=np.float16(0))))


CASES: dict[Callable[..., Any], list[bool]] = {
    chain: [False, True, True],
    old_value_is_read: [False, False],
    old_view_is_read: [False, False],
    state_is_read_between: [False, False],
    state_is_never_written_again: [False, False],
    update_is_a_view: [False],
    input_is_updated: [False],
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kit = toolkit()
    root = tmp_path_factory.mktemp("liveness")
    inputs = {
        "x": kit.mb.TensorSpec(SHAPE, dtype=kit.types.fp16),
        "cache": kit.mb.StateTensorSpec(SHAPE, dtype=kit.types.fp16),
    }
    return {
        build.__name__: write_package(
            root / f"{build.__name__}.mlpackage", {"main": (inputs, build)}
        )
        for build in CASES
    }


def updates(program: MilProgram) -> list[bool]:
    return [
        step.compute is slice_update_in_place
        for step in program._functions["main"]._steps
        if step.operation.kind == "slice_update"
    ]


@pytest.mark.parametrize("build", CASES)
def test_nobody_notices_an_update_in_place(
    build: Callable[..., Any], packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packages[build.__name__]
    program = open_program(path)
    assert updates(program) == CASES[build]
    monkeypatch.setattr(mil_program, "find_in_place_updates", lambda *_: frozenset())
    plain = open_program(path)
    assert not any(updates(plain))
    x = np.arange(12, dtype=np.float32).reshape(SHAPE)
    ours, theirs = program.new_states("main"), plain.new_states("main")
    for number in range(3):
        given, kept = x + number, dict(ours)
        before = {name: value.copy() for name, value in kept.items()}
        found = program.run("main", {"x": given}, ours)
        expected = plain.run("main", {"x": given.copy()}, theirs)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        np.testing.assert_array_equal(ours["cache"], theirs["cache"])
        np.testing.assert_array_equal(given, x + number)
        for name, values in before.items():
            np.testing.assert_array_equal(kept[name], values)
