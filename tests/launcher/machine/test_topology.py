"""What a host has, read from trees of /sys and /proc; quotas also from a real cgroup."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from launcher.machine import topology
from launcher.machine.topology import cpu_quota, parse_list, read_machine, short_list
from tests.launcher.machine import machines
from tests.ranks import ROOT


@pytest.mark.parametrize(
    "text, numbers", [("", []), ("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-2,8,10-11", [0, 1, 2, 8, 10, 11])]
)
def test_lists_of_the_kernel(text, numbers):
    assert parse_list(text) == numbers
    assert short_list(numbers[::-1]) == text


def machine(root, monkeypatch, cores, environ=None):
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda pid: set(cores))
    return read_machine(environ or {}, root)


def test_cores_have_nodes_and_siblings(tmp_path, monkeypatch):
    machines.write(tmp_path, machines.nodes("0-1,4-5", "2-3,6-7") | machines.smt([(0, 4), (1, 5), (2, 6), (3, 7)]))
    found = machine(tmp_path, monkeypatch, [0, 2, 3, 4, 7])
    assert [(core.number, core.node, core.physical[1]) for core in found.cores] == [
        (0, 0, 0),
        (2, 1, 2),
        (3, 1, 3),
        (4, 0, 0),
        (7, 1, 3),
    ]
    assert found.distances == {(0, 0): 10, (0, 1): 12, (1, 0): 12, (1, 1): 10}
    assert found.quota is None and found.gpus == ()


def test_a_host_that_tells_nothing_has_one_node(tmp_path, monkeypatch):
    assert [(core.number, core.node) for core in machine(tmp_path, monkeypatch, [1, 3]).cores] == [(1, 0), (3, 0)]


@pytest.mark.parametrize(
    "environ, given, buses",
    [
        ({}, None, [1, 2, 3, 4]),
        ({}, [0, 3], [1, 4]),  # a container with two of four
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, None, [3, 1]),
        ({"CUDA_VISIBLE_DEVICES": ""}, None, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5f1c"}, None, []),  # which that is, only the driver knows
        ({"CUDA_VISIBLE_DEVICES": "7"}, None, []),
    ],
)
def test_gpus(environ, given, buses, tmp_path, monkeypatch):
    machines.add_gpus(tmp_path, [0, 0, 1, 1], given=given)
    found = machine(tmp_path, monkeypatch, [0], environ).gpus
    assert [gpu.bus for gpu in found] == [f"0000:{bus:02x}:00.0" for bus in buses]
    assert all(gpu.vendor == "NVIDIA" and gpu.node == (int(gpu.bus[5:7]) - 1) // 2 for gpu in found)


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "350000 100000"}, 3.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/not/seen", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n1:name=systemd:/x",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpuacct,cpu:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_quota(files, quota, tmp_path):
    assert cpu_quota(machines.write(tmp_path, files)) == quota


def test_quota_of_a_real_cgroup():
    """A process in a cgroup of one and a half cores knows it."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"launcher-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        if version_1.is_dir():
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("150000")
        else:
            (group / "cpu.max").write_text("150000 100000")
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    program = (
        f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from launcher.machine.topology import cpu_quota; print(cpu_quota())"
    )
    try:
        finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert finished.stdout == "1.5\n", finished.stderr
    finally:
        os.rmdir(group)
