"""Which of this process's variables the ranks get: on every host what programs need, on none what looks like a secret.

MPICH and its relatives, srun and PALS hand their whole environment to every rank; Open MPI hands on what it is told
to. So secrets are taken out of the environment of whatever starts the ranks, and Open MPI is told names. What is this
host's own (which GPUs a scheduler gave here) is taken out as well where there are other hosts, and ranks here get it
back.
"""

import json
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase

from launcher import watch

# What a program finds its files, its network and its threads by. Patterns as a shell's; a user adds to them.
FORWARDED = (
    "PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "MODULEPATH",
    "LOADEDMODULES", "LMOD_*", "NCCL_*", "RCCL_*", "GLOO_*", "UCX_*", "UCC_*", "FI_*", "OFI_NCCL_*", "PSM*", "RDMAV_*",
    "SHARP_*", "OMP_*", "KMP_*", "GOMP_*", "MKL_*", "OPENBLAS_*", "HF_*", "TORCH*", "PYTORCH_*", "TRITON_*", "CUDA_*",
    "ROCM_*", "HSA_*", "MIOPEN_*", "MPI4PY_*", "MPICH_*", "MALLOC_*", "XDG_CACHE_HOME", "LANG", "LC_*", "TZ",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "LAUNCHER_*",
)  # fmt: skip
# Each host's own, whatever the lists say.
OF_A_HOST = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
SECRETS = (
    "*TOKEN", "*TOKENS", "*_TOKEN_*", "*_KEY", "*_KEYS", "*APIKEY*", "*PASSWORD*", "*PASSWD*", "*PASSPHRASE*",
    "*SECRET*", "*CREDENTIAL*", "AWS_*", "AZURE_*", "*_PAT",
)  # fmt: skip
_OURS = "LAUNCHER_*"
KEPT = "LAUNCHER_OF_HOST"  # JSON: the launcher's host, and the variables of its own


def travelling(environ: Mapping[str, str], named: Sequence[str]) -> list[str]:
    """Returns the names of the variables that ranks on other hosts need, sorted.

    Args:
        named: Patterns of the user's; what they match travels, secret or not.
    """
    return sorted(
        name
        for name in environ
        if _matches(name, named) or _matches(name, FORWARDED) and not _matches(name, OF_A_HOST) and not _is_secret(name)
    )


def withheld(environ: Mapping[str, str], named: Sequence[str]) -> list[str]:
    """Returns the names of the variables that no rank gets, sorted: those that look like secrets and are not named."""
    return sorted(name for name in environ if _is_secret(name) and not _matches(name, named))


def kept(environ: Mapping[str, str], named: Sequence[str]) -> list[str]:
    """Returns the names of the variables that only ranks on this host get, sorted: its own, unless they are named."""
    return sorted(name for name in environ if _matches(name, OF_A_HOST) and not _matches(name, named))


def pack(environ: Mapping[str, str], names: Sequence[str]) -> str:
    """Returns the value of KEPT, of which `take_back` makes these variables again on this host."""
    return json.dumps({"host": watch.this_host(), "variables": {name: environ[name] for name in names}})


def take_back(environ: MutableMapping[str, str]) -> None:
    """Gives a rank the variables of its host's own, where that is the launcher's and what started it set none."""
    packed = json.loads(environ.pop(KEPT, "{}"))
    if packed.get("host") == watch.this_host():
        for name, value in packed["variables"].items():
            environ.setdefault(name, value)


def unmatched(environ: Mapping[str, str], named: Sequence[str]) -> list[str]:
    """Returns the patterns of the user's that match no variable."""
    return [pattern for pattern in named if not any(fnmatchcase(name, pattern) for name in environ)]


def _is_secret(name: str) -> bool:
    return _matches(name.upper(), SECRETS) and not _matches(name, (_OURS,))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
