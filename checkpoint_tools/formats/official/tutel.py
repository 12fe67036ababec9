"""What Tutel's offline tools make: one gathered file of all experts, and the rank files scattered from it.

`python -m tutel.checkpoint.gather` writes one state dict; `scatter` one per rank, which are official rank files but for
wrong shapes where ranks share an expert (microsoft/Tutel, tutel/checkpoint/*.py). Neither tool carries an optimizer
over correctly: what is there belongs to the last rank, and is left out.
"""

from pathlib import Path

from checkpoint_tools.formats.official.ranks import detect as detect_ranks
from checkpoint_tools.formats.official.ranks import open_files, write_official_moe
from checkpoint_tools.formats.official.read import assemble
from checkpoint_tools.formats.official.single import publish_content
from checkpoint_tools.formats.official.write import OfficialContent
from checkpoint_tools.formats.state_dict import open_file, peek
from checkpoint_tools.sources.base import Options, Source


def detect(path: Path) -> bool:
    """See formats/__init__.py: one file that holds experts."""
    return any("._moe_layer.experts." in name for name in peek(path))


def open_tutel(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the gathered file `path`, or in the scattered files `path`.rank<r>."""
    if path.is_file() or not detect_ranks(path):
        return assemble("tutel", path, [open_file(path)], None, options, optimizer=False)
    ranks, shared = open_files(path)
    return assemble("tutel", path, ranks, shared, options, optimizer=False)


def write_tutel(source: Source, path: Path, options: Options) -> None:
    """Writes one gathered file, or with --world the rank files, both without optimizer; shapes are the true ones."""
    if options.world:
        write_official_moe(source, path, options, optimizer=False)
    else:
        publish_content(OfficialContent(source, options, optimizer=False), path, options)
