"""Our networks by timm's names and calls: timm.create_model("swin_moe_...", features_only=True) after register().

Shape legend: B images, C channels, H x W tokens of a map, K classes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from swin_moe.config.shipped.listing import shipped
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.models.swin import SwinTransformer
from swin_moe.weights.pretrained import create_model

PREFIX = "swin_moe_"  # timm has networks of the official names itself
FOLDERS = ("swin", "swinv2", "swin_mlp", "swin_moe", "scale")  # of configs/ whose networks classify
_PASSED = tuple("num_classes in_chans img_size window_size patch_size drop_rate attn_drop_rate drop_path_rate".split())
_IGNORED = ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "strict_img_size")


def timm_name(config: str) -> str:
    """Returns what timm calls the network of a shipped config."""
    return config if config.startswith(PREFIX) else f"{PREFIX}{config}"


def register() -> list[str]:
    """Returns the names under which timm.create_model, list_models and is_model know the shipped networks from now on.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from swin_moe.data.torchvision_compat import import_torchvision

    import_torchvision()
    from timm.models import is_model, register_model

    names = []
    for folder, configs in shipped([]).items():
        for config in configs if folder in FOLDERS else ():
            name = timm_name(config)
            names.append(name)
            if not is_model(name):
                register_model(_entry(name, config))
    return names


class TimmNetwork(nn.Module):
    """A network with the members that timm's models have; `network` is ours."""

    def __init__(self, network: SwinTransformer, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        config = network.config
        self.network, self.pretrained_cfg, self.default_cfg = network, pretrained_cfg, pretrained_cfg
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = network.num_features
        self.feature_info = [
            {
                "num_chs": config.embed_dim * 2**stage,
                "reduction": config.patch_size[0] * 2**stage,
                "module": _place(stage),
            }
            for stage in range(len(config.depths))
        ]
        self.aux_loss: Tensor | None = None  # of the last forward with experts, times its weight: add it to the loss

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the normalized map of the last stage, (B, H, W, C)."""
        encoded = self.network.encode(x)
        self.aux_loss = encoded.aux
        return encoded.tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits of a map (B, H, W, C), or with pre_logits its mean."""
        pooled = x.flatten(1, 2).mean(dim=1)
        return pooled if pre_logits else self.network.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns maps of stages before merging, with the map of forward_features before them unless
        intermediates_only; the last stage's are normalized.

        Args:
            indices: Stages, the last n, or None = all; negative ones count from the end.
            norm, stop_early: For timm's sake: the last map is always normalized, all stages are computed.
            output_fmt: "NCHW", or "NHWC".

        Raises:
            ValueError: A stage that is not there, or another format.
        """
        from timm.models._features import feature_take_indices

        form = getattr(output_fmt, "value", output_fmt)  # timm's wrapper gives a member of its enumeration
        if form not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {form}")
        wanted = indices if indices is None or isinstance(indices, int) else list(indices)
        try:
            stages, _ = feature_take_indices(len(self.feature_info), wanted)
        except AssertionError as error:
            raise ValueError(f"stages: {error}") from None
        encoded = self.network.encode(x, stages)
        self.aux_loss = encoded.aux
        maps = encoded.maps if form == "NCHW" else [m.permute(0, 2, 3, 1) for m in encoded.maps]
        return maps if intermediates_only else (encoded.tokens, maps)

    def get_classifier(self) -> nn.Module:
        """Returns the class head."""
        return self.network.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the network a new head, with weights as torch draws them; 0 = none.

        Raises:
            ValueError: Another pooling than the mean.
        """
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool must be avg, got {global_pool!r}")
        old = next(self.network.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.network.head = head.to(old.device, old.dtype)
        self.num_classes = self.network.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        words = self.network.no_weight_decay_keywords()
        named = {name for name, _ in self.network.named_parameters() if any(word in name for word in words)}
        named |= self.network.no_weight_decay() & {name for name, _ in self.network.named_parameters()}
        return {f"network.{name}" for name in named}


def _place(stage: int) -> str:
    return f"network.layers.{stage}"


def _entry(name: str, config: str) -> Callable[..., nn.Module]:
    """Returns what timm calls to make the network of a shipped config."""
    made = functools.partial(_create, name, config)

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return made(pretrained, options)

    entry.__name__, entry.__qualname__ = name, name
    return entry


def _create(name: str, config: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from timm.models._features import FeatureGetterNet

    options = {key: value for key, value in options.items() if key not in _IGNORED}
    features_only, out_indices = options.pop("features_only", False), options.pop("out_indices", None)
    unknown = [key for key in options if key not in _PASSED]
    if unknown:
        raise ValueError(
            f"{name}: unknown option {unknown[0]}; allowed: {', '.join(_PASSED)}, features_only, out_indices"
        )
    if features_only:
        options["num_classes"] = 0
    network = create_model(config, pretrained=pretrained, **options)
    size = network.config.img_size
    cfg = {
        "architecture": name,
        "num_classes": network.config.num_classes,
        "input_size": (network.config.in_chans, *size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "mean": tuple(float(value) for value in IMAGENET_MEAN),
        "std": tuple(float(value) for value in IMAGENET_STD),
        "first_conv": "network.patch_embed.proj",
        "classifier": "network.head",
        "pool_size": None,
    }
    model = TimmNetwork(network, cfg)
    if not features_only:
        return model
    stages = len(model.feature_info)
    indices = tuple(range(stages)) if out_indices is None else out_indices
    if not isinstance(indices, int) and any(not -stages <= index < stages for index in indices):
        raise ValueError(f"{name}: out_indices must be of its {stages} stages, got {list(indices)}")
    return FeatureGetterNet(model, out_indices=indices, prune=False)


__all__: list[str] = ["PREFIX", "TimmNetwork", "register", "timm_name"]  # timm adds the names it is given
