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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.formats.images import CLASSES, class_names, preprocessing
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.verbs.export import read_parts
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config import MoEConfig
from swin_moe.config.choices import CHOICES, refuse_choice
from swin_moe.config.io import config_from_tree
from swin_moe.models.attention import WindowAttention
from swin_moe.models.build import build_model
from swin_moe.models.swin import SwinTransformer
from swin_moe.moe.dispatch import Dispatched
from swin_moe.moe.experts import GroupedExperts
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing
from swin_moe.names.official import is_dense_task

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_TOKENS = 2**17  # of an expert in one call, up to which capacities are compared
_RAW = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class EveryExpert(nn.Module):
    """Takes the place of a layer's experts: every one computes every token."""

    def __init__(self, experts: GroupedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor, counts: Any, dropout: Any, slices: Any) -> Tensor:
        """Returns (E, T, D). The three other arguments of GroupedExperts are not for evaluation in one process."""
        own = self.experts
        x_ETD = x_TD.expand(own.num_experts, *x_TD.shape)
        hidden = F.gelu(torch.baddbmm(own.fc1_bias[:, None], x_ETD, own.fc1_weight.transpose(1, 2)))
        return torch.baddbmm(own.fc2_bias[:, None], hidden, own.fc2_weight)


class EveryToken:
    """A Dispatcher of whole batches, whose shapes do not depend on the data; the gates say what counts.

    Args:
        drops: Whether experts are ever full; without, no slot has to be counted.
    """

    def __init__(self, num_experts: int, *, drops: bool) -> None:
        self._num_experts, self._drops = num_experts, drops

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See swin_moe.moe.dispatch.Dispatcher."""
        return Dispatched(x, x.shape[0], None, None, exchange=routing)

    def combine(self, y_ETD: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See swin_moe.moe.dispatch.Dispatcher; y is what EveryExpert returns."""
        routing = dispatched.exchange
        kept = gate * routing.keep.to(gate.dtype) if self._drops else gate
        weight_TE = kept.new_zeros((kept.shape[0], self._num_experts)).scatter_add(1, routing.expert, kept)
        return torch.einsum("te,etd->td", weight_TE, y_ETD.to(gate.dtype))


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
    if is_dense_task(stored):
        raise CheckpointError(
            f"{source.path}: is of a detector or segmentor, and only classifiers are exported as programs; --to "
            f"safetensors writes its weights"
        )
    described = {"model": source.config["model"]}  # other sections need what checkpoints leave out, as data.path
    config = config_from_tree(described, source=str(source.path)).model
    if config.moe.has_blocks:
        try:
            refuse_choice(config.moe, "export")
        except ValueError as error:
            raise CheckpointError(f"{source.path}: {error}") from None
    moe = of_fixed_shapes(config.moe)
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
            module.dispatcher = EveryToken(moe.num_experts, drops=bool(config.moe.eval_factor))
            module.add_module("experts", EveryExpert(module.experts))
        if isinstance(module, WindowAttention):
            module.path = "reference"  # plain operations, which ONNX has too
    size = config.img_size if isinstance(config.img_size, tuple) else (config.img_size, config.img_size)
    return LogitsOnly(network).eval(), size


def of_fixed_shapes(moe: MoEConfig) -> MoEConfig:
    """Returns the config of the same logits whose shapes follow from the number of images alone.

    Capacity by need, which depends on the data, becomes one that is always enough; then nobody competes for slots, so
    that all tokens may be one routing group. Losses go: what they sum over groups would be one graph per group.
    """
    moe = dataclasses.replace(moe, balance_loss="none", z_loss_weight=0.0)
    if moe.choice == "expert" or moe.eval_factor:
        return moe
    return dataclasses.replace(moe, eval_capacity_factor=float(moe.num_experts), capacity_scope="rank", group_images=1)


