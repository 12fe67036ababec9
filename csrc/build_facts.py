"""What a build of the kernels depends on beside torch; run by setup.py and by benchmarks/gpu_machine.py."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def cuda_home(named: Iterable[str | None], near: Path = Path("/usr/local")) -> str | None:
    """Returns the first directory that holds nvcc and CUDA's headers, None without one.

    torch takes the directory above the first nvcc on PATH, which may be a wrapper script elsewhere: a build then ends
    with cuda_runtime.h not found.

    Args:
        named: Directories in the order of preference: CUDA_HOME, torch's choice.
        near: Where installations lie (cuda, cuda-13.0, ...); of several versions the newest.
    """
    versions = sorted(near.glob("cuda-*"), key=lambda path: [int(n) for n in path.name[5:].split(".") if n.isdigit()])
    for directory in [*(Path(name) for name in named if name), near / "cuda", *reversed(versions)]:
        if (directory / "bin" / "nvcc").is_file() and (directory / "include" / "cuda_runtime.h").is_file():
            return str(directory)
    return None


def sources_digest(directory: Path) -> str:
    """Returns 16 hex digits of all C++ and CUDA sources of a directory: a library says from which it was built."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        digest.update(f"{path.relative_to(directory).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
