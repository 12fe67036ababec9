"""Frozen teachers: a network of ours from any checkpoint, or one of timm's, whole or cut over the ranks.

Shape legend: B images, H x W tokens, C channels.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from swin_moe.checkpoint import Piece, resolve, together
from swin_moe.config import ModelConfig
from swin_moe.config.io import load_config
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.engine.precision import DTYPES
from swin_moe.layout import Chunk
from swin_moe.models import build_model
from swin_moe.models.layers import widened
from swin_moe.models.swin import Block, SwinTransformer
from swin_moe.parallel.sharding import sub_chunk
from swin_moe.run.metrics import LOGGER
from swin_moe.run.session import Session
from swin_moe.tasks.base import Teacher
from swin_moe.weights.load import fill_pieces, why_refused
from swin_moe.weights.sources import open_weights

_TIMM = "timm:"


def load_teacher(session: Session) -> Teacher:
    """Returns the teacher of task.distill.teacher on this rank's device, in eval mode; says in the log what was loaded.

    Raises:
        CheckpointError: On every rank: it cannot be read, or does not fit its network.
    """
    task = session.config.task.distill
    load = _load_timm if task.teacher_model.startswith(_TIMM) else _load_ours
    teacher, report = load(session)
    LOGGER.info("teacher    %s", report)
    return teacher


class SwinTeacher:
    """A SwinTransformer: its features are the tokens of the last stage after the final norm."""

    def __init__(self, network: "_Tokens", dtype: torch.dtype) -> None:
        self.network, self.dtype, self.num_features = network, dtype, network.num_features

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """See Teacher."""
        return widened(self.network(_resized(image, self.network.img_size).to(self.dtype)))


class TimmNetwork(Protocol):
    """What timm's networks offer beside a module's members."""

    num_features: int
    pretrained_cfg: dict[str, Any]

    def forward_features(self, image: Tensor) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class TimmTeacher:
    """A network of timm's: its features are those before the pooling, without class and register tokens."""

    def __init__(self, network: TimmNetwork, dtype: torch.dtype) -> None:
        settings = network.pretrained_cfg
        self.network, self.dtype, self.num_features = network, dtype, network.num_features
        _, height, width = settings["input_size"]
        self.size = (height, width)
        self.fixed = bool(settings.get("fixed_input_size"))
        device = next(network.parameters()).device
        values = (IMAGENET_STD, IMAGENET_MEAN, settings["mean"], settings["std"])
        ours_std, ours_mean, mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in values)
        self.scale, self.shift = ours_std / std, (ours_mean - mean) / std  # from our normalization to the teacher's

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """See Teacher."""
        image = _resized(image, self.size) if self.fixed else image
        image = image * self.scale + self.shift
        feature = widened(self.network.forward_features(image.to(self.dtype)))
        if feature.ndim == 3:  # (B, tokens, C)
            feature = feature[:, getattr(self.network, "num_prefix_tokens", 0) :]
            side = round(feature.shape[1] ** 0.5)
            return feature.unflatten(1, (side, -1))
        return feature if feature.shape[-1] == self.num_features else feature.permute(0, 2, 3, 1)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the image in the teacher's size, height and width in pixels."""
    if tuple(image.shape[-2:]) == tuple(size) or not len(image):
        return image if len(image) else image.new_empty(0, image.shape[1], *size)
    return F.interpolate(image, size=tuple(size), mode="bilinear", antialias=True)


class _Tokens(nn.Module):
    """A SwinTransformer whose forward gives tokens, so that wrappers of forward work."""

    def __init__(self, backbone: SwinTransformer) -> None:
        super().__init__()
        self.encoder, self.num_features, self.img_size = backbone, backbone.num_features, backbone.img_size

    def forward(self, image: Tensor) -> Tensor:
        """Returns (B, H, W, C)."""
        return self.encoder.encode(image).tokens


def _load_ours(session: Session) -> tuple[Teacher, str]:
    task = session.config.task.distill
    dtype = DTYPES[task.teacher_precision]
    config = _model_config(task.teacher, task.teacher_model)
    with torch.device("meta"):
        network = _Tokens(build_model(replace(config, num_classes=0)))
    network.to(dtype).requires_grad_(False).eval()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if task.teacher_shard and session.groups.world is not None:
        _cut_over(session.groups.world, network, session.device)
    network.to_empty(device=session.device)
    pieces = [_piece(name, shapes[name], p) for name, p in network.named_parameters()]

    def fill() -> str:
        source = open_weights(task.teacher, key="task.distill.teacher")
        return f"{source.description}: {fill_pieces(source, pieces, network.encoder, shapes)}"

    report = together(resolve(session.groups.world), fill)
    held = sum(piece.chunk.numel for piece in pieces)
    total = sum(p.numel() for p in network.parameters())
    return SwinTeacher(network, dtype), f"{report}\n{total:,} parameters, {held:,} on this rank in {dtype}"


def _cut_over(world: ProcessGroup, network: nn.Module, device: torch.device) -> None:
    """Cuts a network over the ranks, gathered block by block where it runs."""
    # Only here: their imports take 0.7 s, a third of what a rank takes to start.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(world, device.type)
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _model_config(source: str, named: str) -> ModelConfig:
    """Returns the teacher's network: of the config named, or as its checkpoint tells."""
    if named:
        return load_config(named).model
    found = open_weights(source, key="task.distill.teacher").model_config()
    if found is None:
        raise ValueError(
            f"task.distill.teacher={source} does not tell its network; set task.distill.teacher_model to its config"
        )
    return found


def _piece(name: str, shape: tuple[int, ...], parameter: nn.Parameter) -> Piece:
    """Returns this rank's part of a parameter, a view of it."""
    whole = Chunk((0,) * len(shape), shape)
    held: Any = parameter
    if not hasattr(held, "device_mesh"):  # a DTensor has one
        return Piece(name, shape, held.dtype, whole, held.detach())
    mesh, (cut,) = held.device_mesh, held.placements
    assert cut.is_shard(), "fully_shard cuts every parameter"
    chunk = sub_chunk(whole, cut.dim, mesh.get_local_rank(), mesh.size())
    return Piece(name, shape, held.dtype, chunk, held.to_local().detach())


def _load_timm(session: Session) -> tuple[Teacher, str]:
    from swin_moe.data.torchvision_compat import import_torchvision

    import_torchvision()
    import timm

    task = session.config.task.distill
    dtype = DTYPES[task.teacher_precision]
    name, pretrained = task.teacher_model.removeprefix(_TIMM), task.teacher == "pretrained"

    def create() -> nn.Module:
        path = "" if pretrained else task.teacher
        if path and not Path(path).is_file():
            raise ValueError(f"task.distill.teacher={path}: no such file; a path, or pretrained for timm's own weights")
        try:
            return timm.create_model(name, pretrained=pretrained, checkpoint_path=path)
        except Exception as error:  # timm and torch raise many kinds, for the name as for the file
            where = f"task.distill.teacher_model={task.teacher_model}" + (
                f", task.distill.teacher={path}" if path else ""
            )
            raise ValueError(f"{where}: {why_refused(error)}") from error

    network = together(resolve(session.groups.world), create)
    network = network.to(session.device, dtype).requires_grad_(False).eval()
    total = sum(p.numel() for p in network.parameters())
    teacher = TimmTeacher(cast(TimmNetwork, network), dtype)  # timm says no more than nn.Module
    return teacher, f"timm's {name} from {task.teacher}\n{total:,} parameters in {dtype}"
