"""The instruction sets that a certificate names."""

from __future__ import annotations

import platform

import pytest

from pocketvlm import machine


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "flags\t\t: fpu smep sme avx2 avx512_vnni amx_int8 fma avx",
            ["amx_int8", "avx", "avx2", "avx512_vnni", "fma"],
        ),
        (
            "Features\t: fp asimd asimddp i8mm sve2 sme crc32",
            ["asimd", "asimddp", "i8mm", "sme", "sve2"],
        ),
    ],
)
def test_flags_that_kernels_are_written_for(line, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name : any\n{line}\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    assert machine.describe_processor() == {
        "machine": platform.machine(),
        "instruction_sets": expected,
    }


def test_numpy_knows_them_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "none")
    assert machine.describe_processor()["instruction_sets"]
