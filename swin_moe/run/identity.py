"""What a run is: its classes, data and seed. They stand in every checkpoint and are compared when it is continued."""

import dataclasses
import json
import logging
from typing import Any

from swin_moe.checkpoint import Index, resolve
from swin_moe.config import Config
from swin_moe.config.tasks import nested
from swin_moe.config.variants import VARIANTS
from swin_moe.data.base import Listed
from swin_moe.data.loader import steps_in_epoch
from swin_moe.data.sets.listing import listing_digest
from swin_moe.run.state import Progressed

_log = logging.getLogger(__name__)
_PROVENANCE = "provenance.json"

# Options of the network that change how it is trained or computed, not what the stored weights compute when asked; all
# others of the section model do. Sections not named here change the course only.
_OF_MODEL = "drop_rate attn_drop_rate drop_path_rate init_std post_norm_init img_size attention attention_chunk".split()
_OF_MOE = (
    "capacity_factor eval_capacity_factor capacity_scope group_images batch_prioritized balance_loss balance_scope "
    "aux_loss_weight z_loss_weight gate_noise bias_rate dropout backend transport payload overlap tune tune_cache"
).split()
_COURSE = frozenset([*(f"model.{name}" for name in _OF_MODEL), *(f"model.moe.{name}" for name in _OF_MOE)])
# Options of tasks without which the weights of their heads mean something else: what boxes are relative to, where
# features are taken, which parts there are.
_OF_DETECT = (
    "network channels masks anchor_scale anchor_ratios stage_stds finest_scale box_convs box_conv_channels box_fcs "
    "box_fc_channels box_norm box_agnostic mask_convs mask_channels mask_flow semantic_classes global_attention "
    "neck_repeats norm_groups point_convs point_shared_convs corner_channels point_scale"
).split()
_OF_SEGMENT = "channels pool_scales auxiliary_channels auxiliary_index".split()
_OF_TASK = (*(f"task.detect.{name}" for name in _OF_DETECT), *(f"task.segment.{name}" for name in _OF_SEGMENT))
_MEANING = ("model.", "task.name", "data.name", "data.images_per_class", "data.subset", "run.seed")
_FREE = (
    *("data.path", "data.workers", "data.cache", "data.on_broken"),
    *("task.simmim.pictures", "task.segment.pictures", "task.distill.teacher"),
)
_ENGINE = ("engine.precision",)  # stands beside the checkpoint only, as its bytes do not depend on the section


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """The facts; classes in the order of the network's outputs, digests of data/sets/listing.py."""

    config: Config
    classes: tuple[str, ...]
    digests: dict[str, str]  # train, val

    @classmethod
    def of(cls, config: Config, train: Listed, val: Listed) -> "RunIdentity":
        """Returns the identity of a run on these data sets; warns where most outputs of the network have no class."""
        digests = {"train": listing_digest(train), "val": listing_digest(val)}
        outputs = config.model.num_classes
        if config.task.options.classifies and outputs > len(train.classes):
            _log.warning(
                "model.num_classes=%d, but data.path=%s has %d classes: %d outputs are never right; set "
                "model.num_classes=%d",
                outputs,
                config.data.path or config.data.name,
                len(train.classes),
                outputs - len(train.classes),
                len(train.classes),
            )
        return cls(config, tuple(train.classes), digests)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        return {"seed": self.config.run.seed, "classes": list(self.classes), "data_digest": self.digests}

    def compare_ranks(self, group: Any) -> None:
        """Raises ValueError, on every rank, where ranks see different data: other images, labels or class names."""
        seen = resolve(group).all_gather((self.digests, self.classes))
        for rank, (digests, classes) in enumerate(seen):
            if (digests, classes) == seen[0]:
                continue
            split = next((name for name in digests if digests[name] != seen[0][0][name]), "train")
            what = f"{len(classes)} classes" if len(classes) != len(seen[0][1]) else "images, labels or class names"
            raise ValueError(
                f"data.path={self.config.data.path}: rank {rank} sees other {split} data than rank 0 ({what}); every "
                f"rank must list the same files"
            )

    def check_resume(self, index: Index) -> list[str]:
        """Returns "key: old -> new" of every option that changed since the checkpoint, where the course may change.

        Raises:
            ValueError: What the weights mean has changed, and checkpoint.accept_changes does not allow it.
        """
        meaning, course = _data_changes(self, index.state)
        stored, now = _flat(nested(index.config, source=str(index.path))), _flat(dataclasses.asdict(self.config))
        stored |= {"run.seed": index.state["seed"]} if "seed" in index.state else {}
        stored |= {key: value for key, value in _provenance(index).items() if key in _ENGINE}
        idle = _idle(stored) & _idle(now)
        for key, old in stored.items():
            if key not in now or now[key] == old or key.startswith(_FREE) or key in idle:
                continue
            deep = key in _OF_TASK or (key.startswith(_MEANING) and key not in _COURSE)
            (meaning if deep else course).append(f"{key}: {_word(old)} -> {_word(now[key])}")
        if meaning and not self.config.checkpoint.accept_changes:
            raise ValueError(
                f"{index.path} cannot be continued as it is: {'; '.join(meaning)}. Use a new run.name (with "
                f"checkpoint.init={index.path} to begin with its weights), or checkpoint.accept_changes=true"
            )
        return meaning + course


