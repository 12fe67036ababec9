"""Whether two checkpoints compute the same: both networks run on the same random images. Needs torch."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.verbs.text import format_bytes
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.names.official import is_dense_task

IMAGES = 2
TOLERANCE = 1e-4  # of the largest logit: rounding of float32 through a network


def report_difference(before: Source, path: Path, options: Options, *, exact: bool, config: Mapping[str, Any]) -> None:
    """Says how much the logits of the new checkpoint at `path` differ from those of the old one, on random images.

    Networks that do not fit Options.max_memory together, whose configuration is not complete, or that find objects or
    label maps, are not run, and that is said.

    Args:
        exact: Whether they should be equal.

    Raises:
        CheckpointError: They should be and are not.
    """
    if options.comm.rank:
        return
    with open_source(path, options) as after:
        weights = (t.num_bytes for s in (before, after) for n, t in s.tensors.items() if split_kind(n)[0] == "weight")
        total = sum(weights)
        missing = [key for key in ("img_size", "window_size") if key not in config.get("model", {})]
        other = is_dense_task(before.tensors)
        if total > options.max_memory or missing or other:
            why = f"{' and '.join(missing)} are unknown" if missing else f"they take {format_bytes(total)}"
            why = "they are detectors or segmentors, of which none is run here" if other else why
            options.report(f"{path}: not compared with the network it came from: {why}")
            return
        difference, largest = compare(before, after, config, options)
    text = f"logits differ by {difference:.3g} of {largest:.3g} on {IMAGES} random images"
    if exact and not difference <= TOLERANCE * largest:
        raise CheckpointError(f"{path}: should compute what {before.path} does, but {text}; the file was kept")
    options.report(f"{path}: {'the same function' if exact else 'another function'}: {text}")


def compare(before: Source, after: Source, config: Mapping[str, Any], options: Options) -> tuple[float, float]:
    """Returns (largest difference of the logits, or of the last features without a head; the largest of them)."""
    import torch

    from checkpoint_tools.verbs.export_program import build_network

    outputs = []
    for source, own in ((before, config), (after, after.config)):
        names = {name: name for name in source.tensors if split_kind(name)[0] == "weight"}
        described = copy.copy(source)
        described.config = {"model": own["model"]}
        network, size = build_network(described, names, options)
        generator = torch.Generator().manual_seed(0)
        image = torch.randn((IMAGES, own["model"].get("in_chans", 3), *size), generator=generator)
        with torch.no_grad():
            outputs.append(network(image).double())
        del network
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].abs().max())
