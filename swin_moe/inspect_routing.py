"""`swin-moe inspect-routing CONFIG IMAGE ...`: which expert took which patch, and which experts serve which classes."""

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swin_moe.checkpoint.errors import naming
from swin_moe.config.arguments import near_path
from swin_moe.config.choices import refuse_choice
from swin_moe.data.batch import to_device
from swin_moe.data.datasets import build_dataset
from swin_moe.data.loader import EvalLoader
from swin_moe.data.pixels import decode, read_image
from swin_moe.data.transforms import build_transform, to_rgb
from swin_moe.engine.precision import autocast
from swin_moe.models.swin import Block
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing
from swin_moe.run.metrics import LOGGER, start_logging
from swin_moe.run.routing_pictures import NOWHERE, ClassLoad, PatchMap, draw_classes, draw_patches
from swin_moe.run.session import Session, build_classifier, open_session, parse_arguments, run_main
from swin_moe.usage.texts import INSPECT_ROUTING
from swin_moe.weights.load import load_weights, open_stored


class RoutingRecorder:
    """Remembers the last forward's routing of every MoE layer, with the map of tokens it belongs to."""

    def __init__(self, model: nn.Module) -> None:
        blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, Block)]
        self.blocks = [(name, block, block.mlp) for name, block in blocks if isinstance(block.mlp, MoELayer)]
        self.grids: dict[str, tuple[int, int]] = {}
        self.valid: dict[str, Tensor | None] = {}  # (B, H * W) bool, which tokens are routed; None = all
        self.routings: dict[str, Routing] = {}

    @property
    def num_experts(self) -> int:
        """Experts of a layer, E."""
        return self.blocks[0][2].config.num_experts

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, forwards are remembered."""
        handles = []
        for name, block, layer in self.blocks:
            handles.append(block.register_forward_pre_hook(self._note_grid(name), with_kwargs=True))
            layer.observer = self._note_routing(name)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for *_, layer in self.blocks:
                layer.observer = None

    def _note_grid(self, name: str):
        def hook(block: Block, arguments: tuple, options: dict) -> None:
            given = inspect.signature(block.forward).bind(*arguments, **options).arguments
            self.grids[name] = tuple(given["x_BHWC"].shape[1:3])
            self.valid[name] = given.get("valid_BL")

        return hook

    def _note_routing(self, name: str):
        def observe(routing: Routing) -> None:
            self.routings[name] = routing

        return observe

    def patch_maps(self, image: int) -> list[PatchMap]:
        """Returns, per layer, what happened to the image of that place in the last batch; padding went nowhere."""
        maps = []
        for name, routing in self.routings.items():
            tokens = self.grids[name][0] * self.grids[name][1]
            valid = self.valid[name]
            if valid is None:
                valid = torch.ones(image + 1, tokens, dtype=torch.bool, device=routing.expert.device)
            before, own = int(valid[:image].sum()), valid[image]
            rows = slice(before, before + int(own.sum()))
            expert, kept = torch.full((tokens,), NOWHERE, device=own.device), torch.zeros_like(own)
            expert[own], kept[own] = routing.expert[rows, 0].to(expert.dtype), routing.keep[rows, 0]
            grid = self.grids[name]
            maps.append(PatchMap(name, expert.view(grid).cpu().numpy(), kept.view(grid).cpu().numpy()))
        return maps

    def load_by_class(self, target: Tensor, num_classes: int) -> dict[str, np.ndarray]:
        """Returns layer -> (E, K) pairs of the last batch by expert and class of the image; target (B,) int64."""
        found = {}
        for name, routing in self.routings.items():
            tokens = routing.expert.shape[0] // max(1, len(target))
            classes = target.to(routing.expert.device).repeat_interleave(tokens * routing.top_k)
            cell = (routing.expert.flatten() * num_classes + classes)[routing.is_pair.flatten()]
            count = torch.bincount(cell, minlength=self.num_experts * num_classes)
            found[name] = count.view(self.num_experts, num_classes).cpu().numpy()
        return found


def main(argv: list[str]) -> None:
    """Draws the routing of image files and of the validation set."""
    path, rest = parse_arguments(argv, INSPECT_ROUTING, ("--out", "--images"))
    rest, out = _take_option(rest, "--out", "")
    rest, count = _take_option(rest, "--images", "256")
    if not count.isdecimal():
        raise ValueError(f"--images must be a number of validation images, got {count!r}")
    overrides = [word for word in rest if "=" in word and not os.path.exists(word)]
    images = [word for word in rest if word not in overrides]
    missing = [name for name in images if not Path(name).is_file()]
    if missing:
        raise ValueError(
            f"no such image file: {', '.join(name or repr(name) for name in missing)}{near_path(missing[0])}"
        )
    if not images and count == "0":
        raise ValueError("nothing to draw: give image files, or --images above 0")
    session = open_session(path, overrides)
    if session.world_size > 1:
        raise ValueError(f"inspect-routing runs in one process, got {session.world_size} ranks")
    if not session.config.model.moe.has_blocks:
        raise ValueError(f"{path}: the model has no MoE layer (model.moe.blocks names none), so nothing is routed")
    refuse_choice(session.config.model.moe, "inspect-routing")
    start_logging(None, 0)
    directory = Path(out) if out else session.directory / "routing"
    directory.mkdir(parents=True, exist_ok=True)
    model = build_classifier(session)
    stored = open_stored(session)
    LOGGER.info("weights: %s", load_weights(model, session, stored))
    recorder = RoutingRecorder(model.eval())
    with recorder.recording():
        drawn = _draw_images(recorder, session, model, images, directory)
        numbers = {"num_experts": recorder.num_experts, "images": drawn}
        if int(count):
            numbers["classes"] = _draw_classes(
                recorder, session, model, int(count), directory, names=() if stored is None else stored.classes
            )
    with naming(directory / "routing.json"):
        (directory / "routing.json").write_text(json.dumps(numbers) + "\n")
    LOGGER.info("%s", directory / "routing.json")


def _take_option(words: list[str], name: str, default: str) -> tuple[list[str], str]:
    """Returns (the other words, the value after `name` or the default)."""
    if name not in words:
        return words, default
    place = words.index(name)
    if place + 1 == len(words):
        raise ValueError(f"{name} needs a value")
    return words[:place] + words[place + 2 :], words[place + 1]


@torch.inference_mode()
def _forward(session: Session, model: nn.Module, images: Tensor) -> None:
    with autocast(session.config.engine.precision, session.device):
        model(images.to(session.device, next(model.parameters()).dtype))


def _draw_images(
    recorder: RoutingRecorder, session: Session, model: nn.Module, names: Sequence[str], directory: Path
) -> dict[str, dict]:
    """Writes a picture per file; returns file -> layer -> numbers of the experts per patch."""
    config, numbers = session.config, {}
    transform = build_transform(config.data, config.model.img_size, train=False)
    targets = _picture_paths(names, directory)
    for name, target in zip(names, targets):
        pixels = transform(decode(read_image(name), name, exif=config.data.exif), 0)
        _forward(session, model, pixels[None])
        maps = recorder.patch_maps(0)
        with naming(target):
            draw_patches(to_rgb(pixels), maps, recorder.num_experts, numbered=True).save(target)
        LOGGER.info("%s", target)
        numbers[name] = {m.layer: {"expert": m.expert.tolist(), "kept": m.kept.tolist()} for m in maps}
    return numbers


def _picture_paths(names: Sequence[str], directory: Path) -> list[Path]:
    """Returns a path per image: <stem>.png, numbered where two files share a stem or one is called classes."""
    paths: list[Path] = []
    for name in names:
        path, number = directory / f"{Path(name).stem}.png", 2
        while path in paths or path.name == "classes.png":
            path, number = directory / f"{Path(name).stem}-{number}.png", number + 1
        paths.append(path)
    return paths


def _draw_classes(
    recorder: RoutingRecorder,
    session: Session,
    model: nn.Module,
    count: int,
    directory: Path,
    *,
    names: tuple[str, ...],
) -> dict[str, dict]:
    """Writes classes.png from validation images spread over the set; returns layer -> the table it shows.

    names: The checkpoint's classes, as its outputs are numbered.
    """
    config = session.config
    batch = config.data.eval_batch or config.accumulation(1)[0]
    num_classes = config.model.num_classes
    total = len(build_dataset(config.data, "val", img_size=config.model.img_size, num_classes=num_classes))
    # Rank 0 of a larger world sees every n-th image, so all classes of a set that is sorted by class.
    loader = EvalLoader(
        config.data,
        config.model.img_size,
        rank=0,
        world_size=max(1, total // count),
        batch=batch,
        num_classes=num_classes,
        classes=names,
    )
    tables: dict[str, np.ndarray] = {}
    for item in loader:
        item = to_device(item, session.device, config.engine.precision)
        if len(item["image"]):
            _forward(session, model, item["image"])
            for name, table in recorder.load_by_class(item["target"], num_classes).items():
                tables[name] = tables.get(name, 0) + table
    classes = list(loader.dataset.classes) or [str(k) for k in range(num_classes)]
    target = directory / "classes.png"
    with naming(target):
        draw_classes([ClassLoad(name, table) for name, table in tables.items()], classes).save(target)
    LOGGER.info("%s", target)
    return {name: {"classes": classes, "tokens": table.tolist()} for name, table in tables.items()}


if __name__ == "__main__":
    run_main(main)
