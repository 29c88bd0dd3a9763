"""What is asked of a reducer that the package does not know: it is run and traced, not believed.

The reducers of the package keep the same promises in `tests/contracts`; one from outside is asked
whenever it is built, which a plan does before any compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.errors import RecipeError
from pocketvlm.models.reducer import PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.reducer_graph import ReducerGraph

__all__ = ["FORBIDDEN", "require_contract"]

FORBIDDEN = frozenset(
    {
        *("sort", "argsort", "msort", "nonzero", "unique2", "unique_dim", "unique_consecutive"),
        *("masked_select", "masked_scatter", "index_put", "index_add", "index_copy"),
        *("scatter", "scatter_add", "scatter_reduce"),
    }
)
"""Operators that a target lacks, gets wrong, or whose result has no fixed size."""


def require_contract(
    name: str, made: object, spec: ModelSpec, *, keep: int, positions: PositionPolicy
) -> None:
    """Runs a reducer on seeded random pictures of a model's shape, and traces it.

    Args:
        name: What it is called in a message.
        made: What should be a reducer of this model.
        spec: The model.
        keep: Tokens that were asked for.
        positions: The policy that was asked for.

    Raises:
        RecipeError: It breaks a promise of `TokenReducer`; the message says which.
    """
    problem = _problem(made, spec, keep, positions)
    if problem is not None:
        raise RecipeError(f"reduce_tokens: reducer {name}: {problem}")


def _problem(made: object, spec: ModelSpec, keep: int, positions: PositionPolicy) -> str | None:
    """What is wrong with a reducer, or `None`."""
    if not isinstance(made, TokenReducer):
        return f"build returns {type(made).__name__}, not a TokenReducer"
    asked, got = (keep, positions), (made.keep, made.positions)
    if asked != got:
        return f"keep and positions are {got}; asked for are {asked}"
    earlier, last = made.earlier_blocks, spec.tower.feature_block
    if any(block not in range(last) for block in earlier) or list(earlier) != sorted(set(earlier)):
        return f"earlier_blocks are {earlier}; allowed are blocks 0 to {last - 1}, ascending"
    graph = ReducerGraph(made, spec).eval()
    one = graph.example()
    two = tuple(torch.cat([value, value.flip(1)]) for value in one)
    try:
        with torch.no_grad():
            first, again, alone = graph(*two), graph(*two), graph(*one)
            problem = _result_problem(*first, shape=(2, keep, two[0].shape[2]), spec=spec)
    except Exception as error:  # noqa: BLE001  (whatever a stranger's code raises is its fault)
        return f"does not run: {_spell(error)}"
    if problem is not None:
        return problem
    if not all(map(torch.equal, first, again)):
        return "the same pictures are reduced otherwise the second time"
    if not torch.equal(first[1][:1], alone[1]):
        return "a picture is reduced otherwise alone than beside another"
    return _trace_problem(graph)


def _result_problem(
    kept: Tensor, indices: Tensor, *, shape: tuple[int, int, int], spec: ModelSpec
) -> str | None:
    if (kept.shape, indices.shape) != (shape, shape[:2]):
        return (
            f"two pictures give features {list(kept.shape)} and indices {list(indices.shape)}; "
            f"needed are {list(shape)} and {list(shape[:2])}"
        )
    if (kept.dtype, indices.dtype) != (torch.float32, torch.int64):
        return (
            f"features are {kept.dtype} and indices {indices.dtype}; needed are float32 and int64"
        )
    if not bool(kept.isfinite().all()):
        return "features are not finite"
    last = spec.visual_tokens - 1
    if int(indices.min()) < 0 or int(indices.max()) > last or bool((indices.diff() < 1).any()):
        return (
            f"indices must ascend within 0 to {last}, each once; the first picture's are "
            f"{indices[0].tolist()[:8]}"
        )
    return None


def _trace_problem(graph: ReducerGraph) -> str | None:
    try:
        program = torch.export.export(graph, graph.example())
    except Exception as error:  # noqa: BLE001  (likewise)
        return f"cannot be traced: {_spell(error)}"
    called = (str(node.target).split(".") for node in program.graph.nodes)
    used = {name[1].strip("_") for name in called if len(name) > 1} & FORBIDDEN
    if used:
        return (
            f"uses {', '.join(sorted(used))}, which not every target can run; topk, gather, "
            "comparisons and products are safe"
        )
    return None


def _spell(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
