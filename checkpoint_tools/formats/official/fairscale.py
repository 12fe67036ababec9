"""What FairScale users save: {"model": state dict, "optimizer": OSS.state_dict()} after consolidate_state_dict.

OSS gathers the whole optimizer state into the layout of a torch optimizer, parameters by number
(facebookresearch/fairscale, fairscale/optim/oss.py:state_dict). Numbers are given in the order of one group of all
parameters, or of one with and one without weight decay; every moment's shape is compared with its parameter's. Names
are ours or official; experts lie in one file, or in `<path>.rank<r>` where ranks hold their own.
"""

from pathlib import Path

from checkpoint_tools.formats.official.ranks import detect as detect_ranks
from checkpoint_tools.formats.official.ranks import open_files
from checkpoint_tools.formats.official.read import assemble
from checkpoint_tools.formats.official.single import publish_content
from checkpoint_tools.formats.official.write import OfficialContent
from checkpoint_tools.formats.state_dict import open_file, peek
from checkpoint_tools.sources.base import Options, Source


def detect(path: Path) -> bool:
    """See formats/__init__.py: our names of experts; a dense file is the same as an official one."""
    return any(".mlp.experts.fc1_weight" in name for name in peek(path))


def open_fairscale(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`, or in its rank files; see formats/__init__.py."""
    if path.is_file() or not detect_ranks(path):
        return assemble("fairscale", path, [open_file(path)], None, options)
    return assemble("fairscale", path, *open_files(path), options)


def write_fairscale(source: Source, path: Path, options: Options) -> None:
    """Writes one file with our names, whose optimizer OSS.load_state_dict takes; see formats/__init__.py."""
    publish_content(OfficialContent(source, options, rules=(), buffers=False), path, options)
