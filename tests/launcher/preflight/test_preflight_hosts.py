"""What a host has left, as files of other machines say it, and GPUs as a script in nvidia-smi's place does."""

import os
import shutil

import pytest

from launcher.preflight import gpu, resources
from launcher.preflight.gpu import FIELDS, OTHERS, complaints, read_gpus
from launcher.preflight.resources import CHECKS, free_memory, free_space, read_checks, read_paces
from tests.launcher.machine.machines import write

MIB = 1 << 20
MEMINFO = {"proc/meminfo": "MemTotal:  1000000 kB\nMemFree:  100 kB\nMemAvailable:  524288 kB"}


def v2(path, most, used, cache=0):
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": str(most),
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}\nslab 1",
    }


def v1(path, most, used, cache=0):
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": str(most),
        f"{folder}/memory.usage_in_bytes": str(used),
        f"{folder}/memory.stat": f"cache 5\ntotal_inactive_file {cache}",
    }


@pytest.mark.parametrize(
    "cgroup, files, free",
    [
        ("0::/", {}, 512 * MIB),  # what the host has
        ("0::/job", v2("/job", 100 * MIB, 60 * MIB), 40 * MIB),
        ("0::/job", v2("/job", 100 * MIB, 60 * MIB, cache=20 * MIB), 60 * MIB),
        ("0::/job", v2("/job", "max", 60 * MIB), 512 * MIB),
        ("0::/a/b", v2("/a", 30 * MIB, 10 * MIB) | v2("/a/b", 100 * MIB, 5 * MIB), 20 * MIB),  # the parent's is less
        ("0::/a", v2("/a", 10 * MIB, 11 * MIB), 0),
        ("4:memory:/job\n0::/", v1("/job", 100 * MIB, 60 * MIB, cache=MIB), 41 * MIB),
        ("4:memory:/job\n0::/", v1("/job", 9223372036854771712, 60 * MIB), 512 * MIB),
        ("4:cpu:/job", v1("/job", MIB, 0), 512 * MIB),  # another controller's path
    ],
)
def test_free_memory_is_what_the_cgroup_allows(cgroup, files, free, tmp_path):
    write(tmp_path, MEMINFO | {"proc/self/cgroup": cgroup} | files)
    assert free_memory(tmp_path) == free


def test_a_host_that_does_not_say(tmp_path):
    assert free_memory(tmp_path) is None and free_space(str(tmp_path / "absent")) is None


def test_this_host_has_what_the_system_says():
    found = read_checks(os.getcwd())
    assert found.keys() == {check.name for check in CHECKS}
    assert found["disk_bytes"] == pytest.approx(shutil.disk_usage(".").free, rel=0.05)
    assert 0 < found["free_memory_bytes"] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_pace_is_that_of_the_work(monkeypatch):
    """Against a clock that is made up: 1 MiB that takes 10 ms is 100 MiB per second."""
    clock = [0.0]
    monkeypatch.setattr(resources.time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += 0.01

    assert resources._speed(MIB, work) == pytest.approx(100 * MIB)
    monkeypatch.undo()
    assert all(speed > 1e6 for speed in read_paces().values())


HEALTHY = {
    "index": "0",
    "uuid": "GPU-a",
    "name": "NVIDIA H100",
    "pci.bus_id": "00000000:17:00.0",
    "temperature.gpu": "40",
    gpu._ECC: "0",
    gpu._SLOW: "Not Active",
    gpu._HOT: "Not Active",
    gpu._WIDTH: "16",
    gpu._WIDEST: "16",
    "memory.total": "81559",
}


@pytest.mark.parametrize(
    "changed, unusable, words",
    [
        ({gpu._ECC: "3"}, True, "GPU 0 (NVIDIA H100): 3 uncorrected ECC errors since the driver was loaded"),
        ({gpu._SLOW: "Active"}, False, "its clocks are lowered by the hardware"),
        ({gpu._HOT: "Active"}, False, "its clocks are lowered as it is too hot"),
        ({"temperature.gpu": "85"}, False, "85 degrees Celsius"),
        ({gpu._WIDTH: "8"}, False, "8 of 16 PCIe lanes"),
        ({OTHERS: 3 << 30, "pids": ["17", "18"]}, False, "processes 17, 18 hold 3.0 GiB of its memory already"),
    ],
)
def test_what_is_wrong_with_a_gpu(changed, unusable, words):
    ((found, sentence),) = complaints(HEALTHY | changed)
    assert found == unusable and words in sentence


@pytest.mark.parametrize("text", ["[N/A]", "[Not Supported]", "N/A", ""])
def test_what_a_gpu_does_not_have_is_no_complaint(text):
    assert complaints(HEALTHY) == [] and complaints(HEALTHY | {gpu._WIDTH: text}) == []
    assert complaints(HEALTHY | {name: text for name in (gpu._ECC, gpu._WIDTH, gpu._WIDEST, "temperature.gpu")}) == []


def fake_nvidia_smi(folder, gpus, apps="", code=0):
    """Returns the PATH with a script that answers as nvidia-smi does."""
    folder.mkdir()
    rows = "\n".join(", ".join(HEALTHY[field] if field not in g else g[field] for field in FIELDS) for g in gpus)
    (folder / "gpus").write_text(rows + "\n")
    (folder / "apps").write_text(apps)
    script = folder / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --query-gpu={",".join(FIELDS)}) cat {folder}/gpus;; --query-compute-apps=*) cat {folder}/apps;;'
        f" *) echo unknown; exit 6;; esac\nexit {code}\n"
    )
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_gpus_as_nvidia_smi_tells_them(tmp_path, monkeypatch):
    second = {"index": "1", "uuid": "GPU-b", gpu._ECC: "12"}
    apps = "GPU-b, 4711, 2048\nGPU-b, 4712, [N/A]\nGPU-c, 9, 5\n"
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", [{}, second], apps))
    found, note = read_gpus(2)
    assert note == "" and [entry["name"] for entry in found] == ["NVIDIA H100"] * 2
    assert found[0][OTHERS] == 0 and found[1][OTHERS] == 2 << 30 and found[1]["pids"] == ["4711", "4712"]
    assert complaints(found[0]) == []
    assert [unusable for unusable, _ in complaints(found[1])] == [True, False]


def test_no_gpu_and_no_tool_are_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus(0) == ([], "no GPU")
    assert read_gpus(8) == ([], "8 GPUs, but no nvidia-smi to ask")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", [{}], code=9))
    found, note = read_gpus(1)
    assert found == [] and note.startswith("nvidia-smi failed: 0, GPU-a") and "\n" not in note
    (tmp_path / "bin" / "nvidia-smi").write_text("no script")
    assert read_gpus(1) == ([], "nvidia-smi does not run: Exec format error")


def test_a_tool_that_hangs_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", [{}]))
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(gpu, "_SECONDS", 0.3)
    assert read_gpus(1) == ([], "nvidia-smi did not answer within 0.3 s")
