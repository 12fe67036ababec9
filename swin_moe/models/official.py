"""Official weights into our model: names, position-bias tables, class heads, and a report of everything done.

Rules: load_pretrained in utils.py, utils_moe.py and utils_simmim.py of microsoft/Swin-Transformer. What is neither
loaded nor explained by a rule is an error. Files of single ranks are for checkpoint_tools; here a file has all experts.

Shape legend: L tokens of an embedding, C channels.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swin_moe.models.attention import resize_bias_table
from swin_moe.models.geometric import resize_bias_table_geometric, side_of
from swin_moe.models.load_report import LoadReport, Named
from swin_moe.models.positions import fitted_positions
from swin_moe.models.swin import SwinTransformer
from swin_moe.names.official import (
    DROPPED,
    ENCODER,
    OTHER_MAPS,
    OUTSIDE,
    RENAMED,
    SIMMIM_DROPPED,
    file_key,
    is_wrapped,
)
from swin_moe.names.state_dict import find_weights, unknown_prefix

CLASSES_22K, CLASSES_1K = 21841, 1000
_LARGEST_COORDINATE = 16.0  # log2(8 x + 1) / 3 of an x beyond 1e13
_OTHER_EXPERTS = "`swin-moe checkpoint experts` makes another number of experts"


def load_official(
    model: SwinTransformer,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    *,
    interpolation: Literal["bicubic", "geometric"] | None = None,
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Returns the report of loading an official state dict; the model is changed only if everything could be loaded.

    Args:
        model: A SwinTransformer with real (not meta) parameters that holds all experts: call before `parallelize`.
        state_dict: Official tensors or {"model": tensors}: dense, SimMIM-pretrained (`encoder.`), MoE with all experts.
        strict: False: what does not fit is left out and told in the report.
        interpolation: Of bias tables of another window; None = geometric for SimMIM files, else bicubic, as official.
        grid: Height and width in tokens of the file's absolute positions; None = those of a square image.

    Raises:
        ValueError: Every unexplained missing, unexpected and mis-shaped name (strict); no state dict; a meta model;
            absolute positions that may be those of a square image or of the model's.
        TypeError: No model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_official(model, state_dict) takes a network first, got a {type(model).__name__}")
    if interpolation not in (None, "bicubic", "geometric"):
        raise ValueError(f"interpolation must be bicubic, geometric or None, got {interpolation!r}")
    tokens = None if grid is None else _grid(grid)
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("load_official needs a model with real parameters, this one is on the meta device")
    official, note = unwrap(state_dict)
    loading = _Loading(model, target, official, interpolation)
    loading.grid = tokens
    loading.fit_all(official, strict=strict)
    if note:
        loading.report.notes.append(f"read {note}")
    with torch.no_grad():
        for name, tensor in loading.new.items():
            target[name].copy_(tensor.clone() if tensor.data_ptr() == target[name].data_ptr() else tensor)
    return loading.report


def fit_weights(
    backbone: SwinTransformer,
    source: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    own_parts: bool = False,
    same_classes: bool = False,
    grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns (name -> value of every parameter that is not kept as it is; the report), by load_official's rules.

    Changes nothing, and knows of no layout: values are global, and one that fits as it is may stay on meta.

    Args:
        backbone: In a task's network, or the network itself.
        source: Official tensors, or ours of any task ("encoder." before the backbone's names where it has one).
        shapes: Global shapes of the network's parameters by names.official.file_key.
        own_parts: What belongs to a task (class head, decoder, whatever stands beside the backbone) may be missing or a
            layer of other outputs, and starts from the seed, or stand in the source alone.
        same_classes: A head of other classes is an error: weights to compute with, not to begin from.
        grid: Height and width in tokens of the source's absolute positions; None = those of a square image.

    Raises:
        ValueError: Every unexplained missing, unexpected and mis-shaped name.
    """
    target = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loading = _Loading(backbone, target, source, None)
    loading.own_parts, loading.same_classes, loading.grid = own_parts, same_classes, grid
    loading.fit_all(dict(source), strict=True)
    return {name: value for name, value in loading.new.items() if value is not target[name]}, loading.report


