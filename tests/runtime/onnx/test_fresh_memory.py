"""A cache's pages cost memory as rows are written, whatever the process has freed before."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from pocketvlm.device_bench.runner.sensors.memory import LinuxMemory
from pocketvlm.runtime.onnx.fresh_memory import fresh_zeros


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_zeros_are_resident_once_they_are_written() -> None:
    memory = LinuxMemory([os.getpid()])
    # After this, glibc takes blocks of up to 32 MB from its heap.
    np.ones(2**25 - 2**12, np.uint8).sum()
    np.ones(2**25 - 2**12, np.uint8).sum()
    before = memory.resident_bytes()
    arrays = [fresh_zeros((4, 2**18), np.float32) for _ in range(16)]
    taken = memory.resident_bytes() - before
    assert taken < 2**20, f"{taken} bytes of 64 MB are resident"
    for array in arrays:
        assert array.shape == (4, 2**18)
        assert not array[::3, :: 2**12].any()
        array[:] = 1
    assert memory.resident_bytes() - before > 60 * 2**20


def test_sizes_and_types_are_those_asked_for() -> None:
    array = fresh_zeros((1, 3, 5, 2), "int8")
    assert (array.shape, array.dtype, array.sum()) == ((1, 3, 5, 2), np.int8, 0)
    array[0, 2, 4, 1] = 7
    assert array.ravel()[-1] == 7
