"""benchmarks/parts.sh, which holds a first run on a device together, on parts of a second: one deadline, one log, every
failure by name, whatever a part does; and the options of gpu.sh, with a Python that is a list of answers."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = """
echo '[gw0] [ 10%] PASSED tests/a.py::good[1, 2]'
echo 'tests/a.py::never_ends[window 7-dtype0] '
echo 'tests/a.py::fails[x y] '
echo '[gw1] [ 20%] FAILED tests/a.py::fails[x y] '
echo 'tests/b.py::alone FAILED                 [ 30%]'
echo 'tests/b.py::passes PASSED                [ 30%]'
"""


def run(tmp_path, lines: str, *, seconds: int = 30, grace: int = 1, before: str = "") -> tuple[int, str, float]:
    """Returns (exit code, output, seconds) of a script with these lines between begin and finish."""
    script = f"set -u\n{before}\n. {ROOT}/benchmarks/parts.sh\nbegin {seconds}\n{lines}\nfinish\n"
    started = time.monotonic()
    environment = os.environ | {"OUT": str(tmp_path / "out"), "GRACE": str(grace)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=100)
    return done.returncode, done.stdout, time.monotonic() - started


def summary(output: str) -> dict[str, str]:
    """Returns what became of each part."""
    lines = output.split("== what became of the parts")[1].splitlines()[1:]
    rows = [line.split(None, 2) for line in lines if line and not line.startswith("==")]
    return {row[1]: row[0] for row in rows if len(row) > 1 and row[0].isupper() or row[0] in ("ok", "skipped")}


def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path):
    code, output, _ = run(
        tmp_path, "part good 9 true\npart bad 9 bash -c 'echo so it is; exit 3'\npart last 9 echo here"
    )
    assert code == 1 and summary(output) == {"good": "ok", "bad": "FAILED", "last": "ok"}
    assert "exit code 3" in output and "bad: its last line: so it is" in output and "\nhere\n" in output


def test_all_is_well(tmp_path):
    code, output, _ = run(tmp_path, "part one 9 true\nskip two 'no device'\nallowed=3 part three 9 bash -c 'exit 3'")
    assert code == 0 and summary(output) == {"one": "ok", "two": "skipped", "three": "ok"} and "failures" not in output


def test_the_log_is_what_was_printed(tmp_path):
    _, output, _ = run(tmp_path, "part one 9 bash -c 'echo out; echo err >&2'\npart two 9 false")
    assert "out\nerr\n" in output and (tmp_path / "out" / "log.txt").read_text() == output
    assert os.listdir(tmp_path / "out") == ["log.txt"]


def test_a_part_that_hangs_is_stopped_by_an_interrupt(tmp_path):
    """As pytest needs it: a SIGTERM would take its summary."""
    says = 'trap "echo interrupted; exit 5" INT; while :; do sleep 0.1; done'
    code, output, seconds = run(tmp_path, f"part hangs 1 bash -c '{says}'\npart next 9 true")
    assert code == 1 and summary(output) == {"hangs": "STOPPED", "next": "ok"} and seconds < 20
    assert "\ninterrupted\n" in output and "over its 1 s" in output


def test_a_part_that_does_not_listen_is_killed(tmp_path):
    code, output, seconds = run(tmp_path, "part deaf 1 bash -c 'trap \"\" INT TERM; while :; do sleep 0.1; done'")
    assert code == 1 and summary(output) == {"deaf": "STOPPED"} and seconds < 20


def test_a_part_that_crashes_is_told_with_its_signal(tmp_path):
    code, output, _ = run(tmp_path, "part crashes 9 bash -c 'kill -SEGV $$'\npart next 9 true")
    assert code == 1 and summary(output) == {"crashes": "CRASHED", "next": "ok"} and "signal 11, SEGV" in output


def test_a_part_that_is_not_there(tmp_path):
    code, output, _ = run(tmp_path, "part gone 9 no-such-program\npart next 9 true")
    assert code == 1 and summary(output) == {"gone": "FAILED", "next": "ok"} and "no-such-program" in output


def test_the_deadline_holds_for_all_parts_together(tmp_path):
    """A part gets what is left of 8 s, less what it takes to stop it; the ones after it are told as not run."""
    code, output, seconds = run(tmp_path, "part long 60 sleep 60\npart more 60 sleep 60\npart last 1 true", seconds=8)
    assert code == 1 and summary(output) == {"long": "STOPPED", "more": "NO-TIME", "last": "NO-TIME"}
    assert "at most 7 s" in output and seconds < 20


def test_what_a_part_leaves_behind_does_not_hold_up_the_end(tmp_path):
    code, output, seconds = run(tmp_path, "part leaves 9 bash -c 'setsid sleep 30 & true'")
    assert code == 0 and seconds < 20


def test_failing_tests_are_named_without_a_summary(tmp_path):
    _, output, _ = run(tmp_path, f'part tests 9 bash -c "{NAMED} exit 1"')
    failures = set(output.split("failures by name\n")[1].splitlines())
    assert failures == {
        "tests: FAILED tests/a.py::fails[x y]",
        "tests: FAILED tests/b.py::alone",
        "tests: UNFINISHED tests/a.py::never_ends[window 7-dtype0]",
    }


def test_failing_tests_are_named_once_by_the_summary(tmp_path):
    lines = NAMED + "echo 'FAILED tests/a.py::fails[x y] - assert 1 == 2'; echo 'ERROR tests/c.py - ImportError'\n"
    _, output, _ = run(tmp_path, f'part tests 9 bash -c "{lines} exit 1"\npart fine 9 true')
    failures = output.split("failures by name\n")[1].splitlines()
    assert failures[:2] == [
        "tests: FAILED tests/a.py::fails[x y] - assert 1 == 2",
        "tests: ERROR tests/c.py - ImportError",
    ]
    assert len(failures) == 4 and failures.count("tests: FAILED tests/b.py::alone") == 1


def test_wrong_kernels_are_named(tmp_path):
    _, output, _ = run(
        tmp_path, 'part smoke 9 bash -c \'echo "window 7, bf16   ok"; echo "draws    WRONG nan"; exit 1\''
    )
    assert output.split("failures by name\n")[1].splitlines() == ["smoke: FAILED draws"]


def test_at_most_eight_files_come_back(tmp_path):
    _, output, _ = run(tmp_path, "part writes 9 bash -c 'for n in 1 2 3 4 5 6 7 8 9; do echo $n > $OUT/$n.txt; done'")
    assert sorted(os.listdir(tmp_path / "out")) == ["log.txt", "rest.tgz"] and "are in rest.tgz" in output
    packed = subprocess.run(["tar", "-tzf", tmp_path / "out" / "rest.tgz"], capture_output=True, text=True).stdout
    assert packed.split() == [f"{n}.txt" for n in range(1, 10)]


def test_only_the_wanted_parts_run(tmp_path):
    lines = "wanted=(b c)\npart a 9 true\npart b 9 true\nskip c 'not here'\nskip d 'not here'"
    code, output, _ = run(tmp_path, lines)
    assert code == 0 and summary(output) == {"b": "ok", "c": "skipped"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_from_outside_it_still_tells_what_it_has(tmp_path, number):
    script = f". {ROOT}/benchmarks/parts.sh\nbegin 60\npart one 9 true\npart two 50 sleep 50\nfinish\n"
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    process = subprocess.Popen(
        ["bash", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A suite that runs in the background has SIGINT ignored, which a shell that inherits it cannot change.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log, until = tmp_path / "out" / "log.txt", time.monotonic() + 30
    while not (log.exists() and "== two" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and summary(output)["one"] == "ok" and "stopped from outside" in output


ANSWERS = """#!/bin/bash
# A Python whose answers are fixed: where it is, what is installed, and what gpu_machine.py finds ($MACHINE, $BUILD).
case "$*" in
    *sys.executable*) dirname "$0" ;;
    *find_spec*) exit 0 ;;
    *gpu_machine.py*--build*) exit "$BUILD" ;;
    *gpu_machine.py*) exit "$MACHINE" ;;
    *) echo "ran: $*" ;;
