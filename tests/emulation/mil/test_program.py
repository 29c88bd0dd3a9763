"""The evaluator as a whole: rounding, states, shared weights, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pocketvlm.emulation.mil.ops import OPERATORS
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.errors import BundleError
from tests.emulation.mil.rig import open_program, toolkit, write_package

WIDTH, CAPACITY = 8, 32
RANDOM = np.random.default_rng(5)
FIRST = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)
SECOND = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)


def block(mb: Any, x: Any, dtype: type) -> Any:
    hidden = mb.linear(x=x, weight=FIRST.astype(dtype), bias=np.zeros(WIDTH, dtype))
    hidden = mb.layer_norm(x=mb.gelu(x=hidden, mode="EXACT"), axes=[-1], epsilon=dtype(1e-5))
    return mb.add(x=mb.matmul(x=hidden, y=SECOND.astype(dtype)), y=x, name="y")


def block_in_torch(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Every operator in float64 on values of the given type, and rounded to it."""

    def step(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).double()

    first = torch.from_numpy(FIRST).to(dtype).double()
    second = torch.from_numpy(SECOND).to(dtype).double()
    hidden = step(x.double() @ first.T)
    epsilon = float(torch.tensor(1e-5, dtype=dtype))
    hidden = step(functional.layer_norm(step(functional.gelu(hidden)), (WIDTH,), eps=epsilon))
    return step(step(hidden @ second) + x.double())


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MilProgram]:
    kit = toolkit()
    root = tmp_path_factory.mktemp("programs")
    types = {"fp16": (kit.types.fp16, np.float16), "fp32": (kit.types.fp32, np.float32)}
    made = {}
    for name, (kind, dtype) in types.items():
        inputs = {"x": kit.mb.TensorSpec((1, 4, WIDTH), dtype=kind)}
        path = write_package(
            root / f"{name}.mlpackage",
            {"main": (inputs, lambda mb, x, dtype=dtype: block(mb, x, dtype))},
        )
        made[name] = open_program(path)
    made["cache"] = open_program(write_cache(root / "cache.mlpackage"))
    return made


def write_cache(path: Path) -> Path:
    """Two functions that append rows to one state and sum it, over one weight."""
    kit = toolkit()
    mb = kit.mb
    weight = RANDOM.integers(-8, 8, (WIDTH, WIDTH))

    def function(rows: int) -> Any:
        inputs = {
            "x": mb.TensorSpec((1, rows, WIDTH), dtype=kit.types.fp16),
            "past": mb.TensorSpec((1,), dtype=kit.types.int32),
            "cache": mb.StateTensorSpec((1, CAPACITY, WIDTH), dtype=kit.types.fp16),
        }

        def build(mb: Any, x: Any, past: Any, cache: Any) -> Any:
            codes = mb.const(val=weight.astype(kit.types.np_int4_dtype), name="codes")
            codes.op.weight_id = "codes"
            scale = np.full((WIDTH, 1), 0.5, np.float16)
            dense = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name="w")
            new = mb.linear(x=x, weight=dense)
            zero, last = np.zeros(1, np.int32), np.array([WIDTH], np.int32)
            behind = mb.add(x=past, y=np.array([rows], np.int32))
            old = mb.read_state(input=cache)
            after = mb.slice_update(
                x=old,
                update=new,
                begin=mb.concat(values=[zero, past, zero], axis=0),
                end=mb.concat(values=[zero + 1, behind, last], axis=0),
            )
            held = mb.coreml_update_state(state=cache, value=after)
            return mb.reduce_sum(x=held, axes=[1], keep_dims=False, name="total")

        return inputs, build

    return write_package(path, {"many": function(4), "one": function(1)})


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_a_program_equals_torch_rounded_behind_every_operator(
    kind: str, programs: dict[str, MilProgram]
) -> None:
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[kind]
    x = torch.from_numpy(RANDOM.standard_normal((1, 4, WIDTH))).to(dtype)
    found = programs[kind].run("main", {"x": x.float().numpy()})["y"]
    expected = block_in_torch(x, dtype).numpy()
    # One place in the last bit, where the float32 sum falls on the other side of a tie.
    np.testing.assert_allclose(found, expected, rtol=2e-3 if kind == "fp16" else 2e-6, atol=1e-6)
    if kind == "fp16":
        assert (found == expected).mean() > 0.9
        unrounded = programs["fp32"].run("main", {"x": x.float().numpy()})["y"]
        assert np.abs(found - expected).mean() < np.abs(unrounded - expected).mean() / 4
    assert found.dtype == np.float32


