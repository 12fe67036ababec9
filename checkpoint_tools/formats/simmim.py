"""SimMIM's pre-training files: the official layout with every name of the encoder behind `encoder.`

Read for fine-tuning by default: names without the prefix, mask token and decoder dropped, as the official fine-tuning
does (microsoft/Swin-Transformer, utils_simmim.py:load_pretrained). --set encoder=keep keeps them all, for pre-training.
Files of MoBY have the prefix too: of them the encoder is read.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from checkpoint_tools.formats.official import publish_content
from checkpoint_tools.official_read import assemble
from checkpoint_tools.official_write import OfficialContent
from checkpoint_tools.rules import FROM_MOBY, FROM_OFFICIAL, FROM_SIMMIM, MOBY_PARTS, TO_SIMMIM
from checkpoint_tools.source import Options, Source
from checkpoint_tools.state_dict_files import open_file, peek, state_dict
from swin_moe.checkpoint.errors import CheckpointError


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    return "encoder.patch_embed.proj.weight" in peek(path)


def open_simmim(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    kept = options.extra.get("encoder", "strip")
    if kept not in ("strip", "keep"):
        raise CheckpointError(f"--set encoder must be strip or keep, got {kept!r}")
    file = open_file(path)
    if not is_moby(state_dict(file.content, path)):
        rules = FROM_OFFICIAL if kept == "keep" else FROM_SIMMIM
        return assemble("simmim", path, [file], None, options, rules=rules)
    if kept == "keep":
        raise CheckpointError(f"{path}: is a file of MoBY, of which only the encoder is read; leave out --set encoder")
    options.report(f"{path}: a file of MoBY: its momentum network, heads, queue and optimizer are left out")
    return assemble("simmim", path, [file], None, options, rules=FROM_MOBY, optimizer=False)


def is_moby(names: Iterable[str]) -> bool:
    """Returns whether tensors of these names are of a file of MoBY."""
    return any(re.search(MOBY_PARTS, name) for name in names)


def write_simmim(source: Source, path: Path, options: Options) -> None:
    """Writes one file; names that lack it get the prefix. See formats/__init__.py."""
    publish_content(OfficialContent(source, options, rules=TO_SIMMIM, prefix="encoder."), path, options)
