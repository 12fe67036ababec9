"""Official weights into our model: names, position-bias tables, class heads, and a report of everything done.

Rules: load_pretrained in utils.py, utils_moe.py and utils_simmim.py of microsoft/Swin-Transformer. What is neither
loaded nor explained by a rule is an error. Files of single ranks are for checkpoint_tools; here a file has all experts.

Shape legend: L offsets of a bias table or tokens of an embedding, H heads, S source and T target positions, C channels.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.attention import resize_bias_table
from swin_moe.official_names import DROPPED, PRETRAINING_DROPPED, RENAMED, TASK_PARTS

Named = list[tuple[str, str]]  # (parameter name, reason)

CLASSES_22K, CLASSES_1K = 21841, 1000


@dataclass
class LoadReport:
    """What became of every tensor; `print` shows a line per reason.

    Attributes:
        loaded: Parameters copied as they are.
        interpolated: Parameters copied in another shape, and by which rule.
        dropped: Tensors of the file without a place in the model.
        reinitialized: Parameters the file did not fill.
        notes: Advice in whole sentences.
    """

    loaded: list[str] = field(default_factory=list)
    interpolated: Named = field(default_factory=list)
    dropped: Named = field(default_factory=list)
    reinitialized: Named = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns the report as text, a line per reason."""
        lines = [f"loaded {len(self.loaded)} tensors"]
        for title in ("interpolated", "dropped", "reinitialized"):
            reasons: dict[str, list[str]] = {}
            for name, reason in getattr(self, title):
                reasons.setdefault(reason, []).append(name)
            lines += [f"{title} {_some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def load_official(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    *,
    interpolation: Literal["bicubic", "geometric"] | None = None,
) -> LoadReport:
    """Returns the report of loading an official state dict; the model is changed only if everything could be loaded.

    Args:
        model: A SwinTransformer with real (not meta) parameters that holds all experts: call before `parallelize`.
        state_dict: Official tensors or {"model": tensors}: dense, SimMIM-pretrained (`encoder.`), MoE with all experts.
        strict: False: what does not fit is left out and told in the report.
        interpolation: Of bias tables of another window; None = geometric for SimMIM files, else bicubic, as official.

    Raises:
        ValueError: Every unexplained missing, unexpected and mis-shaped name (strict); no state dict; a meta model.
        TypeError: No model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_official(model, state_dict) takes a network first, got a {type(model).__name__}")
    if interpolation not in (None, "bicubic", "geometric"):
        raise ValueError(f"interpolation must be bicubic, geometric or None, got {interpolation!r}")
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("load_official needs a model with real parameters, this one is on the meta device")
    official = unwrap(state_dict)
    simmim = any(name.startswith("encoder.") for name in official)
    loading = _Loading(model, target, simmim, interpolation or ("geometric" if simmim else "bicubic"))
    loading.fit_all(official, strict=strict)
    with torch.no_grad():
        for name, tensor in loading.new.items():
            target[name].copy_(tensor.clone() if tensor.data_ptr() == target[name].data_ptr() else tensor)
    return loading.report


def fit_weights(
    backbone: nn.Module, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, own_parts: bool = False
) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns (name -> value of every parameter that is not kept as it is; the report), by load_official's rules.

    Changes nothing, and knows of no layout: values are global, and one that fits as it is may stay on meta.

    Args:
        backbone: The SwinTransformer in a task's network, or the network itself.
        source: Official tensors, or ours of any task ("encoder." before the backbone's names where it has one).
        shapes: Global shapes of the network's parameters by name, without "encoder.".
        own_parts: What belongs to a task (class head, decoder, ...) may be missing, and starts from the seed.

    Raises:
        ValueError: Every unexplained missing, unexpected and mis-shaped name.
    """
    target = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    simmim = any(name.startswith("encoder.") for name in source)
    loading = _Loading(backbone, target, simmim, "geometric" if simmim else "bicubic", own_parts=own_parts)
    loading.fit_all(dict(source), strict=True)
    return {name: value for name, value in loading.new.items() if value is not target[name]}, loading.report


