"""The process that runs Core ML: a compilation that crashes ends this process and no other.

    python -m pocketvlm.runtime.coreml.worker REQUEST.json

A request names a job. `measure` times one function and reads its compute plan, and writes the
result to a file. `serve` answers the calls of a `session.RemoteRunner` over two pipes whose numbers
are in the request. The parent accepts only a complete answer, whatever the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.types import Array
from pocketvlm.errors import PocketVLMError
from pocketvlm.json_io import read_json, write_json
from pocketvlm.runtime.coreml.apple import AppleToolkit, DevicePackage, Toolkit
from pocketvlm.runtime.coreml.frames import read_frame, write_frame
from pocketvlm.runtime.coreml.runner import CoremlRunner

__all__ = ["main"]

MakeToolkit = Callable[[str], Toolkit]


def main(arguments: list[str], make_toolkit: MakeToolkit = AppleToolkit) -> int:
    """Does one job.

    Args:
        arguments: The request's file.
        make_toolkit: Makes Core ML, or a stand-in, from the compute units.

    Returns:
        The exit code.
    """
    request = read_json(Path(arguments[0]))
    try:
        toolkit = make_toolkit(request["units"])
        if request["job"] == "serve":
            _serve(request, toolkit)
        else:
            write_json(Path(request["result"]), _measure(request, toolkit))
    except PocketVLMError as error:
        print(error, file=sys.stderr)  # noqa: T201  (the parent shows the last line)
        return error.exit_code
    return 0


def _measure(request: Mapping[str, Any], toolkit: Toolkit) -> dict[str, Any]:
    package, function = Path(request["package"]), request["function"]
    described = MilPackage.open(package).function(function or "main")
    # Zeros of the declared shapes: a whole chunk of rows after an empty cache, or one row.
    inputs: dict[str, Array] = {
        parameter.name: np.zeros(parameter.type.sizes, parameter.type.element.stored)
        for parameter in described.inputs
        if not parameter.is_state
    }
    if "length" in inputs:
        inputs["length"][...] = inputs["embeds"].shape[1]
    samples = toolkit.benchmark(package, function, inputs, int(request["iterations"]))
    return {
        "engine": toolkit.engine,
        **samples,
        "plan": toolkit.plan(package, function),
    }


def _serve(request: Mapping[str, Any], toolkit: Toolkit) -> None:
    bundle = Bundle.open(Path(request["bundle"]), verify=False)
    runner = CoremlRunner(bundle, open_package=lambda path: DevicePackage(path, toolkit))
    with (
        os.fdopen(int(request["calls"]), "rb") as calls,
        os.fdopen(int(request["answers"]), "wb") as answers,
    ):
        write_frame(
            answers,
            {"capacity": np.array(runner.capacity), "engine": np.array(runner.engine)},
        )
        while (call := read_frame(calls)) is not None:
            write_frame(answers, _answer(runner, call))


def _answer(runner: CoremlRunner, call: Mapping[str, Array]) -> dict[str, Array]:
    kind = str(call["call"])
    if kind == "encode_image":
        name = call.get("variant")
        embeds, indices = runner.encode_image(call["pixels"], None if name is None else str(name))
        return {"embeds": embeds, "indices": indices}
    if kind == "embed":
        return {"embeds": runner.embed(call["token_ids"].tolist())}
    if kind == "truncate":
        return {"length": np.array(runner.truncate(int(call["length"])))}
    mutual = call.get("mutual")
    return {"logits": runner.decode(call["embeds"], call["position_ids"], mutual=mutual)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
