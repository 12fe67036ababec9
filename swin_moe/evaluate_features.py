"""`swin-moe evaluate-features CONFIG checkpoint.load=PATH`: k nearest neighbours and few-shot accuracy, no training."""

import argparse
from dataclasses import replace

import torch
from torch import nn

from swin_moe.config import Config
from swin_moe.config.arguments import Parser
from swin_moe.data.batch import to_device
from swin_moe.data.loader import EvalLoader
from swin_moe.engine.graphs import check_graphs, with_graphs
from swin_moe.engine.precision import autocast
from swin_moe.models.swin import SwinTransformer
from swin_moe.run.data_fit import with_counted_classes
from swin_moe.run.metrics import LOGGER, start_logging
from swin_moe.run.session import Session, build_local_model, open_session, parse_arguments, run_main
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.tasks.features import Features, Pooled, extract, knn_accuracy, ridge_accuracy
from swin_moe.usage.texts import EVALUATE_FEATURES
from swin_moe.weights.load import backbone_of, load_weights
from swin_moe.weights.teacher import load_teacher

OPTIONS = ("--k", "--temperature", "--shots", "--draws", "--l2")


def parse_options(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """Returns (key=value overrides, options)."""
    parser = Parser("swin-moe evaluate-features", add_help=False, allow_abbrev=False)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--l2", type=float, default=1024.0)
    options, overrides = parser.parse_known_args(words)
    allowed = (
        options.k >= 0 and options.shots >= 0 and options.draws >= 1 and options.temperature > 0 and options.l2 > 0
    )
    if not allowed:
        raise ValueError("evaluate-features needs --k >= 0, --shots >= 0, --draws >= 1, --temperature > 0 and --l2 > 0")
    return overrides, options


def features_of(config: Config, session: Session, network: nn.Module, split: str) -> tuple[Features, int]:
    """Returns (this rank's features of a split, number of classes); images as in evaluation: resized, not augmented.

    network: Images -> features (B, C).
    """
    loader = EvalLoader(
        config.data,
        config.model.img_size,
        rank=session.rank,
        world_size=session.world_size,
        batch=config.data.eval_batch or config.accumulation(session.world_size)[0],
        split=split,
    )
    context = StepContext(config, 0, session.world_size, 0, lambda: autocast(config.engine.precision, session.device))
    loaded = session.heartbeat.over(loader, f"{split} batch")
    batches = (to_device(batch, session.device, config.engine.precision) for batch in loaded)
    return extract(network, batches, context), loader.num_classes


def measure(session: Session, backbone: SwinTransformer, options: argparse.Namespace) -> dict[str, float]:
    """Returns {"knn": percent, "few_shot": mean percent, "few_shot_deviation": over draws}, as asked for."""
    config = session.config
    network = with_graphs(Pooled(backbone).eval(), config)
    result: dict[str, float] = {}
    query, num_classes = features_of(config, session, network, "val")
    if options.k:
        train, _ = features_of(config, session, network, "train")
        result["knn"] = knn_accuracy(
            train, query, neighbours=options.k, num_classes=num_classes, temperature=options.temperature
        )
    if options.shots:
        found = []
        for draw in range(options.draws):
            few = replace(config, data=replace(config.data, images_per_class=options.shots, subset=draw))
            train, _ = features_of(few, session, network, "train")
            found.append(ridge_accuracy(train, query, num_classes=num_classes, l2=options.l2))
        accuracy = torch.tensor(found, dtype=torch.float64)
        result["few_shot"] = float(accuracy.mean())
        result["few_shot_deviation"] = float(accuracy.std(correction=0))
    return result


def main(argv: list[str]) -> None:
    """Prints the accuracies."""
    path, words = parse_arguments(argv, EVALUATE_FEATURES, OPTIONS)
    overrides, options = parse_options(words)
    session = with_counted_classes(open_session(path, overrides))
    start_logging(None, session.rank)
    check_graphs(session.config, session.device.type, session.world_size, features=True)
    task = build_task(session.config)
    if task.needs_teacher:
        task.teacher = load_teacher(session)
    model = build_local_model(session, task)
    LOGGER.info("weights: %s", load_weights(model, session))
    with session.watched():
        result = measure(session, backbone_of(model.eval()), options)
    LOGGER.info("%s", ", ".join(f"{key} {value:.6g}" for key, value in result.items()))


if __name__ == "__main__":
    run_main(main)
