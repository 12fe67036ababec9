"""What the ranks run in the tests of tasks: small float64 runs of the real trainer, one MPI start per world."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swin_moe.config.io import load_config
from swin_moe.data.batch import to_device
from swin_moe.evaluate import build_eval_loader
from swin_moe.evaluate_features import measure, parse_options
from swin_moe.models import build_model
from swin_moe.parallel.groups import build_groups
from swin_moe.run.session import Session, build_local_model
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.train import Trainer
from swin_moe.weights.load import backbone_of, load_weights, open_stored, start_from
from tests.gathered import NETWORK

# 50 images in batches of 20: 3 steps an epoch, the last one of 10, so that of 4 ranks two have none.
TINY = (
    *NETWORK,
    "engine.precision=fp64",
    "model.drop_path_rate=0.2",
    "data.global_batch=20",
    "data.images_per_class=5",
    "data.drop_last=false",
    "data.eval_batch=90",
    "data.erase_prob=0.0",  # else every rank imports timm
    "task.mask_patch_size=4",
    "optim.epochs=1",
    "optim.warmup_epochs=0.5",
    "optim.clip_norm=0.5",
    "log.every=1",
    "log.eval_every=1",
    "log.tensorboard=false",
    "checkpoint.every=1000",
    "checkpoint.keep=0",
)
V2 = ("model.name=swinv2", "task.target_window=7")
MOE = (
    "model.moe.blocks=[[-1],[1]]",
    "model.moe.num_experts=4",
    "model.moe.capacity_scope=images",
    "model.moe.group_images=1",
)

# TEACHER stands for the folder of write_teacher's files.
DISTILL = ("task.teacher=TEACHER.pth", "task.teacher_model=TEACHER.yaml", "task.teacher_precision=fp64")

# A ring that the batch of 20 does not divide, and that is filled more than once.
MOBY = ("task.queue=17", "task.hidden_dim=12", "task.num_features=6")

# 50 canvases of three sizes, so that most are padded; the statistics of batch norm are those of all ranks' pixels.
SEGMENT = (
    "data.images_per_class=0",
    "data.hflip=0.5",
    "data.dense.canvases=50",
    "data.dense.val_canvases=7",
    "data.eval_batch=3",
    "data.dense.canvas_size=[20,24]",
    "data.dense.digit_size=[8,12]",
    "data.dense.short=[14,18,20]",
    "data.dense.eval_short=18",
    "data.dense.divisor=4",
    "task.segment.channels=6",
    "task.segment.dropout=0.2",
    "task.segment.auxiliary_channels=4",
    "task.segment.auxiliary_index=1",
    "task.segment.pool_scales=[1,2]",
)
SLIDE = (
    "task.segment.inference=slide",
    "task.segment.slide_crop=[12,12]",
    "task.segment.slide_stride=[8,8]",
    "task.segment.scales=[0.75,1.25]",
    "task.segment.flip=true",
)

# 50 canvases, some without an object on a rank; more candidates than are sampled, so that the draws matter.
DETECT = (
    "data.images_per_class=0",
    "data.hflip=0.5",
    "data.dense.canvases=50",
    "data.dense.val_canvases=7",
    "data.eval_batch=3",
    "data.dense.canvas_size=[20,24]",
    "data.dense.canvas_digits=[0,2]",
    "data.dense.keep_empty=true",
    "data.dense.digit_size=[8,12]",
    "data.dense.short=[14,18,20]",
    "data.dense.eval_short=18",
    "data.dense.divisor=4",
    "data.dense.min_side=1",
    "task.detect.channels=6",
    "task.detect.anchors=20",
    "task.detect.anchor_scale=3.0",
    "task.detect.proposals_per_level=[30,30]",
    "task.detect.proposals=[20,20]",
    "task.detect.boxes=12",
    "task.detect.finest_scale=4.0",
    "task.detect.box_fc_channels=6",
    "task.detect.mask_convs=1",
    "task.detect.mask_channels=6",
    "task.detect.score=0.01",
)
CASCADE = (
    "task.detect.stage_overlaps=[0.4,0.5]",
    "task.detect.stage_stds=[[0.1,0.1,0.2,0.2],[0.05,0.05,0.1,0.1]]",
    "task.detect.stage_weights=[1.0,0.5]",
    "task.detect.low_quality=false",
    "task.detect.box_convs=1",
    "task.detect.box_conv_channels=4",
    "task.detect.box_fcs=1",
    "task.detect.box_norm=true",
    "task.detect.box_agnostic=true",
    "task.detect.box_loss=giou",
)
HYBRID = (
    *CASCADE,
    "task.detect.interleaved=true",
    "task.detect.mask_flow=true",
    "task.detect.semantic_classes=11",
    "task.detect.global_attention=true",
)

POINTS = (
    *DETECT,
    "task.detect.norm_groups=2",
    "task.detect.corner_channels=4",
    "task.detect.neck_repeats=2",
)

# One image in ten has labels, so that of 4 ranks two have none; the teacher is believed wherever it has a guess.
SOFT = (
    *DETECT,
    "data.dense.labelled=0.3",
    "data.dense.sample_ratio=[1,9]",
    "data.dense.recolour=true",
    "task.soft_teacher.found_score=0.05",
    "task.soft_teacher.proposal_score=0.08",
    "task.soft_teacher.class_score=0.09",
    "task.soft_teacher.box_spread=0.3",
    "task.soft_teacher.jitters=3",
)

# name -> (config, options); and which run of one process it equals, if not itself.
RUNS = {
    "simmim": ("digits_simmim", ()),
    "simmim v2": ("digits_simmim", V2),
    "simmim moe": ("digits_simmim", MOE),
    "simmim accumulated": ("digits_simmim", ("data.micro_batch=5",)),
    "simmim recomputed": ("digits_simmim", ("parallel.recompute=block",)),
    "simmim zero": ("digits_simmim", ("parallel.zero=3",)),
    "simmim moe recomputed": ("digits_simmim", (*MOE, "parallel.recompute=block")),
    "distill": ("digits_distill", DISTILL),
    "distill sharded": ("digits_distill", (*DISTILL, "task.teacher_shard=true", "parallel.zero=3")),
    "distill moe": ("digits_distill", (*DISTILL, *MOE)),
    "distill moe accumulated": ("digits_distill", (*DISTILL, *MOE, "data.micro_batch=5", "parallel.recompute=block")),
    "moby": ("digits_moby", MOBY),
    "moby zero": ("digits_moby", (*MOBY, "parallel.zero=3")),
    "moby recomputed": ("digits_moby", (*MOBY, "parallel.recompute=block", "parallel.zero=1")),
    "moby moe": ("digits_moby", (*MOBY, *MOE)),
    "segment": ("canvas_upernet", SEGMENT),
    "segment zero": ("canvas_upernet", (*SEGMENT, "parallel.zero=3")),
    "segment frozen": ("canvas_upernet", (*SEGMENT, "task.segment.norm=frozen")),
    "segment accumulated": ("canvas_upernet", (*SEGMENT, "task.segment.norm=frozen", "data.micro_batch=5")),
    "segment moe": ("canvas_upernet", (*SEGMENT, *SLIDE, *MOE)),
    "segment moe recomputed": ("canvas_upernet", (*SEGMENT, *SLIDE, *MOE, "parallel.recompute=block")),
    "detect": ("canvas_mask_rcnn", DETECT),
    "detect cascade": ("canvas_mask_rcnn", (*DETECT, *CASCADE)),
    "detect cascade zero": ("canvas_mask_rcnn", (*DETECT, *CASCADE, "parallel.zero=3", "parallel.recompute=block")),
    "detect hybrid moe": ("canvas_mask_rcnn", (*DETECT, *HYBRID, *MOE)),
    "detect moe frozen": ("canvas_mask_rcnn", (*DETECT, *MOE, "optim.freeze=moe")),
    "detect points": ("canvas_reppoints", POINTS),
    "detect points masks": ("canvas_reppoints", (*POINTS, "task.detect.masks=true", "task.detect.mask_channels=8")),
    "detect points moe zero": ("canvas_reppoints", (*POINTS, *MOE, "parallel.zero=3", "parallel.recompute=block")),
    "soft teacher": ("canvas_soft_teacher", SOFT),
}
REFERENCE = {
    "simmim accumulated": "simmim",
    "simmim recomputed": "simmim",
    "simmim zero": "simmim",
    "simmim moe recomputed": "simmim moe",
    "distill sharded": "distill",
    "moby zero": "moby",
    "moby recomputed": "moby",
    "segment zero": "segment",
    "detect cascade zero": "detect cascade",
    "segment accumulated": "segment frozen",
    "segment moe recomputed": "segment moe",
    "distill moe accumulated": "distill moe",
}


def open_tiny(directory: Path, config: str, *options: str) -> Session:
    """Returns a session of a tiny run of digits in this (already started) world."""
    loaded = load_config(config, [*TINY, f"run.output={directory}", "run.name=run", *options])
    world_size = torch.distributed.get_world_size()
    loaded.check(world_size)
    experts = loaded.model.moe.num_experts if loaded.model.moe.has_blocks else 1
    parallel = loaded.parallel if experts > 1 else replace(loaded.parallel, expert=1, expert_shard=1)
    groups = build_groups(parallel, experts, torch.device("cpu"), routing_ranks=loaded.routing_ranks(world_size))
    return Session(loaded, groups, torch.device("cpu"))


def train(session: Session) -> Trainer:
    """Runs a run to its end."""
    trainer = Trainer(session)
    trainer.resume()
    trainer.run()
    return trainer


def records(session: Session) -> list[dict]:
    """Returns the records of metrics.jsonl; on rank 0, others have none."""
    return [json.loads(line) for line in (session.directory / "metrics.jsonl").read_text().splitlines()]


def outcome(trainer: Trainer) -> dict:
    """Returns losses of every step, the evaluation, and this rank's parts of the weights."""
    engine: Any = trainer.engine  # parts are no member that every engine has
    rows = records(trainer.session)
    parts = {name: (part.shape, part.chunk.offset, part.local.clone()) for name, part in engine.parts.items()}
    return {
        "losses": [[r["train/loss"], r["train/aux"], r["train/grad_norm"]] for r in rows if "train/loss" in r],
        "evaluation": next(r for r in reversed(rows) if "eval/samples" in r),
        "weights": parts,
        "pictures": trainer.task.pictures(),
    }