def why_fixed(moe: MoEConfig) -> str:
    """Returns why a program cannot take any number of images, or ""."""
    if not moe.has_blocks:
        return ""
    if moe.choice not in CHOICES:
        return f"what model.moe.choice={moe.choice} does with other numbers is not known"
    competes = moe.choice == "token" and moe.eval_factor and moe.capacity_scope == "images"
    if competes and moe.group_images > 1:
        return f"{moe.group_images} images share the slots of an expert (model.moe.group_images)"
    return ""


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
        batch: Images per call; 0 = any number, or 1 where that cannot be (why_fixed).
    """
    network, (height, width) = build_network(source, stored, options)
    config = network.network.config
    reason = "" if batch else why_fixed(config.moe)
    generator = torch.Generator().manual_seed(0)
    # Any: traced with two, as torch takes a one for what is always one; compared with other numbers too.
    traced, *others = (batch,) if batch else (1,) if reason else (2, 1, 5)
    shape = (max(traced, *others, 0), config.in_chans, height, width)
    images = torch.randn(shape, generator=generator, dtype=dtype_of(network))
    any_number = {"image": {0: torch.export.Dim("batch", min=1)}} if others else None
    with torch.no_grad():
        # First the network itself: its tables of positions are cached, and must not be those of a traced one.
        expected = {count: network(images[:count]) for count in (traced, *others)}
        program = torch.export.export(network, (images[:traced].clone(),), dynamic_shapes=any_number)
        for count, logits in expected.items():
            found = program.module()(images[:count])
            if not torch.allclose(found, logits, rtol=1e-4, atol=1e-5):
                delta = float((found - logits).abs().max())
                raise CheckpointError(
                    f"{source.path}: the exported program differs from the network by {delta:.3g} at {count} images"
                )
    if reason:
        options.report(f"{source.path}: {reason}, so that the program takes 1 image per call; --batch N for N")
    return program


def dtype_of(network: nn.Module) -> torch.dtype:
    """Returns the dtype of a network's parameters."""
    return next(network.parameters()).dtype


def write_program(source: Source, stored: dict[str, str], path: Path, options: Options, batch: int) -> None:
    """Writes what torch.export.load reads."""
    program = export_program(source, stored, options, batch)
    size = sum(source.tensors[name].num_bytes for name in stored.values())

    def write(staging: Path) -> None:
        with open(staging / path.name, "wb") as file:  # torch warns of paths that do not end in .pt2
            torch.export.save(program, file)

    publish_files(path, size, write)
    if path.suffix != ".pt2":
        options.report(f"{path}: torch.export.load warns of names that do not end in .pt2")


def write_onnx(source: Source, stored: dict[str, str], path: Path, options: Options, batch: int) -> None:
    """Writes an ONNX file: input `image`, output `logits`; class names and preprocessing in its metadata.

    Raises:
        ValueError: The packages that torch.onnx needs are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code, when a program is made, too
        onnx = _to_onnx(export_program(source, stored, options, batch).run_decompositions({}))
    onnx.model.metadata_props.update(onnx_metadata(source))
    size = sum(source.tensors[name].num_bytes for name in stored.values())
    publish_files(path, size, lambda staging: onnx.save(staging / path.name))


def _to_onnx(program: torch.export.ExportedProgram) -> Any:
    """Returns the program as torch.onnx's; changes it."""
    graph = program.graph_module.graph
    # Without assertions on them, slots that nobody asks for go.
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=torch.sym_float):
        for factor in (value for user in node.users for value in user.args if isinstance(value, float)):
            check_factor(factor)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sort.stable):
        _sort_as_onnx(graph, node)
    return torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"])


def check_factor(factor: float) -> None:
    """Raises ValueError where a capacity of so many times the tokens of an expert is another one in float32, which ONNX
    computes it in."""
    tokens = np.arange(1, _MOST_TOKENS)
    exact = (factor * tokens).astype(np.int64)
    found = (np.float32(factor) * tokens.astype(np.float32)).astype(np.int64)
    if (exact != found).any():
        at = int((exact != found).argmax())
        raise ValueError(
            f"--to onnx computes capacities in single precision, where model.moe.eval_capacity_factor={factor} gives "
            f"{found[at]} slots for {tokens[at]} tokens of an expert, not {exact[at]}; give --batch N"
        )


def _sort_as_onnx(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Replaces a stable sort by what becomes TopK, which puts the lower one of equals first: stable by definition."""
    value, *rest = node.args
    names = ("stable", "dim", "descending")
    given = dict(zip(names, (*rest, *[None] * 3))) | dict(node.kwargs)
    with graph.inserting_before(node):
        arguments = (value, -1 if given["dim"] is None else given["dim"], bool(given["descending"]))
        plain = graph.call_function(torch.ops.aten.sort.default, arguments)
    plain.meta = dict(node.meta)
    node.replace_all_uses_with(plain)
    graph.erase_node(node)


def onnx_metadata(source: Source) -> dict[str, str]:
    """Returns what a program needs beside the graph, as text by key: JSON but for the name of the interpolation."""
    model = source.config["model"]
    found = preprocessing(source.config, tuple(model["img_size"]))
    names = class_names(source, model.get("num_classes", 0))
    content = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    return content | ({CLASSES: json.dumps(names)} if names else {})
