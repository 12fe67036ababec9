"""Lists the packages and builds the compiled kernels, swin_moe/_C.so, where torch and a C++ compiler are found.

Everything else stands in pyproject.toml. SWIN_MOE_NO_EXT=1 does not build them; SWIN_MOE_REQUIRE_EXT=1 makes it an
error if they cannot be built, which otherwise is said and leaves a package that uses PyTorch's operators.
SWIN_MOE_CUDA_ARCHITECTURES="90" compiles the CUDA kernels for these compute capabilities only.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("SWIN_MOE_REQUIRE_EXT") == "1"
CUDA = os.path.join("csrc", "cuda", "")
FACTS = runpy.run_path(str(HERE / "csrc" / "build_facts.py"))
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# Without it at::parallel_for, a template, runs every loop on one thread. Torch's own libgomp, loaded before, serves it.
THREAD_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
# What runs on machines that do not have the newest GPU: two generations by name, the newest also as PTX for later ones.
CUDA_ARCHITECTURES = tuple(os.environ.get("SWIN_MOE_CUDA_ARCHITECTURES", "80 90 100").split())


def sources(*patterns: str) -> list[str]:
    """Returns files below csrc/, relative to this file."""
    return sorted(str(path.relative_to(HERE)) for pattern in patterns for path in (HERE / "csrc").glob(pattern))


def write_source_mark() -> Path:
    """Returns the directory of a header with the digest of csrc/; it is left alone where it already says so, because
    what includes it is compiled again when it is written."""
    header = HERE / "build" / "marks" / "source_mark.h"
    text = f'#define SWIN_MOE_SOURCES "{FACTS["sources_digest"](HERE / "csrc")}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def nvcc_flags() -> list[str]:
    """Returns how the CUDA kernels are compiled."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    return [
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "--threads=4",  # architectures side by side
        *codes,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def extension_arguments() -> dict:
    """Returns the arguments of setup() that build the library; none where it cannot be, and says why."""
    if os.environ.get("SWIN_MOE_NO_EXT") == "1":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return without_extension(f"torch cannot be imported at build time ({error}); use --no-build-isolation")

    class Build(BuildExtension):
        """Builds the library, or says why not."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "no_python_abi_suffix": True})

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a compiler may do: the package works without
                without_extension(f"{type(error).__name__}: {error}")
                self.extensions: list[Extension] = []

    chosen = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = FACTS["cuda_home"]([os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), chosen])
    with_cuda = bool(torch.version.cuda and cpp_extension.CUDA_HOME)
    kind, flags = CppExtension, {"cxx": CXX_FLAGS + THREAD_FLAGS}
    files = [path for path in sources("**/*.cpp") if not path.startswith(CUDA)]
    if with_cuda:
        kind, flags = CUDAExtension, {"cxx": CXX_FLAGS + THREAD_FLAGS, "nvcc": nvcc_flags()}
        files += sources("cuda/**/*.cpp", "cuda/**/*.cu")
        print(f"swin_moe: CUDA of {cpp_extension.CUDA_HOME}", file=sys.stderr)
    elif torch.version.cuda:
        where = f"CUDA_HOME or torch's {chosen}" if chosen else "CUDA_HOME"
        text = f"no directory with bin/nvcc and include/cuda_runtime.h was found ({where}, /usr/local/cuda*)"
        print(f"swin_moe: {text}: the kernels are built for the CPU only", file=sys.stderr)
    # Not optional=True: setuptools would swallow the error, and with it the reason.
    library = kind(
        "swin_moe._C",
        files,
        depends=sources("**/*.h", "**/*.cuh"),
        include_dirs=[str(HERE / "csrc"), str(write_source_mark())],
        extra_compile_args=flags,
        extra_link_args=THREAD_FLAGS,
        py_limited_api=True,  # registered through torch alone: no symbol of Python is used
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


def without_extension(reason: str) -> dict:
    """Says that the package is built without compiled kernels, or ends the build if they are required."""
    if REQUIRED:
        raise SystemExit(f"error: SWIN_MOE_REQUIRE_EXT=1, but the compiled kernels cannot be built: {reason}")
    print(
        f"WARNING: swin_moe is built without its compiled kernels and will use PyTorch's operators: {reason}",
        file=sys.stderr,
    )
    return {}


class SourceArchive(sdist):
    """An archive that kernels can be built from, whether or not torch was there when it was made."""

    def make_distribution(self) -> None:
        """Adds what setup.py reads and compiles, of which the list that setuptools made may have nothing."""
        files = (
            path for path in sorted((HERE / "csrc").rglob("*")) if path.is_file() and "__pycache__" not in path.parts
        )
        self.filelist.extend(str(path.relative_to(HERE)) for path in files)
        super().make_distribution()


ARGUMENTS = extension_arguments()
setup(
    packages=[*find_packages(include=["swin_moe*", "launcher*", "checkpoint_tools*"]), "swin_moe.configs"],
    # The configs live at the top of the repository, where users look for them, and are installed inside the package.
    package_dir={"swin_moe.configs": "configs"},
    package_data={
        "swin_moe": ["**/*.txt", "py.typed"],
        "launcher": ["py.typed"],
        "checkpoint_tools": ["py.typed"],
        "swin_moe.configs": ["**/*.yaml", "*.tsv"],
    },
    cmdclass={"sdist": SourceArchive, **ARGUMENTS.pop("cmdclass", {})},
    **ARGUMENTS,
)