def run_world(root: str, world: int) -> dict[str, dict]:
    """Returns the outcome of every run of RUNS in this world."""
    result = {}
    for name, (config, options) in RUNS.items():
        directory = Path(root) / f"world{world}" / name.replace(" ", "-")
        own = [option.replace("TEACHER", f"{root}/teacher") for option in options]
        result[name] = outcome(train(open_tiny(directory, config, *own)))
    return result


def write_teacher(root: Path) -> None:
    """Writes teacher.pth, an official file, and teacher.yaml; its 6 x 6 tokens are not the student's 4 x 4."""
    text = """model: {name: swinv2, img_size: 24, patch_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2],
         window_size: 6, num_classes: 3, pretrained_window_sizes: [0, 0]}"""
    (root / "teacher.yaml").write_text(text)
    network = build_model(load_config(root / "teacher.yaml").model)
    network.init_weights(7)
    torch.save({"model": network.state_dict()}, root / "teacher.pth")


def evaluate(root: str, config: str, *options: str) -> dict[str, float]:
    """Returns what `swin-moe evaluate` prints."""
    session = open_tiny(Path(root), config, *options)
    task = build_task(session.config)
    model = build_local_model(session, task)
    stored = open_stored(session)
    load_weights(model, session, stored)
    loader = build_eval_loader(session.config, session, stored, task=task)
    batches = (to_device(batch, session.device, session.config.engine.precision) for batch in loader)
    context = StepContext(session.config, 0, session.world_size, 0, torch.no_grad)
    return task.evaluate(model.eval(), batches, context)


