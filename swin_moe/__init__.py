"""Training of vision Mixture-of-Experts at scale: the Swin family, on one process or many.

The commands are files here (cli.COMMANDS: train, evaluate, predict, ...); what they are made of is one package each, in
the order of docs/architecture.md. _EXPORTS is what other programs import; a new name there is a promise.
"""

from typing import Any

from swin_moe.registry import lookup

__version__ = "0.1.0"

# Imported on first use, so that tools which need no torch do not load it.
_EXPORTS = {
    "load": "swin_moe.weights.pretrained:load",
    "create_model": "swin_moe.weights.pretrained:create_model",
    "build_model": "swin_moe.models.build:build_model",
    "from_pretrained": "swin_moe.weights.hub:from_pretrained",
    "load_official": "swin_moe.weights.pretrained:load_official",
    "register_timm": "swin_moe.weights.timm_models:register",
    "parallelize": "swin_moe.parallel.apply:parallelize",
    "optimize": "swin_moe.models.optimized:optimize",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lookup(_EXPORTS, name, key=name)
