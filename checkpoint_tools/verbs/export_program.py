"""Exports the network itself with torch: a torch.export program, or ONNX. The only tools that build a model.

Tokens go to experts by shapes that depend on the data, which neither kind of program can hold. So every expert
computes every token here, and the gates, zero where an expert was not chosen or was full, choose: the same
function, at experts / top_k times the multiply-accumulates of the MoE layers.
"""

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.formats.images import CLASSES, class_names, preprocessing
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.verbs.export import read_parts
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config import MoEConfig
from swin_moe.config.choices import refuse_choice
from swin_moe.config.io import config_from_tree
from swin_moe.models.attention import WindowAttention
from swin_moe.models.build import build_model
from swin_moe.models.swin import SwinTransformer
from swin_moe.moe.dispatch import Dispatched
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RAW = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class EveryExpert:
    """A Dispatcher whose shapes do not depend on the data: every expert sees every token."""

    def __init__(self, num_experts: int, *, drops: bool) -> None:
        self._num_experts, self._drops = num_experts, drops  # without drops no slot has to be counted

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See swin_moe.moe.dispatch.Dispatcher."""
        tokens = x.repeat(self._num_experts, 1)
        return Dispatched(tokens, x.shape[0], None, None, exchange=routing)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See swin_moe.moe.dispatch.Dispatcher."""
        routing = dispatched.exchange
        kept = gate * routing.keep.to(gate.dtype) if self._drops else gate
        weight_TE = kept.new_zeros((kept.shape[0], self._num_experts)).scatter_add(1, routing.expert, kept)
        return torch.einsum("te,etd->td", weight_TE, y.view(self._num_experts, -1, y.shape[1]).to(gate.dtype))