def features(root: str, config: str, *options: str) -> dict[str, float]:
    """Returns what `swin-moe evaluate-features` prints."""
    session = open_tiny(Path(root), config, *options)
    model = build_local_model(session, build_task(session.config))
    load_weights(model, session)
    return measure(session, backbone_of(model.eval()), parse_options(["--k", "5", "--draws", "2", "--l2", "1"])[1])


def begin(root: str, *options: str) -> dict:
    """Returns the report of checkpoint.init, and this rank's parts of the weights of a run before its first step."""
    session = open_tiny(Path(root), "digits_dense", *options)
    engine: Any = Trainer(session).engine  # parts are no member that every engine has
    report = start_from(session.config.checkpoint.init, engine, session)
    held = {n: (p.shape, p.chunk.offset, p.local.clone()) for n, p in engine.parts.items()}
    return {"report": report, "begun": held}


def tune(root: str, config: str, *options: str) -> dict:
    """Returns the outcome of one run."""
    return outcome(train(open_tiny(Path(root), config, *options)))


def tune_and_measure(root: str, *options: str) -> dict:
    """Begins a run of ZeRO-3, trains another one to its end, and measures its features."""
    begun = begin(root, *options, "run.name=begun", "parallel.zero=3")
    tuned = tune(root, "digits_dense", *options, "run.name=tuned")
    measured = features(root, "digits_dense", *options, "run.name=tuned")
    return {**begun, "evaluation": tuned["evaluation"], "features": measured}


def measure_alone(root: str, *options: str) -> dict:
    """Begins the same run on one rank, and measures what tune_and_measure left."""
    begun = begin(root, *options, "run.name=begun-alone")
    found = evaluate(root, "digits_dense", *options, "run.name=tuned")
    return {**begun, "evaluation": found, "features": features(root, "digits_dense", *options, "run.name=tuned")}
