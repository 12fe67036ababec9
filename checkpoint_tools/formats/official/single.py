"""The official `.pth` of one process: weights, and in training files the optimizer; experts where one process has all.

Masks, indices and coordinate tables are dropped when read, as the network computes them, and built when written, so
that the official code loads the file strictly.
"""

from pathlib import Path

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.torch_writer import num_bytes, write_torch
from checkpoint_tools.formats.official.read import assemble
from checkpoint_tools.formats.official.write import OfficialContent
from checkpoint_tools.formats.state_dict import open_file, peek
from checkpoint_tools.sources.base import Options, Source


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    names = peek(path)
    return "patch_embed.proj.weight" in names and not any(name.startswith("head.fc.") for name in names)


def open_official(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    return assemble("official", path, [open_file(path)], None, options)


def write_official(source: Source, path: Path, options: Options) -> None:
    """Writes one file with weights, buffers and, where there is any, optimizer state; see formats/__init__.py.

    --set img_size=N, window_size=N: where the source does not tell them. --set counts=no: see official_moe.py.
    """
    publish_content(OfficialContent(source, options), path, options)


def publish_content(content: OfficialContent, path: Path, options: Options) -> None:
    """Writes the one file of a world of one rank; rank 0 writes, every rank calls it."""
    whole = {"model": content.model(0), **content.training(0)}

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            write_torch(staging / path.name, whole, box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(whole), write, comm=options.comm)


def plan_official(source: Source, path: Path, options: Options) -> dict[str, int]:
    """Returns the file that write_official would make, with about its bytes."""
    content = OfficialContent(source, options)
    return {path.name: num_bytes({"model": content.model(0), **content.training(0)})}