def begin(config: Config, *, images: int) -> Progressed:
    """Returns where a run without a checkpoint begins: after optim.start_epoch epochs, as the official loop does.

    images: Length of the training data.
    """
    steps = steps_in_epoch(images, config.data.global_batch, drop_last=config.data.drop_last)
    epochs = config.optim.start_epoch
    if epochs:
        _log.info("begins at epoch %d (optim.start_epoch), step %d", epochs, epochs * steps)
    return Progressed(epochs * steps, epochs * min(images, steps * config.data.global_batch))


def place_in_data(index: Index, config: Config, *, images: int, own: bool) -> Progressed:
    """Returns how far a checkpoint's run is in steps of this run's batch, which may be another than the checkpoint's.

    A checkpoint of another run is read at the same epoch and the same image of it; where the new batch does not divide
    the images before, those of one begun batch are seen again.

    Args:
        images: Length of the training data.
        own: The checkpoint is of this run, whose checkpoints and records are numbered by steps of one batch.

    Raises:
        ValueError: `own`, and the batch is another.
    """
    saved, batch = index.state["progress"], config.data.global_batch
    progress = Progressed(saved["step"], saved["samples"], saved["best"], saved["skipped"])
    if saved["global_batch"] == batch:
        return progress
    if own:
        raise ValueError(
            f"data.global_batch={batch}, but this run's checkpoint of step {saved['step']} was trained with "
            f"{saved['global_batch']}; a run keeps its batch. Use the same one, or a new run.name with "
            f"checkpoint.load={index.path}"
        )
    drop_last = index.config.get("data", {}).get("drop_last", config.data.drop_last)
    epoch, inside = divmod(saved["step"], steps_in_epoch(images, saved["global_batch"], drop_last=drop_last))
    before = inside * saved["global_batch"]
    progress.step = epoch * steps_in_epoch(images, batch, drop_last=config.data.drop_last) + before // batch
    again = f"; {before % batch} images are seen again" if before % batch else ""
    _log.info(
        "the checkpoint's step %d of %d images is step %d of %d images%s",
        saved["step"],
        saved["global_batch"],
        progress.step,
        batch,
        again,
    )
    return progress


def _data_changes(run: RunIdentity, state: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns what differs between the data a checkpoint was trained on and the run's: (in training, in validation).

    Older checkpoints do not tell.
    """
    found = []
    classes = tuple(state.get("classes", run.classes))
    if run.config.task.options.classifies and classes != run.classes:
        gone = [name for name in classes if name not in run.classes]
        new = [name for name in run.classes if name not in classes]
        pairs = (("without", gone), ("new", new))
        parts = [f"{text} {', '.join(map(repr, names[:3]))}" for text, names in pairs if names]
        found.append(f"classes: {', '.join(parts) or 'another order'}")
    digests = state.get("data_digest", {})
    changed = [split for split, digest in run.digests.items() if digests.get(split, digest) != digest]
    if found:  # the digests hold the class names too
        return found, []
    told = {split: [f"data: other images, file names or labels in {split}"] for split in changed}
    return told.get("train", []), told.get("val", [])


def _provenance(index: Index) -> dict[str, Any]:
    path = index.path / _PROVENANCE
    try:
        return _flat(nested(json.loads(path.read_bytes()).get("config") or {}, source=str(path)))
    except (OSError, ValueError, AttributeError):  # nothing that is loaded depends on it
        return {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value, as JSON holds it."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _idle(flat: dict[str, Any]) -> set[str]:
    """Returns the options of a network, dotted, that have no effect on what it computes, by what it is."""
    name, idle = flat.get("model.name"), set[str]()
    if not any(block >= 0 for stage in flat.get("model.moe.blocks", [[0]]) for block in stage):
        idle |= {key for key in flat if key.startswith("model.moe.")}
    if name not in VARIANTS:
        return idle
    if VARIANTS[name].bias != "log_cpb" or not any(flat.get("model.pretrained_window_sizes", [])):
        idle.add("model.pretrained_window_sizes")
    if VARIANTS[name].scores != "dot":
        idle.add("model.qk_scale")
    return idle


def _word(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value or '""'
