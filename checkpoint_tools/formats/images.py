"""What a program has to know beside a network: names of the classes, and how images become its input."""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.sources.base import Source
from swin_moe.checkpoint.errors import CheckpointError

# ImageNet's, which every family is trained with (swin_moe/data/transforms.py).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
READING = ("interpolation", "eval_crop", "resize", "exif")  # options of config.data that preprocessing depends on
CLASSES = "classes"  # entry of state: names by class number


def class_names(source: Source, count: int) -> list[str] | None:
    """Returns a name for each of `count` classes, LABEL_n where the source names fewer; None where it names none.

    Raises:
        CheckpointError: It names more classes than the network has, or something else stands there.
    """
    names = source.state.get(CLASSES)
    if names is None or not count:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > count:
        raise CheckpointError(f"{source.path}: its state names other classes than the {count} of its network")
    return [*names, *(f"LABEL_{n}" for n in range(len(names), count))]


def labels(source: Source, count: int) -> dict[str, Any]:
    """Returns id2label and label2id of transformers' config.json; numbers stand for classes without names."""
    names = class_names(source, count) or [f"LABEL_{n}" for n in range(count)]
    if not count:
        return {}
    numbers = {name: n for n, name in reversed(list(enumerate(names)))}  # of equal names the first
    return {"id2label": {str(n): name for n, name in enumerate(names)}, "label2id": dict(sorted(numbers.items()))}


def named_classes(config: Mapping[str, Any]) -> list[str] | None:
    """Returns the class names in a config.json; None where it has none but LABEL_n."""
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    names = [name for n in range(len(table)) if isinstance(name := table.get(str(n)), str)]
    known = len(names) == len(table)
    return names if known and any(name != f"LABEL_{n}" for n, name in enumerate(names)) else None


def preprocessing(config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns how the evaluation of a run makes its input, as JSON.

    Args:
        config: Of the run; without a section data the defaults count. size: (height, width) in pixels.
    """
    data = config.get("data", {})
    crop = bool(data.get("eval_crop", True))
    resize = [int(256 / 224 * side) for side in size] if crop else list(size)
    interpolation = data.get("interpolation", "bicubic")
    return {
        "size": list(size),
        "resize": resize,
        "crop": "center" if crop else "none",
        "mean": list(MEAN),
        "std": list(STD),
        "scale": 1 / 255,
        "interpolation": interpolation if interpolation != "random" else "bicubic",
    }


def preprocessor(config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns preprocessor_config.json: what transformers' AutoImageProcessor makes the same input by.

    For inputs that are not square only nearly: transformers resizes by the shorter side, we cover both of the input.
    """
    found = preprocessing(config, size)
    (height, width), crop = size, found["crop"] == "center"
    resized = {"shortest_edge": max(found["resize"])} if crop else {"height": height, "width": width}
    cut = {"do_center_crop": True, "crop_size": {"height": height, "width": width}} if crop else {}
    return {
        "image_processor_type": "BitImageProcessor" if crop else "ViTImageProcessor",
        "do_resize": True,
        "size": resized,
        "resample": _RESAMPLING[found["interpolation"]],
        "do_rescale": True,
        "rescale_factor": found["scale"],
        "do_normalize": True,
        "image_mean": found["mean"],
        "image_std": found["std"],
        "do_convert_rgb": True,
        **cut,
    }


def stated_reading(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of config.data that a preprocessor_config.json stands for; {} where it says nothing."""
    names = {number: name for name, number in _RESAMPLING.items()}
    reading: dict[str, Any] = {}
    if preprocessor.get("resample") in names:
        reading["interpolation"] = names[preprocessor["resample"]]
    if preprocessor.get("do_resize"):
        reading["eval_crop"] = bool(preprocessor.get("do_center_crop"))
    return reading
