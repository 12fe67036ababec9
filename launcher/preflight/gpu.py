"""How the GPUs of a host do, as nvidia-smi tells it: no torch, no CUDA library.

Source: `nvidia-smi --help-query-gpu` and `--help-query-compute-apps` of the driver branches 470 to 580. Fields of newer
branches only are left out: one unknown field makes nvidia-smi refuse all.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SECONDS = 30.0
_ECC = "ecc.errors.uncorrected.volatile.total"
_SLOW, _HOT = "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.hw_thermal_slowdown"
_HEAT = "temperature.gpu"
_WIDTH, _WIDEST = "pcie.link.width.current", "pcie.link.width.max"
FIELDS = ("index", "uuid", "name", "pci.bus_id", _HEAT, _ECC, _SLOW, _HOT, _WIDTH, _WIDEST, "memory.total")
OTHERS = "memory_of_other_processes_bytes"
_TOO_HOT = 85.0  # degrees Celsius; data sheets allow 83 to 92 before clocks are lowered
_SPARE = 256 << 20  # bytes of a display, or of a monitor


@dataclass(frozen=True)
class Rule:
    """What is wrong with a GPU."""

    is_broken: Callable[[Mapping[str, Any]], bool]
    unusable: bool  # else it is only marked
    words: str  # with the GPU's fields


def number(gpu: Mapping[str, Any], field: str) -> float:
    """Returns a field as a number, 0 where the GPU does not have it ("[N/A]")."""
    try:
        return float(gpu.get(field, 0))
    except ValueError:
        return 0.0


def _is_narrow(gpu: Mapping[str, Any]) -> bool:
    return 0 < number(gpu, _WIDTH) < number(gpu, _WIDEST)


RULES = (
    Rule(lambda gpu: number(gpu, _ECC) > 0, True, f"{{{_ECC}}} uncorrected ECC errors since the driver was loaded"),
    Rule(lambda gpu: gpu.get(_SLOW) == "Active", False, "its clocks are lowered by the hardware (power or heat)"),
    Rule(lambda gpu: gpu.get(_HOT) == "Active", False, "its clocks are lowered as it is too hot"),
    Rule(lambda gpu: number(gpu, _HEAT) >= _TOO_HOT, False, f"{{{_HEAT}}} degrees Celsius"),
    Rule(_is_narrow, False, f"{{{_WIDTH}}} of {{{_WIDEST}}} PCIe lanes"),
    Rule(lambda gpu: gpu.get(OTHERS, 0) > _SPARE, False, "processes {pids} hold {gib} GiB of its memory already"),
)


def read_gpus(expected: int) -> tuple[list[dict[str, Any]], str]:
    """Returns (fields of every GPU, why there are none).

    Args:
        expected: GPUs that the bus shows.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], f"{expected} GPUs, but no nvidia-smi to ask" if expected else "no GPU"
    rows, problem = _query(program, "gpu", FIELDS)
    if problem:
        return [], problem
    gpus: list[dict[str, Any]] = [dict(zip(FIELDS, row)) for row in rows]
    held, problem = _query(program, "compute-apps", ("gpu_uuid", "pid", "used_memory"))
    for gpu in gpus if not problem else ():
        own = [row for row in held if row[0] == gpu["uuid"] and row[1] != str(os.getpid())]
        gpu[OTHERS] = sum(int(number({"": row[2]}, "")) for row in own) << 20
        gpu["pids"] = [row[1] for row in own]
    return gpus, "" if gpus else "nvidia-smi finds no GPU"


def complaints(gpu: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Returns (whether it cannot be used, sentence) for everything that is wrong with a GPU."""
    values = {name: str(value) for name, value in gpu.items()}
    values |= {"pids": ", ".join(gpu.get("pids", ())), "gib": f"{gpu.get(OTHERS, 0) / 2**30:.1f}"}
    found = []
    for rule in RULES:
        if rule.is_broken(gpu):
            words = rule.words
            for name, value in values.items():
                words = words.replace(f"{{{name}}}", value)
            found.append((rule.unusable, f"GPU {gpu.get('index', '?')} ({gpu.get('name', '?')}): {words}"))
    return found


def _query(program: str, what: str, fields: tuple[str, ...]) -> tuple[list[list[str]], str]:
    """Returns (rows, why there are none)."""
    command = [program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {_SECONDS:g} s"
    except OSError as error:
        return [], f"nvidia-smi does not run: {error.strerror}"
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return [], f"nvidia-smi failed: {said[:200]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [row for row in rows if len(row) == len(fields)], ""