class _Loading:
    """The state of one load: new values by name, what does not fit, and the report. Nothing here changes the model."""

    own_parts, same_classes = False, False  # see fit_weights
    gives_maps = False  # the file's backbone has a norm for each map instead of one for its classes
    grid: tuple[int, int] | None = None

    def __init__(
        self, model: SwinTransformer, target: dict[str, Tensor], names: Collection[str], interpolation: str | None
    ) -> None:
        self.model, self.target = model, target
        self.wrapped, self.simmim = is_wrapped(names), any(name.startswith(ENCODER) for name in names)
        self.interpolation = interpolation or ("geometric" if self.simmim else "bicubic")
        self.new: dict[str, Tensor] = {}
        self.problems: Named = []
        self.experts_told: dict[str, int] = {}  # by block, as the file says it beside its tensors
        self.report = LoadReport()

    def fit_all(self, official: dict[str, Tensor], *, strict: bool) -> None:
        """Fills `new` from the file; raises ValueError for what no rule explains (strict)."""
        source = self.rename(official)
        self.fit_head(source)
        self.fit(source)
        windows = self.trained_windows(official)
        if strict and self.problems:
            listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.problems))
            raise ValueError(f"weights do not fit the model ({len(self.problems)} tensors): {listed}")
        self.note_windows(windows)

    def rename(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under our names, without those that a rule drops."""
        source: dict[str, Tensor] = {}
        for key, value in official.items():
            name = file_key(key, wrapped=self.wrapped)
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            if name in source:
                self.problems.append((key, f"stands for {name}, which is in the file twice"))
            if name.endswith("_num_global_experts"):
                self._check_experts(name, value)
            maps = OTHER_MAPS if self.own_parts and not name.startswith(OUTSIDE) else ()  # a task may call its own so
            rules = DROPPED + (SIMMIM_DROPPED if self.simmim else ()) + maps
            self.gives_maps = self.gives_maps or name.startswith("norm0.")
            known = (reason for pattern, reason in rules if re.search(pattern, name.removeprefix(OUTSIDE)))
            reason = next(known, "only for the task it was trained for" if name.startswith(OUTSIDE) else "")
            if name in self.target or not reason:
                source[name] = value
            else:
                self.report.dropped.append((key, reason))
        return source

    def _check_experts(self, name: str, value: Tensor) -> None:
        experts = self.target.get(name.replace("_moe_layer._num_global_experts", "experts.fc1_weight"))
        self.experts_told[name.partition(".mlp.")[0]] = int(value)
        if experts is not None and int(value) != experts.shape[0]:
            wrong = f"{int(value)} experts in the file, {experts.shape[0]} in the model; {_OTHER_EXPERTS}"
            self.problems.append((name, wrong))

    def fit_head(self, source: dict[str, Tensor]) -> None:
        """Takes the class head out of `source` where the classes differ from the model's, or one has none."""
        names = ("head.weight", "head.bias")
        if not all(name in self.target for name in names):
            for name in names:
                if source.pop(name, None) is not None:
                    self.report.dropped.append((name, "the model has no head"))
            return
        if self.simmim and not any(name in source for name in names):
            self.report.reinitialized += [(name, "no head in the file: kept as it is") for name in names]
            self.new |= {name: self.target[name] for name in names}
            return
        if not all(name in source for name in names):
            return
        old, new = len(source["head.bias"]), len(self.target["head.bias"])
        same_width = source["head.weight"].shape[1:] == self.target["head.weight"].shape[1:]
        if old == new or len(source["head.weight"]) != old or not same_width:
            return
        if self.same_classes and (old, new) != (CLASSES_22K, CLASSES_1K):
            told = f"{old} classes in the file, {new} in the model; set model.num_classes={old}"
            self.problems.append(("head", told))
        for name in names:
            value = source.pop(name)
            if (old, new) == (CLASSES_22K, CLASSES_1K):
                self.new[name] = value[torch.tensor(read_class_map(), device=value.device)]
                self.report.interpolated.append((name, f"{old} to {new} classes by map22kto1k.txt"))
            else:
                self.new[name] = torch.zeros(self.target[name].shape)
                self.report.reinitialized.append((name, f"{old} classes in the file, {new} in the model: set to zero"))

    def fit(self, source: dict[str, Tensor]) -> None:
        """Fills `new` from `source`, name by name."""
        for name, want in self.target.items():
            if name in self.new:
                continue
            if name not in source:
                self._missing(name)
                continue
            if self._has_other_outputs(name, source[name], want):
                told = (name.removeprefix(OUTSIDE), "of other classes than the file's: begins from the seed")
                self.report.reinitialized.append(told)
                continue
            try:
                self.new[name], rule = self._fitted(name, source[name], want)
            except ValueError as error:
                self._problem(name, str(error), self.report.reinitialized)
                continue
            if rule:
                self.report.interpolated.append((name, rule))
            else:
                self.report.loaded.append(name.removeprefix(OUTSIDE))
        for name in source:
            if name not in self.target:
                self._problem(name, "unexpected: the model has no such parameter", self.report.dropped)

    def _missing(self, name: str) -> None:
        if name.endswith("mlp.experts.fc2_bias") and not self.model.config.mlp_fc2_bias:
            self.report.reinitialized.append((name, "not in the file and not trained: kept at zero"))
        elif self.own_parts and (name.startswith(OUTSIDE) or name.partition(".")[0] in self._task_parts()):
            self.report.reinitialized.append((name.removeprefix(OUTSIDE), "not in the file: begins from the seed"))
        else:
            self._problem(name, "missing in the file", self.report.reinitialized)

    def _has_other_outputs(self, name: str, value: Tensor, want: Tensor) -> bool:
        """Returns whether a layer beside the backbone, where a task's parts may begin anew, has more or fewer outputs
        in the file and is the same else."""
        same = value.ndim == want.ndim and value.shape[1:] == want.shape[1:]
        return self.own_parts and name.startswith(OUTSIDE) and same and value.shape != want.shape

    def _task_parts(self) -> tuple[str, ...]:
        return self.model.task_parts + (("norm",) if self.gives_maps else ())

    def _problem(self, name: str, reason: str, told: Named) -> None:
        name = name.removeprefix(OUTSIDE)
        self.problems.append((name, reason))
        told.append((name, reason))

    def _fitted(self, name: str, value: Tensor, want: Tensor) -> tuple[Tensor, str]:
        """Returns the value in the shape wanted and the rule used ("" = none); raises ValueError if none fits."""
        if not value.is_floating_point():
            raise ValueError(f"holds {value.dtype}, not floating-point numbers")
        if ".mlp.experts." in name and value.ndim == 3 and want.ndim == 2 and value.shape[1] == 1:
            value = value.squeeze(1)  # early Tutel: biases (E, 1, H)
        if name.endswith("mlp.experts.fc2_bias") and not self.model.config.mlp_fc2_bias and _holds_numbers(value):
            # The official module holds a frozen bias and loads whatever stands there; its output includes it.
            self.report.notes.append(f"{name} is not zero although model.mlp_fc2_bias=false; loaded and frozen")
        if value.shape == want.shape and not (name == "absolute_pos_embed" and self._is_of_another_grid(value)):
            return value, ""
        if name.endswith("relative_position_bias_table") and value.ndim == 2 and value.shape[1] == want.shape[1]:
            old, new = side_of(value.shape[0]), side_of(want.shape[0])
            resize = resize_bias_table_geometric if self.interpolation == "geometric" else resize_bias_table
            rule = f"{self.interpolation}, {old} x {old} to {new} x {new} offsets"
            return resize(value.float(), (new + 1) // 2), rule
        if name == "absolute_pos_embed" and value.ndim in (3, 4):
            return fitted_positions(value, want, old=self.grid, new=self.model.grid)
        hint = ""
        if ".mlp.experts." in name and self.experts_told.get(name.partition(".mlp.")[0]) == want.shape[0]:
            hint = "; a file of one rank? give all of them by their path without .rank0"
        elif ".mlp.experts." in name and value.shape[1:] == want.shape[1:]:
            hint = f"; {_OTHER_EXPERTS}"
        raise ValueError(f"shape {tuple(value.shape)} in the file, {tuple(want.shape)} in the model{hint}")

    def _is_of_another_grid(self, value: Tensor) -> bool:
        """Returns whether as many positions as the model's are known to be those of another image: 8 x 32, 16 x 16.

        Raises ValueError where they may be, and nothing tells.
        """
        if value.ndim != 3:  # (1, C, H, W) tells its own
            return False
        height, width = self.model.grid
        square = math.isqrt(value.shape[1])
        if self.grid is None and height != width and square * square == value.shape[1]:
            raise ValueError(
                f"{value.shape[1]} positions are of {square} x {square} or of {height} x {width} tokens, and the file "
                f"does not say which; give load_official grid=({height}, {width}) or ({square}, {square}), or convert "
                "the file with --set img_size=H,W"
            )
        return self.grid is not None and self.grid != self.model.grid

    def trained_windows(self, official: dict[str, Tensor]) -> dict[tuple[int, str], int]:
        """Returns (stage, name of the attention) -> the window that offsets were divided by in training.

        The official buffer relative_coords_table (1, 2w-1, 2w-1, 2) tells both: its side the window, its largest value
        log2(8 (w - 1) / (p - 1) + 1) / 3 the window p. A table that no window gives is a problem.
        """
        found: dict[tuple[int, str], int] = {}
        for key, table in official.items():
            match = re.search(r"(layers\.(\d+)\.blocks\.\d+\.attn)\.relative_coords_table$", key)
            if not match or table.ndim != 4 or table.shape[1] < 3:
                continue
            window, largest = (table.shape[1] + 1) // 2, float(table.max())
            if not 0 < largest < _LARGEST_COORDINATE:  # also false for NaN
                allowed = f"where a table's is above 0 and below {_LARGEST_COORDINATE:g}"
                self.problems.append((key, f"its largest number is {largest:g}, {allowed}"))
                continue
            found[int(match[2]), match[1]] = round(8 * (window - 1) / (2 ** (3 * largest) - 1) + 1)
        return found

    def note_windows(self, trained: dict[tuple[int, str], int]) -> None:
        """Notes bias networks that were trained for other coordinates than the model will ask them for."""
        modules = dict(self.model.named_modules())
        asked = {name: getattr(modules.get(name), "pretrained_window", None) for _, name in trained}
        known = {place: window for place, window in trained.items() if asked[place[1]] is not None}
        if any(window != asked[name] for (_, name), window in known.items()):
            found = {stage: window for (stage, _), window in known.items()}
            windows = [found.get(stage, 0) for stage in range(max(found) + 1)]
            self.report.notes.append(
                f"the position biases were trained with windows {windows}, the model reads them with others; "
                f"build it with pretrained_window_sizes={windows}, as the official fine-tuning configs do"
            )


def read_class_map() -> list[int]:
    """Returns the ImageNet-22K class of each of the 1000 ImageNet-1K classes (official data/map22kto1k.txt)."""
    path = Path(__file__).parent.parent / "data" / "map22kto1k.txt"
    return [int(line) for line in path.read_text(encoding="ascii").split()]


def unwrap(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Returns (the tensors of an official file, out of what a training loop wrapped around them; how they were read).

    Averages are taken where the file has them, as of our own checkpoints.

    Raises:
        ValueError: It is no state dict of a Swin network, or its names have an unknown prefix.
    """
    try:
        found = find_weights(state_dict, lambda value: isinstance(value, Tensor))
        if clause := unknown_prefix(found.records):
            raise ValueError(clause)
    except ValueError as error:
        raise ValueError(f"not an official state dict: {error}") from None
    return {**found.records, **found.averaged}, found.note


def _grid(given: Any) -> tuple[int, int]:
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else ()
    if len(values) != 2 or any(type(value) is not int or value < 1 for value in values):
        raise ValueError(f"grid must be two whole numbers >= 1, height and width in tokens, got {given!r}")
    return values


def _holds_numbers(value: Tensor) -> bool:
    """Returns whether any element is not zero; unknown of a tensor on meta, which is ours and tells the truth."""
    return not value.is_meta and bool(value.count_nonzero())
