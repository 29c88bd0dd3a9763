"""What every reducer of visual tokens promises; a new one is tested by its line in the table."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.stage import REDUCERS, ReduceTokens
from pocketvlm.errors import PocketVLMError, RecipeError
from pocketvlm.export.onnx.reducer import trace_reducer
from pocketvlm.models.reducer import BlockRows, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.forward import VisualTokens, encode_images
from pocketvlm.runtime.onnx.engine import onnxruntime
from tests.contracts.promises import read, require_configuration
from tests.contracts.reducers import REQUIRED, make_reducer

KEPT = 8
OPSET = 18
NAMES = tuple(REDUCERS)


def refusal(name: str, spec: ModelSpec) -> str | None:
    """Why a reducer does not suit a model."""
    try:
        make_reducer(name).build(spec, keep=KEPT, positions="original")
    except PocketVLMError as error:
        return str(error)
    return None


def fitting(name: str, spec: ModelSpec) -> TokenReducer:
    """The reducer of a model that it suits."""
    reason = refusal(name, spec)
    if reason is not None:
        pytest.skip(reason)
    return make_reducer(name).build(spec, keep=KEPT, positions="original").eval()


def encode(checkpoint: Checkpoint, reducer: TokenReducer, pixels: Tensor) -> VisualTokens:
    return encode_images(replace(checkpoint, reducer=reducer), pixels)


def pictures(spec: ModelSpec) -> Tensor:
    size = (spec.tower.height, spec.tower.width)
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_reducer_is_its_configuration(name: str) -> None:
    stage = read("stages", "reduce_tokens", {"reducer": {"kind": name, **REQUIRED.get(name, {})}})
    assert isinstance(stage, ReduceTokens)
    assert stage.reducer == make_reducer(name)
    assert isinstance(stage.reducer, Reducer)
    assert stage.reducer.kind == name
    require_configuration("stages", stage)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_the_reducer_or_a_reason(name: str, tiny_paths: dict[str, Any]) -> None:
    reasons = [refusal(name, Checkpoint.load(path).spec) for path in tiny_paths.values()]
    assert None in reasons
    for reason in filter(None, reasons):
        assert reason.startswith("reduce_tokens: ")
        assert "\n" not in reason


@pytest.mark.parametrize("name", NAMES)
def test_options_that_cannot_be_are_refused_in_one_line(name: str) -> None:
    options = [item.name for item in fields(REDUCERS[name]) if item.name != "kind"]  # type: ignore[arg-type]  # every reducer is a dataclass; an ABC cannot say so
    wrong: list[dict[str, Any]] = [{"beauty": 1}, *({option: [[]]} for option in options)]
    for values in wrong:
        (option,) = values
        with pytest.raises(RecipeError) as caught:
            read(
                "stages",
                "reduce_tokens",
                {"reducer": {"kind": name, **REQUIRED.get(name, {}), **values}},
            )
        assert f"stages.0.reducer.{option}: " in str(caught.value)
        assert "\n" not in str(caught.value)
        if option == "beauty":
            assert f"kind {name}" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_becomes_a_number_that_the_reducer_can_leave(
    name: str, tiny_checkpoint: Checkpoint
) -> None:
    spec = tiny_checkpoint.spec
    fitting(name, spec)
    stage = read(
        "stages",
        "reduce_tokens",
        {"reducer": {"kind": name, **REQUIRED.get(name, {})}, "keep": 0.5},
    )
    for share in (0.01, 0.3, 0.44, 0.7, 1.0):
        kept = replace(stage, keep=share).build(spec).keep
        assert 1 <= kept <= spec.visual_tokens
        assert abs(kept - share * spec.visual_tokens) <= spec.visual_columns
    with pytest.raises(RecipeError, match=r"allowed are 1 to 16$"):
        replace(stage, keep=spec.visual_tokens + 1).build(spec)


@pytest.mark.parametrize("positions", ["original", "consecutive"])
@pytest.mark.parametrize("name", NAMES)
def test_a_reducer_keeps_as_many_tokens_as_it_says_in_order(
    name: str, positions: Any, tiny_checkpoint: Checkpoint
) -> None:
    spec = tiny_checkpoint.spec
    fitting(name, spec)
    reducer = make_reducer(name).build(spec, keep=KEPT, positions=positions)
    assert (reducer.keep, reducer.positions) == (KEPT, positions)
    found = encode(tiny_checkpoint, reducer, pictures(spec))
    assert found.embeds.shape == (3, KEPT, spec.decoder.hidden_size)
    assert found.indices.shape == (3, KEPT)
    assert bool((found.indices >= 0).all() and (found.indices < spec.visual_tokens).all())
    assert bool((found.indices.diff(dim=1) > 0).all()), "each token once, in order"


@pytest.mark.parametrize("name", NAMES)
def test_the_same_picture_is_reduced_alike(name: str, tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    pixels = pictures(spec)
    found = encode(tiny_checkpoint, fitting(name, spec), pixels)
    again = encode(tiny_checkpoint, fitting(name, spec), pixels)
    assert torch.equal(found.indices, again.indices)
    assert torch.equal(found.embeds, again.embeds)
    alone = encode(tiny_checkpoint, fitting(name, spec), pixels[1:2])
    assert torch.equal(found.indices[1:2], alone.indices), "a picture is not judged by its batch"


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_reducer_chooses_what_torch_chooses(
    name: str, tiny_checkpoint: Checkpoint
) -> None:
    spec, tower = tiny_checkpoint.spec, tiny_checkpoint.spec.tower
    reducer = fitting(name, spec)
    model = trace_reducer(reducer, spec, opset=OPSET)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"NonZero", "ScatterND", "ScatterElements", "If", "Loop"}
    for value in model.graph.output:
        assert all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    taken = {value.name for value in session.get_inputs()}
    generator = torch.Generator().manual_seed(5)
    wide = tower.hidden_size * spec.projector.merge_factor**2
    rows = (1, tower.tokens, tower.hidden_size)
    shapes = {"features": (1, spec.visual_tokens, wide), "queries": rows, "keys": rows}
    for block in reducer.earlier_blocks:
        shapes |= {f"queries_{block}": rows, f"keys_{block}": rows}
    for _ in range(5):
        feeds = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        heads = {
            key: value.view(1, tower.tokens, tower.heads, tower.head_dim).transpose(1, 2)
            for key, value in feeds.items()
            if key != "features"
        }
        scale = tower.head_dim**-0.5
        expected, expected_indices = reducer(
            ReducerInputs(
                features=feeds["features"],
                queries=heads["queries"] * scale,
                keys=heads["keys"],
                earlier=tuple(
                    BlockRows(
                        queries=heads[f"queries_{block}"] * scale, keys=heads[f"keys_{block}"]
                    )
                    for block in reducer.earlier_blocks
                ),
                has_cls=tower.has_cls,
                merge_factor=spec.projector.merge_factor,
                patch_rows=tower.rows,
            )
        )
        kept, indices = session.run(
            ["kept", "indices"], {key: feeds[key].numpy() for key in feeds if key in taken}
        )
        np.testing.assert_array_equal(indices, expected_indices.numpy())
        np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-5, atol=1e-6)