esac
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Returns a folder of what a machine without the tools of CUDA has on PATH."""
    folder = tmp_path_factory.mktemp("programs")
    for path in Path("/usr/bin").iterdir():
        if path.name not in ("ninja", "ncu", "compute-sanitizer", "nvidia-smi"):
            (folder / path.name).symlink_to(path)
    return folder


def gpu(
    tmp_path, programs, *arguments: str, machine: int = 0, build: int = 0, tools: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Returns (exit code, output) of gpu.sh with that Python, and these tools beside it."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    for path in (python, *(python.parent / tool for tool in tools)):
        path.write_text(ANSWERS if path == python else '#!/bin/bash\necho "ran: $0 $*"\n')
        path.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "PATH": str(programs)}
    environment |= {"MACHINE": str(machine), "BUILD": str(build)}
    command: list[str | Path] = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    return done.returncode, done.stdout


FIRST = [
    "machine",
    "smoke",
    "kernels",
    "roofline",
    "profile",
    "timm",
    "timm_base",
    "moe",
    "ncu",
    "sanitizer",
    "networks",
]
OF_DEVICES = ("ncu", "sanitizer")


def test_the_first_call_runs_its_parts_in_order(tmp_path, programs):
    code, output = gpu(tmp_path, programs, tools=("ncu", "compute-sanitizer"))
    assert code == 0 and summary(output) == dict.fromkeys(FIRST, "ok") and list(summary(output)) == FIRST
    assert (
        "-n8" in output and "kernels.xml" in output and "--size large --calls 0 --only window 16, bf16, dot;" in output
    )


def test_without_tools_their_parts_are_skipped(tmp_path, programs):
    code, output = gpu(tmp_path, programs)
    assert code == 0 and [name for name, state in summary(output).items() if state == "skipped"] == list(OF_DEVICES)
    assert "no ncu on PATH" in output


def test_a_library_that_is_not_usable_is_built(tmp_path, programs):
    code, output = gpu(tmp_path, programs, machine=3, tools=("ncu", "compute-sanitizer"))
    assert code == 0 and summary(output) == dict.fromkeys(["machine", "build", *FIRST[1:]], "ok")
    assert "no ninja on PATH" in output


def test_without_kernels_what_needs_none_still_runs(tmp_path, programs):
    code, output = gpu(tmp_path, programs, machine=3, build=1, tools=("ninja", "ncu", "compute-sanitizer"))
    found = summary(output)
    assert code == 1 and found["build"] == "FAILED" and "no ninja" not in output
    assert {name for name, state in found.items() if state == "skipped"} == {"smoke", "roofline", *OF_DEVICES}
    assert all(found[name] == "ok" for name in ("kernels", "profile", "timm", "moe", "networks"))


def test_without_a_device_nothing_runs(tmp_path, programs):
    code, output = gpu(tmp_path, programs, machine=1)
    assert code == 1 and summary(output) == {"machine": "FAILED"}


def test_parts_that_are_named_share_the_time(tmp_path, programs):
    code, output = gpu(tmp_path, programs, "moe", "smoke")
    assert code == 0 and list(summary(output)) == ["machine", "smoke", "moe"]
    assert "== smoke (at" in output and "at most 333 s" in output  # 45 of 45 + 25, of 520 s


def test_the_second_call(tmp_path, programs):
    code, output = gpu(tmp_path, programs, "second")
    assert code == 0 and list(summary(output)) == [
        "machine",
        "layouts",
        "train",
        "memory",
        "compiled",
        "peers",
        "simmim",
        "giant",
    ]


def test_a_rehearsal_asks_for_no_device(tmp_path, programs):
    code, output = gpu(tmp_path, programs, "--rehearse", tools=("ncu", "compute-sanitizer", "nvidia-smi"))
    found = summary(output)
    assert code == 0 and {name for name, state in found.items() if state == "skipped"} == set(OF_DEVICES)
    assert "cuda" not in "".join(line for line in output.splitlines() if line.startswith("ran: benchmarks"))


def test_no_run_of_a_rehearsal_continues_another_s(tmp_path, programs):
    """On a device they train different networks, in a rehearsal the same one on other data."""
    code, output = gpu(tmp_path, programs, "--rehearse", "second", tools=("nvidia-smi",))
    names = re.findall(r"^ran: .*swin_moe\.train .*run\.name=(\w+)$", output, re.MULTILINE)
    assert code == 0 and names == ["train", "memory", "simmim"] and output.count("swin_moe.train ") == len(names)


def test_a_part_that_does_not_exist(tmp_path, programs):
    assert gpu(tmp_path, programs, "smok")[0] == 2
