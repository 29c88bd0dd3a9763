"""The instruction sets that a certificate names, and the memory that is left."""

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


GROUPS_V1 = {
    "proc/self/cgroup": "4:memory:/jobs/one\n3:cpu:/\n0::/\n",
    "sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes": "700\n",
    "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "1000\n",
    "sys/fs/cgroup/memory/jobs/memory.usage_in_bytes": "900\n",
    "sys/fs/cgroup/memory/jobs/memory.stat": (
        "total_rss 300\ntotal_inactive_file 400\ntotal_active_file 200\ninactive_file 7\n"
    ),
}
GROUPS_V2 = {
    "proc/self/cgroup": "0::/user.slice/run.scope\n",
    "sys/fs/cgroup/user.slice/run.scope/memory.max": "5000\n",
    "sys/fs/cgroup/user.slice/run.scope/memory.current": "4500\n",
    "sys/fs/cgroup/user.slice/run.scope/memory.stat": "anon 500\nactive_file 100\ninactive_file 0",
    "sys/fs/cgroup/user.slice/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/memory.current": "4500\n",
}
CONTAINER = {
    "proc/self/cgroup": "0::/../../of-the-host\n",
    "sys/fs/cgroup/memory.max": "5000\n",
    "sys/fs/cgroup/memory.current": "6000\n",
}


@pytest.mark.parametrize(
    ("files", "free", "expected"),
    [
        ({}, 10_000, 10_000),
        (GROUPS_V1, 10_000, 700),  # the limit of the group above, whose cached files can go
        (GROUPS_V1, 10, 10),
        (GROUPS_V2, 10_000, 600),
        (CONTAINER, 10_000, 0),
    ],
)
def test_memory_that_control_groups_leave(files, free, expected, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": free}))
    assert machine.available_memory_bytes(tmp_path) == expected
