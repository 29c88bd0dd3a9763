"""Every operator of the reference evaluator against torch in float64, or against coremltools."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pocketvlm.emulation.mil.elementwise import erf
from pocketvlm.emulation.mil.ops import OPERATORS

RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(low: int, high: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(low, high, shape).astype(np.int32)


def word(value: str) -> np.ndarray:
    return np.array(value, object)


def vector(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def masks(*values: int) -> np.ndarray:
    return np.array(values, bool)


def flag(value: bool) -> np.ndarray:
    return np.array(value)


X, Y = normal(2, 3, 4), normal(2, 3, 4)
POSITIVE = np.abs(X) + 0.1
WHOLE = ints(-9, 9, 2, 3, 4)
TRUTH = X > 0


def t(values: Any) -> torch.Tensor:
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.double() if tensor.is_floating_point() else tensor


# name, arguments, the same in torch
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("abs", {"x": X}, t(X).abs()),
    ("add", {"x": X, "y": Y[:1]}, t(X) + t(Y[:1])),
    ("ceil", {"x": X}, t(X).ceil()),
    (
        "clip",
        {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.5)},
        t(X).clamp(-0.5, 0.5),
    ),
    ("cos", {"x": X}, t(X).cos()),
    ("elu", {"x": X, "alpha": np.float32(0.7)}, functional.elu(t(X), 0.7)),
    ("equal", {"x": WHOLE, "y": WHOLE[:1]}, t(WHOLE) == t(WHOLE[:1])),
    ("erf", {"x": X}, t(X).erf()),
    ("exp", {"x": X}, t(X).exp()),
    ("exp2", {"x": X}, t(X).exp2()),
    ("floor", {"x": X}, t(X).floor()),
    ("floor_div", {"x": WHOLE, "y": vector(4)}, t(WHOLE).div(4, rounding_mode="floor")),
    ("gelu", {"x": X}, functional.gelu(t(X))),
    ("gelu", {"x": X, "mode": word("EXACT")}, functional.gelu(t(X))),
    (
        "gelu",
        {"x": X, "mode": word("TANH_APPROXIMATION")},
        functional.gelu(t(X), approximate="tanh"),
    ),
    (
        "gelu",
        {"x": X, "mode": word("SIGMOID_APPROXIMATION")},
        t(X) * torch.sigmoid(1.702 * t(X)),
    ),
    ("greater", {"x": X, "y": Y}, t(X) > t(Y)),
    ("greater_equal", {"x": WHOLE, "y": WHOLE[:1]}, t(WHOLE) >= t(WHOLE[:1])),
    ("identity", {"x": X}, t(X)),
    ("inverse", {"x": POSITIVE}, 1 / (t(POSITIVE) + 1e-4)),
    ("leaky_relu", {"x": X, "alpha": np.float32(0.1)}, functional.leaky_relu(t(X), 0.1)),
    ("less", {"x": X, "y": Y}, t(X) < t(Y)),
    ("less_equal", {"x": WHOLE, "y": WHOLE[:1]}, t(WHOLE) <= t(WHOLE[:1])),
    ("log", {"x": POSITIVE}, t(POSITIVE).log()),
    ("logical_and", {"x": TRUTH, "y": TRUTH[:1]}, t(TRUTH) & t(TRUTH[:1])),
    ("logical_not", {"x": TRUTH}, ~t(TRUTH)),
    ("logical_or", {"x": TRUTH, "y": TRUTH[:1]}, t(TRUTH) | t(TRUTH[:1])),
    ("logical_xor", {"x": TRUTH, "y": TRUTH[:1]}, t(TRUTH) ^ t(TRUTH[:1])),
    ("maximum", {"x": X, "y": Y}, t(X).maximum(t(Y))),
    ("minimum", {"x": X, "y": Y}, t(X).minimum(t(Y))),
    ("mod", {"x": WHOLE, "y": vector(4)}, t(WHOLE).remainder(4)),
    ("mul", {"x": X, "y": Y}, t(X) * t(Y)),
    ("not_equal", {"x": WHOLE, "y": WHOLE[:1]}, t(WHOLE) != t(WHOLE[:1])),
    ("pow", {"x": POSITIVE, "y": np.float32(1.5)}, t(POSITIVE) ** 1.5),
    ("real_div", {"x": X, "y": POSITIVE}, t(X) / t(POSITIVE)),
    ("relu", {"x": X}, t(X).relu()),
    ("relu6", {"x": 9 * X}, functional.relu6(t(9 * X))),
    ("round", {"x": X}, t(X).round()),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(0.01)}, (t(POSITIVE) + 0.01).rsqrt()),
    ("select", {"cond": TRUTH, "a": X, "b": Y}, t(X).where(t(TRUTH), t(Y))),
    ("sigmoid", {"x": 30 * X}, t(30 * X).sigmoid()),
    ("sign", {"x": X}, t(X).sign()),
    ("silu", {"x": X}, functional.silu(t(X))),
    ("sin", {"x": X}, t(X).sin()),
    ("softplus", {"x": 30 * X}, functional.softplus(t(30 * X))),
    ("sqrt", {"x": POSITIVE}, t(POSITIVE).sqrt()),
    ("square", {"x": X}, t(X).square()),
    ("sub", {"x": X, "y": Y}, t(X) - t(Y)),
    ("tan", {"x": X}, t(X).tan()),
    ("tanh", {"x": X}, t(X).tanh()),
    ("threshold", {"x": X, "alpha": np.float32(0.2)}, t(X).clamp(min=0.2)),
    # elements that move
    ("band_part", {"x": X, "lower": vector(-1)[0], "upper": vector(0)[0]}, t(X).tril()),
    ("band_part", {"x": X, "lower": vector(0)[0], "upper": vector(1)[0]}, t(X).triu().tril(1)),
    ("concat", {"values": (X, Y), "axis": vector(1)[0]}, torch.cat([t(X), t(Y)], 1)),
    (
        "concat",
        {"values": (X, Y), "axis": vector(-1)[0], "interleave": flag(value=True)},
        torch.stack([t(X), t(Y)], 3).flatten(2),
    ),
    ("cumsum", {"x": X, "axis": vector(1)[0]}, t(X).cumsum(1)),
    (
        "cumsum",
        {"x": X, "axis": vector(2)[0], "exclusive": flag(value=True), "reverse": flag(value=True)},
        t(X).flip(2).cumsum(2).flip(2) - t(X),
    ),
    ("expand_dims", {"x": X, "axes": vector(0, -1)}, t(X)[None, ..., None]),
    ("fill", {"shape": vector(2, 3), "value": np.float32(4)}, torch.full((2, 3), 4.0)),
    ("fill_like", {"ref_tensor": X, "value": np.float32(4)}, torch.full((2, 3, 4), 4.0)),
    ("gather", {"x": X, "indices": vector(2, 0, -1), "axis": vector(1)[0]}, t(X)[:, [2, 0, -1]]),
    (
        "gather",
        {
            "x": X,
            "indices": np.array([[0, 2], [1, 1]], np.uint16),
            "axis": vector(1)[0],
            "batch_dims": vector(1)[0],
        },
        torch.stack([t(X)[0, [0, 2]], t(X)[1, [1, 1]]]),
    ),
    (
        "gather_along_axis",
        {"x": X, "indices": np.zeros((2, 1, 4), np.uint16), "axis": vector(1)[0]},
        t(X)[:, :1],
    ),
    ("gather_nd", {"x": X, "indices": np.array([[1, 2], [0, 0]])}, t(X)[[1, 0], [2, 0]]),
    (
        "gather_nd",
        {"x": X, "indices": np.array([[[2]], [[1]]]), "batch_dims": vector(1)[0]},
        torch.stack([t(X)[0, [2]], t(X)[1, [1]]]),
    ),
    (
        "one_hot",
        {"indices": vector(2, 0), "one_hot_vector_size": vector(3)[0]},
        functional.one_hot(torch.tensor([2, 0]), 3),
    ),
    ("pad", {"x": X, "pad": vector(1, 2)}, functional.pad(t(X), (1, 2))),
    (
        "pad",
        {"x": X, "pad": vector(1, 0, 2, 1), "mode": word("reflect")},
        functional.pad(t(X), (2, 1, 1, 0), mode="reflect"),
    ),
    (
        "pad",
        {"x": X, "pad": vector(0, 0, 2, 1), "mode": word("replicate")},
        functional.pad(t(X), (2, 1), mode="replicate"),
    ),
    (
        "range_1d",
        {"start": vector(2)[0], "end": vector(9)[0], "step": vector(3)[0]},
        torch.arange(2, 9, 3),
    ),
    ("reshape", {"x": X, "shape": vector(0, -1)}, t(X).flatten(1)),
    ("reverse", {"x": X, "axes": vector(1)}, t(X).flip(1)),
    ("shape", {"x": X}, torch.tensor([2, 3, 4])),
    (
        "slice_by_index",
        {
            "x": X,
            "begin": vector(0, -2, 3),
            "end": vector(1, 1, 0),
            "stride": vector(1, 1, -1),
            "begin_mask": masks(1, 0, 0),
            "end_mask": masks(0, 1, 0),
        },
        t(X)[:1, -2:].flip(2)[..., :3],
    ),
    (
        "slice_by_index",
        {
            "x": X,
            "begin": vector(0, -1, 0),
            "end": vector(2, 0, 4),
            "squeeze_mask": masks(0, 1, 0),
        },
        t(X)[:, -1],
    ),
    (
        "slice_by_size",
        {"x": X, "begin": vector(0, 1, 2), "size": vector(2, 1, -1)},
        t(X)[:, 1:2, 2:],
    ),
    ("split", {"x": X, "axis": vector(2)[0], "num_splits": vector(2)[0]}, t(X).chunk(2, 2)),
    ("split", {"x": X, "axis": vector(1)[0], "split_sizes": vector(1, 2)}, t(X).split([1, 2], 1)),
    ("squeeze", {"x": X[:1], "axes": vector(0)}, t(X)[0]),
    ("squeeze", {"x": X[:1, :1]}, t(X)[0, 0]),
    ("stack", {"values": (X, Y), "axis": vector(1)[0]}, torch.stack([t(X), t(Y)], 1)),
    ("tile", {"x": X, "reps": vector(2, 1, 3)}, t(X).tile(2, 1, 3)),
    ("transpose", {"x": X, "perm": vector(0, -1, 1)}, t(X).permute(0, 2, 1)),
    ("topk", {"x": X, "k": vector(2)[0]}, tuple(t(X).topk(2))),
    (
        "topk",
        {"x": X, "k": vector(2)[0], "axis": vector(1)[0], "ascending": flag(value=True)},
        tuple(t(X).topk(2, 1, largest=False)),
    ),
    ("argsort", {"x": X}, t(X).argsort(descending=True)),
    ("argsort", {"x": X, "axis": vector(1)[0], "ascending": flag(value=True)}, t(X).argsort(1)),
    # sums
    ("linear", {"x": X, "weight": normal(5, 4), "bias": normal(5)}, functional.linear),
    ("linear", {"x": X, "weight": normal(5, 4)}, functional.linear),
    ("matmul", {"x": X, "y": normal(2, 4, 5)}, torch.matmul),
    (
        "matmul",
        {"x": X, "y": Y, "transpose_x": flag(value=False), "transpose_y": flag(value=True)},
        t(X) @ t(Y).mT,
    ),
    ("matmul", {"x": X, "y": Y, "transpose_x": flag(value=True)}, t(X).mT @ t(Y)),
    (
        "einsum",
        {"values": (X, Y), "equation": word("abc,adc->abd")},
        torch.einsum("abc,adc->abd", t(X), t(Y)),
    ),
    ("softmax", {"x": 50 * X, "axis": vector(1)[0]}, t(50 * X).softmax(1)),
    (
        "layer_norm",
        {"x": X, "axes": vector(-1), "gamma": normal(4), "beta": normal(4)},
        lambda x, _, gamma, beta: functional.layer_norm(x, (4,), gamma, beta, 1e-5),
    ),
    (
        "layer_norm",
        {"x": X, "axes": vector(1, 2), "epsilon": np.float32(0.1)},
        functional.layer_norm(t(X), (3, 4), eps=0.1),
    ),
    ("layer_norm", {"x": X}, functional.layer_norm(t(X), (2, 3, 4))),
    (
        "batch_norm",
        {"x": X, "mean": X[0, :, 0], "variance": POSITIVE[0, :, 0], "gamma": Y[0, :, 0]},
        functional.batch_norm,
    ),
    ("l2_norm", {"x": X}, t(X) / (t(X).square().sum() + 1e-6).sqrt()),
    ("reduce_argmax", {"x": X, "axis": vector(1)[0]}, t(X).argmax(1)),
    (
        "reduce_argmin",
        {"x": X, "axis": vector(1)[0], "keep_dims": flag(value=True)},
        t(X).argmin(1, keepdim=True),
    ),
    ("reduce_l1_norm", {"x": X, "axes": vector(1)}, t(X).abs().sum(1)),
    ("reduce_l2_norm", {"x": X, "axes": vector(0, 2)}, t(X).square().sum((0, 2)).sqrt()),
    (
        "reduce_log_sum_exp",
        {"x": 50 * X, "axes": vector(2), "keep_dims": flag(value=True)},
        t(50 * X).logsumexp(2, keepdim=True),
    ),
    (
        "reduce_max",
        {"x": X, "axes": vector(-1), "keep_dims": flag(value=True)},
        t(X).amax(2, keepdim=True),
    ),
    ("reduce_mean", {"x": X, "axes": vector(0, 1)}, t(X).mean((0, 1))),
    ("reduce_min", {"x": X}, t(X).amin()),
    ("reduce_prod", {"x": X, "axes": vector(1)}, t(X).prod(1)),
    ("reduce_sum", {"x": X, "axes": vector(1)}, t(X).sum(1)),
    ("reduce_sum_square", {"x": X, "axes": vector(1)}, t(X).square().sum(1)),
]

PICTURE = normal(1, 4, 9, 8)
PLANE = {"pad_type": word("valid"), "strides": vector(2, 2), "kernel_sizes": vector(3, 2)}


def windows() -> list[tuple[str, dict[str, Any], torch.Tensor]]:
    weight, bias, grouped = normal(6, 4, 3, 2), normal(6), normal(6, 2, 3, 2)
    x, custom = t(PICTURE), {"pad_type": word("custom")}
    return [
        (
            "conv",
            {"x": PICTURE, "weight": weight, "bias": bias, "strides": vector(3, 2)},
            functional.conv2d(x, t(weight), t(bias), (3, 2)),
        ),
        (
            "conv",
            {"x": PICTURE, "weight": weight, "dilations": vector(2, 3), "pad_type": word("valid")},
            functional.conv2d(x, t(weight), dilation=(2, 3)),
        ),
        (
            "conv",
            {"x": PICTURE, "weight": grouped, "groups": vector(2)[0]}
            | custom
            | {"pad": vector(1, 0, 2, 1)},
            functional.conv2d(functional.pad(x, (2, 1, 1, 0)), t(grouped), groups=2),
        ),
        (
            "conv",
            {"x": PICTURE, "weight": weight, "pad_type": word("same")},
            functional.conv2d(functional.pad(x, (0, 1, 1, 1)), t(weight)),
        ),
        (
            "conv",
            {"x": PICTURE[0], "weight": weight[:, :1, 0], "pad_type": word("same_lower")}
            | {"x": PICTURE[0][:, :1]},
            functional.conv1d(functional.pad(x[0][:, :1], (1, 0)), t(weight[:, :1, 0])),
        ),
        ("avg_pool", {"x": PICTURE} | PLANE, functional.avg_pool2d(x, (3, 2), 2)),
        (
            "avg_pool",
            {"x": PICTURE} | PLANE | custom | {"pad": vector(1, 1, 1, 1)},
            functional.avg_pool2d(x, (3, 2), 2, padding=1),
        ),
        (
            "avg_pool",
            {"x": PICTURE}
            | PLANE
            | custom
            | {"pad": vector(1, 1, 1, 1), "exclude_padding_from_average": flag(value=True)},
            functional.avg_pool2d(x, (3, 2), 2, padding=1, count_include_pad=False),
        ),
        ("max_pool", {"x": PICTURE} | PLANE, functional.max_pool2d(x, (3, 2), 2)),
        (
            "max_pool",
            {"x": PICTURE - 9} | PLANE | custom | {"pad": vector(1, 1, 1, 1)},
            functional.max_pool2d(x - 9, (3, 2), 2, padding=1),
        ),
        (
            "pixel_shuffle",
            {"x": PICTURE, "upscale_factor": vector(2)[0]},
            functional.pixel_shuffle(x, 2),
        ),
        (
            "pixel_unshuffle",
            {"x": PICTURE[:, :, :8], "downscale_factor": vector(2)[0]},
            functional.pixel_unshuffle(x[:, :, :8], 2),
        ),
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [pytest.param(*case, id=f"{case[0]}-{n}") for n, case in enumerate([*CASES, *windows()])],
)
def test_operator_equals_torch(name: str, arguments: dict[str, Any], expected: Any) -> None:
    if callable(expected):
        expected = expected(*map(t, arguments.values()))
    found = OPERATORS[name](**arguments)
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint16", "bool", "fp16", "fp32"])
def test_cast_cuts_fractions_off(dtype: str) -> None:
    values = np.array([-2.7, -0.5, 0.0, 0.5, 2.7], np.float32)
    if dtype == "uint16":
        values = np.abs(values)
    found = OPERATORS["cast"](x=values, dtype=word(dtype))
    expected = {
        "int32": np.trunc(values),
        "int8": np.trunc(values),
        "uint16": np.trunc(values),
        "bool": values != 0,
    }
    np.testing.assert_array_equal(found, expected.get(dtype, values))


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_attention_equals_torch(kind: str) -> None:
    query, key, value = normal(1, 3, 4, 8), normal(1, 3, 6, 8), normal(1, 3, 6, 5)
    seen = np.tril(np.ones((4, 6), bool), 2)
    mask = {
        "none": None,
        "bool": seen,
        "float": np.where(seen, 0, -1e4).astype(np.float32),
    }[kind]
    found = OPERATORS["scaled_dot_product_attention"](query, key, value, mask)
    expected = functional.scaled_dot_product_attention(
        t(query), t(key), t(value), attn_mask=None if mask is None else t(mask)
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "max", "min"])
def test_scatters_equal_a_loop(mode: str) -> None:
    combine = {
        "update": lambda _, new: new,
        "add": lambda old, new: old + new,
        "sub": lambda old, new: old - new,
        "mul": lambda old, new: old * new,
        "max": max,
        "min": min,
    }[mode]
    data, updates, rows = normal(5, 3), normal(2, 3), vector(4, 1)
    expected = data.copy()
    for row, values in zip(rows, updates, strict=True):
        expected[row] = [combine(*pair) for pair in zip(expected[row], values, strict=True)]
    by_slice = OPERATORS["scatter"](data, rows, updates, mode=word(mode))
    np.testing.assert_allclose(by_slice, expected, rtol=1e-6)
    by_place = OPERATORS["scatter_nd"](data, rows[:, None], updates, mode=word(mode))
    np.testing.assert_allclose(by_place, expected, rtol=1e-6)
    along = OPERATORS["scatter_along_axis"](
        data, np.repeat(rows[:, None], 3, 1), updates, mode=word(mode)
    )
    np.testing.assert_allclose(along, expected, rtol=1e-6)


def test_slice_update_replaces_a_slice_and_refuses_one_that_does_not_fit() -> None:
    data, update = normal(1, 4, 6), normal(1, 2, 6)
    arguments = {"begin": vector(0, 1, 0), "end": vector(1, 3, 6)}
    found = OPERATORS["slice_update"](x=data, update=update, **arguments)
    expected = data.copy()
    expected[:, 1:3] = update
    np.testing.assert_array_equal(found, expected)
    # A cache that is full: numpy would clamp the slice, a device would do as it likes.
    with pytest.raises(ValueError, match="begin"):
        OPERATORS["slice_update"](x=data, update=update, begin=vector(0, 3, 0), end=vector(1, 5, 6))


def test_topk_prefers_the_first_of_equals_and_sorts_places_on_request() -> None:
    scores = np.array([[1, 3, 3, 0, 3]], np.float32)
    _, places = OPERATORS["topk"](scores, vector(2)[0])
    assert places.tolist() == [[1, 2]]
    _, places = OPERATORS["topk"](-scores, vector(3)[0], sort=flag(value=False))
    assert places.tolist() == [[0, 1, 3]]
    (values,) = OPERATORS["topk"](scores, vector(-1)[0], return_indices=flag(value=False))
    assert values.tolist() == [[3, 3, 3, 1, 0]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=50))
def test_erf_is_exact_to_the_last_bits_of_float32(values: list[float]) -> None:
    expected = np.array([math.erf(value) for value in values])
    np.testing.assert_allclose(erf(np.array(values)), expected, atol=1e-10)


def test_every_operator_has_a_test() -> None:
    elsewhere = {
        "cast",
        "scaled_dot_product_attention",
        "scatter",
        "scatter_along_axis",
        "scatter_nd",
        "slice_update",
    }
    assert {name for name, *_ in [*CASES, *windows()]} | elsewhere == OPERATORS.keys()
