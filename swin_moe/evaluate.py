"""Evaluation: `swin-moe evaluate CONFIG checkpoint.load=PATH`; the newest checkpoint of the run by default."""

from collections.abc import Sequence

from swin_moe.config import Config
from swin_moe.data.batch import to_device
from swin_moe.data.loader import EvalLoader
from swin_moe.engine.graphs import check_graphs, with_graphs
from swin_moe.engine.precision import autocast
from swin_moe.run.data_fit import with_counted_classes
from swin_moe.run.metrics import LOGGER, save_picture, start_logging
from swin_moe.run.session import Session, build_local_model, open_session, parse_arguments, run_main
from swin_moe.tasks.base import StepContext, Task, build_task
from swin_moe.usage.texts import EVALUATE
from swin_moe.weights.load import load_weights, open_stored
from swin_moe.weights.sources import Source
from swin_moe.weights.teacher import load_teacher


def build_eval_loader(
    config: Config,
    session: Session,
    stored: Source | None = None,
    *,
    task: Task | None = None,
    classes: Sequence[str] = (),
) -> EvalLoader:
    """Returns the loader of the validation images for this rank, labelled as the checkpoint's classes are numbered.

    Args:
        stored: The checkpoint of which the weights are; None = labelled as the data set's are.
        task: What needs them; None = whole images' labels are needed.
        classes: Where nothing is stored, what labels stand for; () = as the data set numbers them.
    """
    boxes, label_maps = (task.needs_boxes, task.needs_label_maps) if task is not None else (False, False)
    if stored is not None:
        classes = stored.classes if config.task.options.classifies or boxes or label_maps else ()
    batch = config.data.eval_batch or config.accumulation(session.world_size)[0]
    return EvalLoader(
        config.data,
        config.model.img_size,
        rank=session.rank,
        world_size=session.world_size,
        batch=batch,
        pin_memory=session.device.type == "cuda",
        num_classes=config.model.num_classes,
        classes=classes,
        boxes=boxes,
        label_maps=label_maps,
    )


def main(argv: list[str]) -> None:
    """Prints the metrics of a checkpoint."""
    path, overrides = parse_arguments(argv, EVALUATE)
    session = open_session(path, overrides)
    start_logging(None, session.rank)
    session = with_counted_classes(session)
    check_graphs(session.config, session.device.type, session.world_size)
    stored = open_stored(session)
    task = build_task(session.config)
    loader = build_eval_loader(session.config, session, stored, task=task)
    if task.needs_teacher:
        task.teacher = load_teacher(session)
    model = build_local_model(session, task)
    LOGGER.info("weights: %s", load_weights(model, session, stored))
    config = session.config
    network = with_graphs(model.eval(), config)
    context = StepContext(config, 0, session.world_size, 0, lambda: autocast(config.engine.precision, session.device))
    loaded = session.heartbeat.over(loader, "evaluation batch")
    batches = (to_device(batch, session.device, config.engine.precision) for batch in loaded)
    with session.watched():
        result = task.evaluate(network, batches, context)
    LOGGER.info("%s", ", ".join(f"{k} {v:.6g}" for k, v in result.items()))
    for name, picture in task.pictures().items():
        if session.rank == 0:
            LOGGER.info("picture: %s", save_picture(session.directory, f"{name}-evaluation", picture))


if __name__ == "__main__":
    run_main(main)
