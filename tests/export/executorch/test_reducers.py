"""Every reducer as a method of one ExecuTorch program: it chooses what torch chooses.

ExecuTorch's own kernels run it all, because lowering a dozen graphs to XNNPACK takes a minute; what
selects is never delegated anyway.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.stage import REDUCERS
from pocketvlm.reference_graph.reducer_graph import ReducerGraph
from pocketvlm.runtime.executorch.program import load_program, register_operators
from tests.contracts.reducers import make_reducer

pytest.importorskip("executorch", reason="the executorch extra is not installed")


# Its compiler warns about itself; the target runs it in a separate process.
@pytest.mark.filterwarnings("ignore")
def test_every_reducer_chooses_what_torch_chooses(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    register_operators()
    spec = Checkpoint.load(tiny_paths["llava"]).spec  # the one with [CLS]
    graphs = {
        name: ReducerGraph(
            make_reducer(name).build(spec, keep=4, positions="original"), spec
        ).eval()
        for name in REDUCERS
    }
    programs = {name: torch.export.export(graph, graph.example()) for name, graph in graphs.items()}
    edge = to_edge(
        programs,
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    file = tmp_path / "reducers.pte"
    file.write_bytes(edge.to_executorch().buffer)
    program = load_program(file)
    generator = torch.Generator().manual_seed(7)
    for name, graph in graphs.items():
        inputs = tuple(torch.randn(value.shape, generator=generator) for value in graph.example())
        kept, indices = program.run_method(name, inputs)
        expected, expected_indices = graph(*inputs)
        assert indices.tolist() == expected_indices.tolist(), name
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5, msg=name)
