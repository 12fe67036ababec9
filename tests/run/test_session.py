"""What a session makes of a config on the device it finds."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from launcher.env import without_world
from launcher.failure import reports
from launcher.failure.kinds import MEMORY
from swin_moe.config import Config, EngineConfig
from swin_moe.run.session import default_threads, fit_precision, run_main
from swin_moe.run.state import StopRequest
from tests.ranks import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "flags, expected", [("flags: fma avx512_bf16 sse", "bf16"), ("flags: amx_bf16", "bf16"), ("flags: avx2 bf", "fp32")]
)
def test_fp16_of_a_config_becomes_what_the_cpu_does_well(tmp_path, capsys, flags, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(flags)
    config = Config(engine=EngineConfig(precision="fp16"))
    found = fit_precision(config, CPU, told=True, cpuinfo=str(file))
    assert found.engine.precision == expected
    assert capsys.readouterr().err.count(f"engine.precision={expected} instead of the config's fp16") == 1
    assert fit_precision(config, CPU, told=False, cpuinfo="/nowhere").engine.precision == "fp32"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_other_precisions_and_devices_stay(precision):
    config = Config(engine=EngineConfig(precision=precision))
    assert fit_precision(config, CPU, told=True) is config
    half = Config(engine=EngineConfig(precision="fp16"))
    assert fit_precision(half, torch.device("cuda", 0), told=True) is half


def test_a_rank_without_mpi_ends_with_its_sentence_and_no_word_of_the_interpreters(tmp_path):
    """Threads of gloo are still there, and must not meet an interpreter that is being taken down."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('taken down', flush=True))\n"
        "from swin_moe.run.session import open_session, run_main\n"
        "def main(argv):\n"
        "    open_session(argv[0], argv[1:])\n"
        "    print('met', end='')\n"
        "    raise ValueError('no luck')\n"
        "run_main(main)\n"
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = without_world(os.environ) | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", code, "digits_swin_moe", "run.name=none"]
    ranks = [
        subprocess.Popen(
            words,
            env=world | {"RANK": str(r), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]
    out, err = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].communicate()
    assert (ranks[0].returncode, out, err.splitlines()[-1]) == (2, "met", "error: no luck") and "Traceback" not in err


def test_ctrl_c_counts_where_nobody_reads_errors(monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "__stderr__", None)
    try:
        request = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert request.name == "SIGINT"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("word", "name"), [("SIGHUP", "SIGHUP"), (None, "SIGTERM"), ("SIGNOPE", "SIGTERM"), ("", "SIGTERM")]
)
def test_a_request_has_the_name_of_the_signal_that_the_launcher_was_sent(tmp_path, monkeypatch, word, name):
    monkeypatch.setenv(reports.REPORTS, str(tmp_path))
    if word in signal.Signals.__members__:
        reports.ask(tmp_path, signal.Signals[word])
    elif word is not None:
        (tmp_path / "asked").write_text(word)
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest.__new__(StopRequest)
    request._remember(signal.SIGTERM, None)
    assert (request.name, request.number) == (name, signal.Signals[name].value)
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_agree_on_the_first_name_that_one_of_them_knows():
    request = StopRequest.__new__(StopRequest)
    request.name = ""
    assert request.number == 0
    request.agree([0.0, float(signal.SIGHUP), float(signal.SIGTERM)])
    assert request.name == "SIGHUP"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 3.2 GiB for an array"), "out of memory (3.2 GiB more were needed): lower"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "(20.00 MiB more were needed)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "(9 bytes more"),
        (MemoryError(), "out of memory: lower data.micro_batch"),
        (RuntimeError("Storage size calculation overflowed with sizes=[3000000000, 1]"), "out of memory: lower"),
    ],
)
def test_what_ends_for_lack_of_memory_ends_as_the_launcher_says_it(error, said, capfd):
    def program(_words):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(program, [])
    assert stop.value.code == MEMORY
    assert said in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="not a word of memory"):
        run_main(lambda _words: (_ for _ in ()).throw(RuntimeError("not a word of memory")), [])


@pytest.mark.parametrize(
    ("text", "threads"),
    [("3", 3), ("2,1", 2), (" 2 ", 2), ("0", None), ("x", None), ("-1", None), ("", None), ("²", None)],
)
def test_threads_are_omps_or_the_cores(monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert default_threads() == (threads or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("text", ["99999999", "4097", "9" * 5000])
def test_more_threads_than_openmp_can_start_are_refused(monkeypatch, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS must be at most 4096, got"):
        default_threads()
