"""Prediction: `swin-moe predict CONFIG [key=value ...] IMAGE ...` prints the most likely classes of each image."""

from pathlib import Path

import torch

from swin_moe.data.datasets import build_dataset, decode
from swin_moe.data.transforms import build_transform
from swin_moe.engine.precision import autocast
from swin_moe.session import build_classifier, open_session, parse_arguments, run_main
from swin_moe.weights import load_weights

USAGE = """usage: swin-moe predict CONFIG [checkpoint.load=PATH] [key=value ...] IMAGE [IMAGE ...]

Prints up to five classes and their probabilities for every image file."""


def main(argv: list[str]) -> None:
    """Prints class probabilities for image files."""
    path, rest = parse_arguments(argv, USAGE)
    overrides = [word for word in rest if "=" in word and not Path(word).exists()]
    images = [word for word in rest if word not in overrides]
    if not images:
        raise ValueError("predict needs at least one image file after the config")
    missing = [name for name in images if not Path(name).is_file()]
    if missing:
        raise ValueError(f"no such image file: {', '.join(missing)}")
    session = open_session(path, overrides)
    if session.world_size > 1:
        raise ValueError(f"predict runs in one process, got {session.world_size} ranks; start it without a launcher")
    dataset = build_dataset(session.config.data, "val", img_size=session.config.model.img_size)
    model = build_classifier(session)
    load_weights(model, session)
    config = session.config
    transform = build_transform(config.data, config.model.img_size, train=False)
    dtype = next(model.parameters()).dtype
    model.eval()
    for name in images:
        image = transform(decode(Path(name).read_bytes(), name), 0).to(session.device, dtype)
        with torch.inference_mode(), autocast(config.engine.precision, session.device):
            output = model(image[None])
        logits = output[0] if isinstance(output, tuple) else output
        probabilities = logits.float().softmax(1)[0]
        best = probabilities.topk(min(5, len(probabilities)))
        classes = ", ".join(
            f"{dataset.classes[i]} {p:.1%}" for p, i in zip(best.values.tolist(), best.indices.tolist())
        )
        print(f"{name}: {classes}")


if __name__ == "__main__":
    run_main(main)
