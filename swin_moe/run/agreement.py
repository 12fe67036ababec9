"""Whether all ranks were given the same options: files of one name may differ between hosts."""

import dataclasses
import hashlib
import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from swin_moe.config import Config
from swin_moe.parallel.heartbeat import LONG_SECONDS

_KEY = "swin_moe/options"
# What a host may have of its own: copies of files, of which only whether there is one has to agree, and how much of it
# works for a rank.
_PATHS = ("data.path", "checkpoint.load", "checkpoint.init", "parallel.hardware", "model.moe.tune_cache")
_OF_HOST = ("data.workers", "engine.threads")


def check_agreement(config: Config, rank: int, store: dist.Store) -> None:
    """Returns where this rank's options are those of rank 0; every rank calls it once.

    Other options end in a hang, in a crash, or in a training that nobody asked for.

    Args:
        store: Where the ranks of this world met.

    Raises:
        ValueError: They differ; names the first key, both values and the rank.
    """
    own = _shared(config)
    text = json.dumps(own, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if rank == 0:
        store.set(_KEY, text)
        store.set(f"{_KEY}/digest", digest)
        return
    store.wait([f"{_KEY}/digest"], timedelta(seconds=LONG_SECONDS))
    if store.get(f"{_KEY}/digest").decode() == digest:
        return
    first = json.loads(store.get(_KEY))
    # Through JSON as well, or a tuple would differ from the list that it became.
    mine = json.loads(text)
    keys = [key for key in {**first, **mine} if first.get(key) != mine.get(key)]
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    raise ValueError(
        f"{keys[0]} is {json.dumps(mine.get(keys[0]))} on rank {rank} and {json.dumps(first.get(keys[0]))} on rank 0"
        f"{more}; every rank needs the same options: does a config file differ between hosts?"
    )


def _shared(config: Config) -> dict[str, Any]:
    """Returns key -> value of what has to be the same on all ranks."""
    flat = {key: value for key, value in _flat(dataclasses.asdict(config), "") if key not in _OF_HOST}
    return flat | {key: bool(flat[key]) for key in _PATHS}


def _flat(tree: dict[str, Any], start: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _flat(value, f"{start}{name}.") if isinstance(value, dict) else [(f"{start}{name}", value)]
    return found