class _Loading:
    """The state of one load: new values by name, what does not fit, and the report. Nothing here changes the model."""

    def __init__(
        self, model: nn.Module, target: dict[str, Tensor], simmim: bool, interpolation: str, *, own_parts: bool = False
    ) -> None:
        self.model, self.target, self.simmim, self.interpolation = model, target, simmim, interpolation
        self.own_parts = own_parts
        self.new: dict[str, Tensor] = {}
        self.problems: Named = []
        self.report = LoadReport()

    def fit_all(self, official: dict[str, Tensor], *, strict: bool) -> None:
        """Fills `new` from the file; raises ValueError for what no rule explains (strict)."""
        source = self.rename(official)
        self.fit_head(source)
        self.fit(source)
        if strict and self.problems:
            listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.problems))
            raise ValueError(f"weights do not fit the model ({len(self.problems)} tensors): {listed}")
        self.note_windows(official)

    def rename(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under our names, without those that a rule drops."""
        source: dict[str, Tensor] = {}
        for key, value in official.items():
            name = key.removeprefix("encoder.")
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            if name in source:
                self.problems.append((key, f"stands for {name}, which is in the file twice"))
            if name.endswith("_num_global_experts"):
                self._check_experts(name, value)
            rules = DROPPED + (PRETRAINING_DROPPED if self.simmim else ())
            reason = next((reason for pattern, reason in rules if re.search(pattern, name)), "")
            if name in self.target or not reason:
                source[name] = value
            else:
                self.report.dropped.append((key, reason))
        return source

    def _check_experts(self, name: str, value: Tensor) -> None:
        experts = self.target.get(name.replace("_moe_layer._num_global_experts", "experts.fc1_weight"))
        if experts is not None and int(value) != experts.shape[0]:
            self.problems.append((name, f"{int(value)} experts in the file, {experts.shape[0]} in the model"))

    def fit_head(self, source: dict[str, Tensor]) -> None:
        """Takes the class head out of `source` where the classes differ from the model's, or one has none."""
        names = ("head.weight", "head.bias")
        if not all(name in self.target for name in names):
            for name in names:
                if source.pop(name, None) is not None:
                    self.report.dropped.append((name, "the model has no head"))
            return
        if self.simmim and not any(name in source for name in names):
            self.report.reinitialized += [(name, "no head in a SimMIM file: kept as it is") for name in names]
            self.new |= {name: self.target[name] for name in names}
            return
        if not all(name in source for name in names):
            return
        old, new = len(source["head.bias"]), len(self.target["head.bias"])
        same_width = source["head.weight"].shape[1:] == self.target["head.weight"].shape[1:]
        if old == new or len(source["head.weight"]) != old or not same_width:
            return
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
            try:
                self.new[name], rule = self._fitted(name, source[name], want)
            except ValueError as error:
                self._problem(name, str(error), self.report.reinitialized)
                continue
            if rule:
                self.report.interpolated.append((name, rule))
            else:
                self.report.loaded.append(name)
        for name in source:
            if name not in self.target:
                self._problem(name, "unexpected: the model has no such parameter", self.report.dropped)

    def _missing(self, name: str) -> None:
        if name.endswith("mlp.experts.fc2_bias") and not self.model.config.mlp_fc2_bias:
            self.report.reinitialized.append((name, "not in the file and not trained: kept at zero"))
        elif self.own_parts and re.search(TASK_PARTS, name):
            self.report.reinitialized.append((name, "not in the file: begins from the seed"))
        else:
            self._problem(name, "missing in the file", self.report.reinitialized)

    def _problem(self, name: str, reason: str, told: Named) -> None:
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
        if value.shape == want.shape:
            return value, ""
        if name.endswith("relative_position_bias_table") and value.ndim == 2 and value.shape[1] == want.shape[1]:
            old, new = _side(value.shape[0]), _side(want.shape[0])
            resize = resize_bias_table_geometric if self.interpolation == "geometric" else resize_bias_table
            rule = f"{self.interpolation}, {old} x {old} to {new} x {new} offsets"
            return resize(value.float(), (new + 1) // 2), rule
        if name == "absolute_pos_embed" and value.ndim == 3 and value.shape[2] == want.shape[2]:
            return self._fitted_embedding(value, want)
        hint = ""
        if ".mlp.experts." in name and value.ndim == want.ndim:
            hint = "; a file of one rank? gather all experts first"
        raise ValueError(f"shape {tuple(value.shape)} in the file, {tuple(want.shape)} in the model{hint}")

    def _fitted_embedding(self, value: Tensor, want: Tensor) -> tuple[Tensor, str]:
        """Returns an absolute position embedding (1, L, C) of a square image for the model's nominal image."""
        height, width = self.model.grid
        old = _side(value.shape[1])
        image = value.float().transpose(1, 2).unflatten(2, (old, old))
        resized = F.interpolate(image, size=(height, width), mode="bicubic").flatten(2).transpose(1, 2)
        if resized.shape != want.shape:
            raise ValueError(f"shape {tuple(value.shape)} in the file, {tuple(want.shape)} in the model")
        return resized, f"bicubic, {old} x {old} to {height} x {width} tokens"

    def note_windows(self, official: dict[str, Tensor]) -> None:
        """Notes bias networks that were trained for other coordinates than the model will ask them for.

        The official buffer relative_coords_table (1, 2w-1, 2w-1, 2) tells both: its side the window, its largest value
        log2(8 (w - 1) / (p - 1) + 1) / 3 the window p that offsets were divided by.
        """
        found: dict[int, int] = {}
        wrong = False
        for key, table in official.items():
            match = re.search(r"(layers\.(\d+)\.blocks\.\d+\.attn)\.relative_coords_table$", key)
            if not match or table.shape[1] < 3:
                continue
            attention = dict(self.model.named_modules()).get(match[1])
            if attention is None or not hasattr(attention, "pretrained_window"):
                continue
            window = (table.shape[1] + 1) // 2
            trained = round(8 * (window - 1) / (2 ** (3 * float(table.max())) - 1) + 1)
            found[int(match[2])] = trained
            wrong |= trained != attention.pretrained_window
        if wrong:
            windows = [found.get(stage, 0) for stage in range(max(found) + 1)]
            self.report.notes.append(
                f"the position biases were trained with windows {windows}, the model reads them with others; "
                f"build it with pretrained_window_sizes={windows}, as the official fine-tuning configs do"
            )


def read_class_map() -> list[int]:
    """Returns the ImageNet-22K class of each of the 1000 ImageNet-1K classes (official data/map22kto1k.txt)."""
    path = Path(__file__).parent.parent / "data" / "map22kto1k.txt"
    return [int(line) for line in path.read_text(encoding="ascii").split()]


def resize_bias_table_geometric(table_LH: Tensor, window: int) -> Tensor:
    """Returns a bias table for another window, (2 * window - 1) ** 2 x H, by the geometric rule of SimMIM and BEiT.

    The offsets of the source lie at geometrically growing positions that reach as far as the target's whole numbers; in
    between, a bicubic spline through all of them (SciPy's interp2d(kind="cubic"), gone since SciPy 1.14).
    """
    source, target = _side(table_LH.shape[0]), 2 * window - 1
    if source < 5:
        raise ValueError(f"geometric interpolation needs a window of at least 3, the file's is {(source + 1) // 2}")
    positions = torch.tensor(geometric_positions(source, target), dtype=torch.float64)
    wanted = torch.arange(target, dtype=torch.float64) - target // 2
    weight_TS = spline_matrix(positions, wanted.clamp(positions[0], positions[-1])).to(table_LH.device)
    image_HSS = table_LH.double().t().unflatten(1, (source, source))
    resized_HTT = weight_TS @ image_HSS @ weight_TS.t()
    return resized_HTT.flatten(1).t().contiguous().to(table_LH.dtype)


def geometric_positions(source: int, target: int) -> list[float]:
    """Returns the positions of `source` (odd) offsets: 0, +-1, +-(1 + q), +-(1 + q + q^2), ... up to about target // 2.

    q by bisection in [1.01, 1.5] to 1e-6, the bounds of utils_simmim.py, so that tables equal the official ones.
    """
    half = source // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q**half) / (1 - q)
        low, high = (low, q) if reach > target // 2 else (q, high)
    right = [sum(q**power for power in range(count)) for count in range(1, half + 1)]
    return [-x for x in reversed(right)] + [0.0, *right]


def spline_matrix(positions_S: Tensor, wanted_T: Tensor) -> Tensor:
    """Returns (T, S) float64: the cubic not-a-knot spline through values at S rising positions, read at T places.

    Not-a-knot: no jump of the third derivative at the second and last-but-one position, as FITPACK interpolates.
    """
    count = len(positions_S)
    step = positions_S.diff()
    left, right = torch.zeros(2, count, count, dtype=torch.float64)  # left @ second derivatives = right @ values
    for i in range(1, count - 1):
        a, b = step[i - 1], step[i]
        left[i, i - 1 : i + 2] = torch.stack((a, 2 * (a + b), b))
        right[i, i - 1 : i + 2] = 6 * torch.stack((1 / a, -1 / a - 1 / b, 1 / b))
    for row, i in ((0, 1), (count - 1, count - 2)):
        a, b = step[i - 1], step[i]
        left[row, i - 1 : i + 2] = torch.stack((b, -(a + b), a))
    curvature = torch.linalg.solve(left, right)
    cell = (torch.searchsorted(positions_S, wanted_T, right=True) - 1).clamp(0, count - 2)
    width = step[cell]
    b = (wanted_T - positions_S[cell]) / width
    identity = torch.eye(count, dtype=torch.float64)
    linear = (1 - b)[:, None] * identity[cell] + b[:, None] * identity[cell + 1]
    bend_left, bend_right = (((1 - b) ** 3 - (1 - b)), b**3 - b)
    bend = bend_left[:, None] * curvature[cell] + bend_right[:, None] * curvature[cell + 1]
    return linear + bend * (width**2 / 6)[:, None]


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of an official file, with or without its {"model": ...} around them."""
    inner = state_dict.get("model", state_dict)
    if not isinstance(inner, Mapping) or not inner:
        raise ValueError(f"not an official state dict: model is {type(inner).__name__}")
    for name, value in inner.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"not an official state dict: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(inner)


def _holds_numbers(value: Tensor) -> bool:
    """Returns whether any element is not zero; unknown of a tensor on meta, which is ours and tells the truth."""
    return not value.is_meta and bool(value.count_nonzero())


def _side(length: int) -> int:
    """Returns the side of a square of `length` elements; raises ValueError where it is none."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} rows are no square, so there is nothing to interpolate over")
    return side


def _some(names: list[str]) -> str:
    """Returns a count and the first name or two."""
    return f"{len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