class LogitsOnly(nn.Module):
    """The network without its auxiliary loss."""

    def __init__(self, network: SwinTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        result = self.network(image)
        return result[0] if isinstance(result, tuple) else result


def build_network(source: Source, stored: dict[str, str], options: Options) -> tuple[LogitsOnly, tuple[int, int]]:
    """Returns (network in eval mode with the source's weights, image size).

    Raises:
        CheckpointError: The source does not say which network it is, or its parameters are not the network's.
    """
    if "model" not in source.config:
        raise CheckpointError(f"{source.path}: does not say which network it holds (no config); convert it with one")
    described = {"model": source.config["model"]}  # other sections need what checkpoints leave out, as data.path
    config = config_from_tree(described, source=str(source.path)).model
    if config.moe.has_blocks:
        try:
            refuse_choice(config.moe, "export")
        except ValueError as error:
            raise CheckpointError(f"{source.path}: {error}") from None
    moe = with_fixed_capacity(config.moe)
    with torch.device("meta"):
        network = build_model(dataclasses.replace(config, moe=moe))
    parameters = dict(network.named_parameters())
    for name in sorted(parameters.keys() ^ stored.keys()):
        where = "the network of its config does not have" if name in stored else "is missing, which its network needs"
        raise CheckpointError(f"{source.path}: tensor {name}: {where}")
    values = {name: read_tensor(source, stored[name], options) for name in stored}
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise CheckpointError(f"{source.path}: tensor {name}: has shape {tuple(value.shape)}, not the network's")
    network.load_state_dict(values, strict=False, assign=True)
    for module in network.modules():
        if isinstance(module, MoELayer):
            module.dispatcher = EveryExpert(moe.num_experts, drops=moe == config.moe)
        if isinstance(module, WindowAttention):
            module.path = "reference"  # plain operations, which ONNX has too
    size = config.img_size if isinstance(config.img_size, tuple) else (config.img_size, config.img_size)
    return LogitsOnly(network).eval(), size


def with_fixed_capacity(moe: MoEConfig) -> MoEConfig:
    """Returns the config with capacity by need, a number that depends on the data, as one that is always enough."""
    return moe if moe.eval_factor else dataclasses.replace(moe, eval_capacity_factor=float(moe.num_experts))


def read_tensor(source: Source, name: str, options: Options) -> Tensor:
    """Returns a whole tensor: a network has to be in memory to be exported."""
    shape, dtype = source.tensors[name]
    if dtype not in _TORCH:
        raise CheckpointError(f"{source.path}: tensor {name}: dtype {dtype} is none of {', '.join(_TORCH)}")
    tensor = torch.empty(shape, dtype=_TORCH[dtype])
    flat, done = tensor.view(-1).view(_RAW[tensor.element_size()]).numpy(), 0
    for part in read_parts(source, name, options):
        flat[done : done + part.size] = part
        done += part.size
    return tensor


def export_program(source: Source, stored: dict[str, str], options: Options, batch: int) -> Any:
    """Returns the ExportedProgram: (batch, channels, H, W) images to logits, at the size of the config.

    Args:
        batch: Images per call; 0 = any number, where the network has no experts: their tokens are counted.
    """
    network, (height, width) = build_network(source, stored, options)
    has_experts = any(isinstance(module, MoELayer) for module in network.modules())
    channels = network.network.config.in_chans
    generator = torch.Generator().manual_seed(0)
    # Any: traced with two, as torch takes a one for what is always one; compared with another number.
    traced, compared = (batch, batch) if batch else (1, 1) if has_experts else (2, 3)
    images = torch.randn(compared, channels, height, width, generator=generator, dtype=dtype_of(network))
    any_number = {"image": {0: torch.export.Dim("batch")}} if traced != compared else None
    with torch.no_grad():
        # First the network itself: its tables of positions are cached, and must not be those of a traced one.
        expected = network(images)
        program = torch.export.export(network, (images[:traced],), dynamic_shapes=any_number)
        found = program.module()(images)
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        delta = float((found - expected).abs().max())
        raise CheckpointError(f"{source.path}: the exported program differs from the network by {delta:.3g}")
    if has_experts and not batch:
        options.report(f"{source.path}: has experts, so that the program takes 1 image per call; --batch N for N")
    return program


def dtype_of(network: nn.Module) -> torch.dtype:
    """Returns the dtype of a network's parameters."""
    return next(network.parameters()).dtype


def write_program(source: Source, stored: dict[str, str], path: Path, options: Options, batch: int) -> None:
    """Writes what torch.export.load reads."""
    program = export_program(source, stored, options, batch)
    size = sum(source.tensors[name].num_bytes for name in stored.values())
    publish_files(path, size, lambda staging: torch.export.save(program, staging / path.name))


def write_onnx(source: Source, stored: dict[str, str], path: Path, options: Options, batch: int) -> None:
    """Writes an ONNX file: input `image`, output `logits`; class names and preprocessing in its metadata.

    Raises:
        ValueError: The packages that torch.onnx needs are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}")
    program = export_program(source, stored, options, batch).run_decompositions({})
    graph = program.graph_module.graph
    # Without assertions on them, slots that nobody asks for go; ONNX has no stable sort to count them with.
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    stable_sorts = [node for node in graph.nodes if node.target is torch.ops.aten.sort.stable]
    if stable_sorts:
        raise ValueError(
            "--to onnx cannot hold experts of limited capacity; export a checkpoint whose config has "
            "model.moe.eval_capacity_factor=0, or use --to torch-export"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        onnx: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"]
        )
    onnx.model.metadata_props.update(onnx_metadata(source))
    size = sum(source.tensors[name].num_bytes for name in stored.values())
    publish_files(path, size, lambda staging: onnx.save(staging / path.name))


def onnx_metadata(source: Source) -> dict[str, str]:
    """Returns what a program needs beside the graph, as text by key: JSON but for the name of the interpolation."""
    model = source.config["model"]
    found = preprocessing(source.config, tuple(model["img_size"]))
    names = class_names(source, model.get("num_classes", 0))
    content = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    return content | ({CLASSES: json.dumps(names)} if names else {})
