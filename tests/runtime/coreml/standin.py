"""A worker process in which the reference evaluator stands in for Core ML, and fails on request.

Modes: `answers` does what it is asked; `dies` is killed at its first prediction, as a failed
compile does; `exits` ends there with exit code 0; `hangs` never returns; `garbled` answers with
bytes that are none of the protocol; `wrong` computes something else; `raises` raises.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.runtime.coreml.apple import Toolkit
from pocketvlm.runtime.coreml.worker import main


class StandInModel:
    def __init__(self, program, function, mode):
        self._program, self._function, self._mode = program, function, mode

    def make_state(self):
        return self._program.new_states(self._function)

    def predict(self, data, state=None):
        misbehave(self._mode)
        declared = {p.name: p.type.element.stored for p in self._described().inputs}
        assert all(value.dtype == declared[name] for name, value in data.items())
        found = self._program.run(self._function, data, state)
        if self._mode == "wrong" and "logits" in found:
            found["logits"] = found["logits"][..., ::-1]
        return found

    def _described(self):
        return self._program.package.function(self._function)


class StandIn(Toolkit):
    def __init__(self, units, mode):
        self.engine = f"a stand-in for Core ML, compute units {units}"
        self._mode = mode
        self._programs = {}

    def load(self, package, function):
        if package not in self._programs:
            self._programs[package] = MilProgram(MilPackage.open(package))
        return StandInModel(self._programs[package], function or "main", self._mode)

    def benchmark(self, package, function, inputs, iterations):
        model = self.load(package, function)
        samples = []
        for _ in range(iterations):
            start = time.perf_counter()
            needs = any(p.is_state for p in model._described().inputs)
            model.predict(inputs, model.make_state() if needs else None)
            samples.append((time.perf_counter() - start) * 1e3)
        return {"load_ms": [1.0], "predict_ms": samples}

    def plan(self, package, function):
        operations = MilPackage.open(package).function(function or "main").operations
        live = [op.kind for op in operations if not op.kind.startswith("const")]
        return [
            {
                "operator": kind,
                "device": "neural_engine" if kind in ("linear", "matmul") else "cpu",
                "cost": 1 / len(live),
            }
            for kind in live
        ]


def misbehave(mode):
    if mode == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "exits":
        os._exit(0)
    if mode == "hangs":
        time.sleep(600)
    if mode == "raises":
        raise RuntimeError("Error in building plan.")
    if mode == "garbled":
        request = json.loads(Path(sys.argv[2]).read_text())
        if request["job"] == "serve":
            os.write(request["answers"], (9).to_bytes(8, "little") + b"not a zip")
        else:
            Path(request["result"]).write_text('{"predict_ms": ["fast"]')
            os._exit(0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    mode = sys.argv[1]
    sys.exit(main(sys.argv[2:], lambda units: StandIn(units, mode)))