def test_float16_overflows_as_the_device_does(programs: dict[str, MilProgram]) -> None:
    found = programs["fp16"].run("main", {"x": np.full((1, 4, WIDTH), 1e5)})["y"]
    assert not np.isfinite(found).any()


def test_states_live_between_calls_and_functions(programs: dict[str, MilProgram]) -> None:
    program = programs["cache"]
    states = program.new_states("many")
    assert {name: value.shape for name, value in states.items()} == {"cache": (1, CAPACITY, WIDTH)}
    x = RANDOM.standard_normal((1, 5, WIDTH)).astype(np.float16).astype(np.float32)
    before = states["cache"]
    program.run("many", {"x": x[:, :4], "past": np.array([0])}, states)
    total = program.run("one", {"x": x[:, 4:], "past": np.array([4])}, states)["total"]
    assert not before.any()  # the entry is replaced; what others hold is not changed
    np.testing.assert_allclose(states["cache"][:, :5].sum(1), total, rtol=2e-3)
    fresh = program.new_states("one")
    for row in range(5):
        again = program.run("one", {"x": x[:, row : row + 1], "past": np.array([row])}, fresh)
    np.testing.assert_array_equal(fresh["cache"], states["cache"])
    np.testing.assert_array_equal(again["total"], total)


def test_functions_share_decoded_weights(programs: dict[str, MilProgram]) -> None:
    functions = programs["cache"]._functions
    many, one = (functions[name]._constants["w"] for name in ("many", "one"))
    assert np.shares_memory(many, one)


def test_wrong_inputs_are_refused(programs: dict[str, MilProgram]) -> None:
    program = programs["fp32"]
    with pytest.raises(ValueError, match="differ in x, y"):
        program.run("main", {"y": np.zeros((1, 4, WIDTH))})
    with pytest.raises(ValueError, match=r"x has shape \[1, 5, 8\]; it is float32 \[1, 4, 8\]"):
        program.run("main", {"x": np.zeros((1, 5, WIDTH))})
    with pytest.raises(BundleError, match="no function 'main'; there are many, one"):
        programs["cache"].run("main", {})
    with pytest.raises(BundleError, match=r"operator slice_update .*: an update of shape"):
        states = programs["cache"].new_states("many")
        programs["cache"].run(
            "many", {"x": np.zeros((1, 4, WIDTH)), "past": np.array([CAPACITY - 1])}, states
        )


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda mb, x: mb.instance_norm(x=x),
            r"operator instance_norm \(y\): .* not know this operator",
        ),
        (
            lambda mb, x: mb.cond(
                pred=mb.greater(x=mb.reduce_sum(x=x, keep_dims=False), y=np.float32(0)),
                _true_fn=lambda: mb.add(x=x, y=x),
                _false_fn=lambda: mb.sub(x=x, y=x),
            ),
            "operator cond",
        ),
        (
            lambda mb, x: mb.conv(x=x, weight=np.ones((1, 2, 1), np.float32), pad_type="valid"),
            None,
        ),
    ],
)
def test_an_operator_that_is_not_known_is_named(
    build: Any, match: str | None, tmp_path: Path
) -> None:
    kit = toolkit()
    inputs = {"x": kit.mb.TensorSpec((1, 2, 4), dtype=kit.types.fp32)}

    def named(mb: Any, x: Any) -> Any:
        return mb.identity(x=build(mb, x), name="z")

    path = write_package(tmp_path / "odd.mlpackage", {"main": (inputs, named)})
    if match is None:
        assert open_program(path).run("main", {"x": np.ones((1, 2, 4))})["z"].tolist() == [
            [[2] * 4]
        ]
        return
    with pytest.raises(BundleError, match=match.replace(r"\(y\)", r"\(.*\)")):
        open_program(path)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (
            lambda x, y: (x + y)[..., None],
            r"operator add \(y\): the result has shape \[1, 4, 8, 1\]",
        ),
        (lambda x, y: (x, y), r"operator add \(y\): 2 results; 1 are declared"),
    ],
)
def test_a_result_that_is_not_what_was_declared_is_refused(
    found: Any, match: str, programs: dict[str, MilProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that finds both a wrong operator here and a wrong declaration there."""
    monkeypatch.setitem(OPERATORS, "add", found)
    program = MilProgram(programs["fp32"].package)
    with pytest.raises(BundleError, match=match):
        program.run("main", {"x": np.zeros((1, 4, WIDTH))})
