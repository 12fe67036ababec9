"""The yacs YAML files of microsoft/Swin-Transformer as our options: one table, official key -> ours.

Every official key (config.py there) is in the table with its default: mapped, ignored for a stated reason, or accepted
with one value only. Facts: official repository at f82860b, config.py, data/build.py, main*.py.
"""

import ast
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTIONS = ("BASE", "DATA", "MODEL", "TRAIN", "AUG", "TEST")  # either marks a file as official
FAMILIES = {"swin": "SWIN", "swinv2": "SWINV2", "swin_moe": "SWIN_MOE", "swin_mlp": "SWIN_MLP"}
CLASSES = {"imagenet": 1000, "imagenet22K": 21841}  # data/build.py: the data set decides, not MODEL.NUM_CLASSES
LR_REFERENCE_BATCH = 512  # main.py scales BASE_LR, WARMUP_LR and MIN_LR by global batch / 512


@dataclass(frozen=True)
class Rule:
    """What becomes of one official key.

    Attributes:
        default: The official default; its type is the type allowed.
        key: Our key, or "" where `why` says what happens instead.
        convert: Official value -> ours; of an ignored key, whether the official code knows the value.
        into: Our keys that it becomes together with other official keys.
        why: Why the key is ignored.
        only: Any value but the default is an error (for `why`).
    """

    default: Any
    key: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    why: str = ""
    only: bool = False
    into: str = ""


def _one_of(**choices: Any) -> Callable[[Any], Any]:
    """Returns a conversion that allows just these words; it raises ValueError listing them."""

    def convert(value: str) -> Any:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[value]

    return convert


def _optimizer(value: str) -> str:
    """Returns optim.name; the official optimizer.py ignores case."""
    known = {"adamw": "adamw", "fused_adam": "adamw", "sgd": "sgd"}
    if value.lower() not in known:
        instead = "; adamw is its nearest here" if value.lower() == "fused_lamb" else ""
        raise ValueError(f"one of {', '.join(known)}{instead}")
    return known[value.lower()]


def _resampling(value: str) -> str:
    """Returns data.interpolation; the official data/build.py reads any word it does not know as bilinear."""
    if value not in ("bicubic", "bilinear", "random"):
        instead = "; bicubic is the nearest of them to it" if value in ("lanczos", "hamming") else ""
        raise ValueError(f"one of bicubic, bilinear, random{instead}")
    return value


_CACHE = "samples are drawn in one global order, so no rank owns a part; files once read stay in the system's cache"
_EXACT_EVAL = "evaluation counts every image exactly once, in any order"
_COMMAND = "a command of its own (swin-moe evaluate, swin-moe throughput)"
_OTHER_MODEL = "set checkpoint.init=FILE instead, which a new run begins with (swin_moe.load_official in Python)"
_OTHER_RUN = "set checkpoint.load=PATH instead (swin-moe checkpoint convert --to native makes one of an official file)"
_SMALL_IMAGE = 32  # pixels; data/build.py pads and crops images up to this size and does not resize them

OFFICIAL: dict[str, Rule] = {
    "DATA.BATCH_SIZE": Rule(128, into="data.global_batch, data.micro_batch"),
    "DATA.DATA_PATH": Rule("", into="data.path"),
    "DATA.DATASET": Rule("imagenet", into="data.name, model.num_classes"),
    "DATA.IMG_SIZE": Rule(224, "model.img_size"),
    "DATA.INTERPOLATION": Rule("bicubic", "data.interpolation", _resampling),
    "DATA.ZIP_MODE": Rule(False, into="data.name"),
    "DATA.CACHE_MODE": Rule("part", convert=_one_of(no="no", full="full", part="part"), why=_CACHE),
    "DATA.PIN_MEMORY": Rule(True, why="memory is pinned where a GPU is used"),
    "DATA.NUM_WORKERS": Rule(8, "data.workers"),
    "DATA.MASK_PATCH_SIZE": Rule(32, "task.simmim.mask_patch_size"),
    "DATA.MASK_RATIO": Rule(0.6, "task.simmim.mask_ratio"),
    "MODEL.TYPE": Rule("swin", "model.name", _one_of(**{name: name for name in FAMILIES})),
    "MODEL.NAME": Rule("swin_tiny_patch4_window7_224", why="run.name is the file's name, as two files share a NAME"),
    "MODEL.PRETRAINED": Rule("", why=_OTHER_MODEL, only=True),
    "MODEL.RESUME": Rule("", why=_OTHER_RUN, only=True),
    "MODEL.NUM_CLASSES": Rule(1000, why="the data set decides, as in the official data/build.py"),
    "MODEL.DROP_RATE": Rule(0.0, "model.drop_rate"),
    "MODEL.DROP_PATH_RATE": Rule(0.1, "model.drop_path_rate"),
    "MODEL.LABEL_SMOOTHING": Rule(0.1, "task.classify.label_smoothing"),
    "MODEL.SIMMIM.NORM_TARGET.ENABLE": Rule(False, into="task.simmim.target_window"),
    "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE": Rule(47, into="task.simmim.target_window"),
    "TRAIN.START_EPOCH": Rule(0, "optim.start_epoch"),
    "TRAIN.EPOCHS": Rule(300, "optim.epochs"),
    "TRAIN.WARMUP_EPOCHS": Rule(20, "optim.warmup_epochs"),
    "TRAIN.WEIGHT_DECAY": Rule(0.05, "optim.weight_decay"),
    "TRAIN.BASE_LR": Rule(5e-4, "optim.lr"),
    "TRAIN.WARMUP_LR": Rule(5e-7, "optim.warmup_lr"),
    "TRAIN.MIN_LR": Rule(5e-6, "optim.min_lr"),
    "TRAIN.CLIP_GRAD": Rule(5.0, "optim.clip_norm"),
    "TRAIN.AUTO_RESUME": Rule(True, "checkpoint.resume", lambda on: "auto" if on else "never"),
    "TRAIN.ACCUMULATION_STEPS": Rule(1, into="data.global_batch, data.micro_batch"),
    "TRAIN.USE_CHECKPOINT": Rule(False, "parallel.recompute", lambda on: "block" if on else "none"),
    "TRAIN.LR_SCHEDULER.NAME": Rule("cosine", "optim.schedule"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Rule(30, "optim.decay_epochs"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Rule(0.1, into="optim.decay_rate"),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": Rule(True, "optim.warmup_prefix"),
    "TRAIN.LR_SCHEDULER.GAMMA": Rule(0.1, into="optim.decay_rate"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": Rule([], "optim.milestones"),
    "TRAIN.OPTIMIZER.NAME": Rule("adamw", "optim.name", _optimizer),
    "TRAIN.OPTIMIZER.EPS": Rule(1e-8, "optim.eps"),
    "TRAIN.OPTIMIZER.BETAS": Rule([0.9, 0.999], "optim.betas"),
    "TRAIN.OPTIMIZER.MOMENTUM": Rule(0.9, "optim.momentum"),
    "TRAIN.LAYER_DECAY": Rule(1.0, "optim.layer_decay"),
    "TRAIN.MOE.SAVE_MASTER": Rule(False, why="one checkpoint format: dense tensors once, experts by global number"),
    "AUG.COLOR_JITTER": Rule(0.4, "data.color_jitter"),
    "AUG.AUTO_AUGMENT": Rule("rand-m9-mstd0.5-inc1", "data.auto_augment", lambda v: "" if v == "none" else v),
    "AUG.REPROB": Rule(0.25, "data.erase_prob"),
    "AUG.REMODE": Rule("pixel", "data.erase_mode"),
    "AUG.RECOUNT": Rule(1, "data.erase_count"),
    "AUG.MIXUP": Rule(0.8, "task.classify.mixup"),
    "AUG.CUTMIX": Rule(1.0, "task.classify.cutmix"),
    "AUG.CUTMIX_MINMAX": Rule(
        None, why="cutmix draws its area from Beta(a, a); set a by task.classify.cutmix", only=True
    ),
    "AUG.MIXUP_PROB": Rule(1.0, "task.classify.mix_prob"),
    "AUG.MIXUP_SWITCH_PROB": Rule(0.5, "task.classify.mix_switch_prob"),
    "AUG.MIXUP_MODE": Rule(
        "batch", why="pair and elem depend on how ranks cut the batch; leave the key out", only=True
    ),
    "TEST.CROP": Rule(True, "data.eval_crop"),
    "TEST.SEQUENTIAL": Rule(False, why=_EXACT_EVAL),
    "TEST.SHUFFLE": Rule(False, why=_EXACT_EVAL),
    "ENABLE_AMP": Rule(False, why="the SimMIM scripts overwrite it; AMP_ENABLE decides"),
    "AMP_ENABLE": Rule(True, "engine.precision", lambda on: "fp16" if on else "fp32"),
    "AMP_OPT_LEVEL": Rule("", why="deprecated and without effect in a file"),
    "OUTPUT": Rule("", "run.output", lambda v: v or "output"),
    "TAG": Rule("default", into="run.name"),
    "SAVE_FREQ": Rule(1, "checkpoint.every_epochs"),
    "PRINT_FREQ": Rule(10, "log.every"),
    "SEED": Rule(0, "run.seed"),
    "EVAL_MODE": Rule(False, why=_COMMAND, only=True),
    "THROUGHPUT_MODE": Rule(False, why=_COMMAND, only=True),
    "LOCAL_RANK": Rule(0, why="the launcher's"),
    "FUSED_WINDOW_PROCESS": Rule(False, why="fast kernels are used where they are built"),
    "FUSED_LAYERNORM": Rule(False, why="fast kernels are used where they are built"),
}

_SHARED = {
    "PATCH_SIZE": Rule(4, "model.patch_size"),
    "IN_CHANS": Rule(3, "model.in_chans"),
    "EMBED_DIM": Rule(96, "model.embed_dim"),
    "DEPTHS": Rule([2, 2, 6, 2], "model.depths"),
    "NUM_HEADS": Rule([3, 6, 12, 24], "model.num_heads"),
    "WINDOW_SIZE": Rule(7, "model.window_size"),
    "MLP_RATIO": Rule(4.0, "model.mlp_ratio"),
    "APE": Rule(False, "model.ape"),
    "PATCH_NORM": Rule(True, "model.patch_norm"),
}
_QKV = {"QKV_BIAS": Rule(True, "model.qkv_bias")}
_SCALE = {"QK_SCALE": Rule(None, "model.qk_scale")}
_WINDOWS = {"PRETRAINED_WINDOW_SIZES": Rule([0, 0, 0, 0], "model.pretrained_window_sizes")}
_MOE = {
    "MLP_FC2_BIAS": Rule(True, "model.mlp_fc2_bias"),
    "INIT_STD": Rule(0.02, "model.init_std"),
    "MOE_BLOCKS": Rule([[-1], [-1], [-1], [-1]], "model.moe.blocks"),
    "NUM_LOCAL_EXPERTS": Rule(1, into="model.moe.num_experts"),
    "TOP_VALUE": Rule(1, "model.moe.top_k"),
    "CAPACITY_FACTOR": Rule(1.25, "model.moe.capacity_factor"),
    "COSINE_ROUTER": Rule(False, "model.moe.router", lambda on: "cosine" if on else "linear"),
    "NORMALIZE_GATE": Rule(False, "model.moe.normalize_gate"),
    "USE_BPR": Rule(True, "model.moe.batch_prioritized"),
    "IS_GSHARD_LOSS": Rule(False, "model.moe.balance_loss", lambda on: "gshard" if on else "load_importance"),
    "GATE_NOISE": Rule(1.0, "model.moe.gate_noise"),
    "COSINE_ROUTER_DIM": Rule(256, "model.moe.cosine_dim"),
    "COSINE_ROUTER_INIT_T": Rule(0.5, "model.moe.cosine_init_t"),
    "MOE_DROP": Rule(0.0, "model.moe.dropout"),
    "AUX_LOSS_WEIGHT": Rule(0.01, "model.moe.aux_loss_weight"),
}
for _family, _rules in {
    "SWIN": _SHARED | _QKV | _SCALE,
    "SWINV2": _SHARED | _QKV | _WINDOWS,
    "SWIN_MOE": _SHARED | _QKV | _SCALE | _WINDOWS | _MOE,
    "SWIN_MLP": _SHARED,
}.items():
    OFFICIAL |= {f"MODEL.{_family}.{name}": rule for name, rule in _rules.items()}

# data_simmim_pt.py: random-resized crop and flip, nothing else; models/simmim.py: no head.
SIMMIM_PRETRAIN = {
    "task.name": "simmim",
    "task.classify.label_smoothing": 0.0,
    "task.classify.mixup": 0.0,
    "task.classify.cutmix": 0.0,
    "model.num_classes": 0,
    "data.interpolation": "bilinear",  # data_simmim_pt.py leaves torchvision's default, whatever the file says
    "data.crop_scale": [0.67, 1.0],
    "data.color_jitter": 0.0,
    "data.auto_augment": "",
    "data.erase_prob": 0.0,
}


def is_official(tree: dict) -> bool:
    """Returns True if a YAML tree has top-level sections of the official repository."""
    return any(section in tree for section in SECTIONS)


def our_key(official: str) -> str:
    """Returns what an official key is here, as the end of a sentence about it; "" for a key that is not official."""
    rule = OFFICIAL.get(official)
    if rule is None:
        return ""
    if rule.key or rule.into:
        return f", a key of the official files; here it is {rule.key or rule.into}"
    return f", a key of the official files that is not offered here: {rule.why}"


def convert_official(
    tree: dict,
    *,
    path: Path,
    world_size: int | None,
    given: frozenset[str] = frozenset(),
    notes: list[str] | None = None,
) -> dict:
    """Returns our tree for an official one; every key of the official defaults is filled.

    Args:
        tree: The file's YAML over that of its BASE files.
        path: The file, for errors, run.name and the ranks in its name (`..._32expert_32gpu_...`).
        world_size: Ranks the file was written for, where its name does not tell; None = the published recipe.
        given: Our keys that are set from elsewhere, which need no conversion.
        notes: Gets one sentence per choice the file does not make.

    Raises:
        ValueError: An unknown key, a wrong type, a value not offered here, or a number of experts that is not known.
    """
    notes = [] if notes is None else notes
    stated = {key: _decode(key, value) for key, value in leaves(tree)}
    _check(stated, path)
    values = {key: rule.default for key, rule in OFFICIAL.items()} | stated
    family = FAMILIES.get(values["MODEL.TYPE"], "")
    flat: dict[str, Any] = {"optim.lr_reference_batch": LR_REFERENCE_BATCH, "run.name": path.stem}
    for key, rule in OFFICIAL.items():
        parts = key.split(".")
        if len(parts) < 3 or parts[0] != "MODEL" or parts[1] == family:
            try:
                value = rule.convert(values[key])
            except ValueError as error:
                raise ValueError(f"{path}: {key} must be {error}, got {values[key]!r}") from None
            if rule.key:
                flat[rule.key] = value
        if key in stated and stated[key] != rule.default and rule.why and not rule.only:
            notes.append(f"{key}={stated[key]!r} is ignored: {rule.why}")
    if values["TAG"] not in ("default", path.stem):
        flat["run.name"] = f"{path.stem}_{values['TAG']}"
    multistep = values["TRAIN.LR_SCHEDULER.NAME"] == "multistep"
    flat["optim.decay_rate"] = values["TRAIN.LR_SCHEDULER." + ("GAMMA" if multistep else "DECAY_RATE")]
    flat |= _dataset(values, path)
    if values["MODEL.NAME"] == "simmim_pretrain":
        flat |= SIMMIM_PRETRAIN
        if values["MODEL.SIMMIM.NORM_TARGET.ENABLE"]:
            flat["task.simmim.target_window"] = values["MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE"]
    elif values["DATA.IMG_SIZE"] <= _SMALL_IMAGE:
        flat["data.resize"] = False
    named = _world_in_name(path)
    world = named or world_size
    if "data.global_batch" not in given:
        flat |= _batch(values, stated, world, named is not None, path, notes)
    if family == "SWIN_MOE" and "model.moe.num_experts" not in given:
        flat["model.moe.num_experts"] = _experts(values, world, path)
    return nest(flat)


def _decode(key: str, value: Any) -> Any:
    """Returns a string such as "None" or "(0.9, 0.98)" as the Python value that yacs reads it as."""
    if not isinstance(value, str) or key not in OFFICIAL or isinstance(OFFICIAL[key].default, str):
        return value
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return list(value) if isinstance(value, tuple) else value


def _check(stated: dict[str, Any], path: Path) -> None:
    """Raises ValueError for a key that is not official, a value of another type, or one that is not offered."""
    for key, value in stated.items():
        rule = OFFICIAL.get(key)
        if rule is None:
            near = difflib.get_close_matches(key, OFFICIAL, n=2)
            raise ValueError(
                f"{path}: unknown official key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        if rule.only and value != rule.default:
            raise ValueError(f"{path}: {key} must be {rule.default!r}, got {value!r}: {rule.why}")
        kind = type(rule.default)
        allowed = {float: (float, int), list: (list,), int: (int,)}.get(kind, (kind,))
        right = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        if rule.default is not None and not right:
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, as {rule.default!r}, got {value!r}")


def _dataset(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns data.name, data.path and the number of classes, which the official code takes from the data set."""
    name = values["DATA.DATASET"]
    if name not in CLASSES:
        raise ValueError(f"{path}: DATA.DATASET must be one of {', '.join(CLASSES)}, got {name!r}")
    ours = "imagenet22k" if name == "imagenet22K" else "zip" if values["DATA.ZIP_MODE"] else "folder"
    folder = "data/imagenet22k" if name == "imagenet22K" else "data/imagenet"
    return {"data.name": ours, "data.path": values["DATA.DATA_PATH"] or folder, "model.num_classes": CLASSES[name]}


def _batch(values: dict, stated: dict, world: int | None, named: bool, path: Path, notes: list[str]) -> dict[str, int]:
    """Returns the global batch: BATCH_SIZE x ranks x accumulation, or without stated ranks the published recipe's."""
    images, steps = values["DATA.BATCH_SIZE"], values["TRAIN.ACCUMULATION_STEPS"]
    states_batch = "DATA.BATCH_SIZE" in stated or "TRAIN.ACCUMULATION_STEPS" in stated
    if states_batch and world is None:
        raise ValueError(
            f"{path}: DATA.BATCH_SIZE={images} x TRAIN.ACCUMULATION_STEPS={steps} is per GPU and the number of GPUs is "
            f"not known; set data.global_batch (or pass world_size)"
        )
    # A world in the name says nothing of the batch: the 64-GPU file was trained with 4096 images, not 64 x 128.
    if world is not None and (states_batch or not named):
        return {"data.global_batch": images * world * steps, "data.micro_batch": images if steps > 1 else 0}
    batch = _recipe_batch(values)
    notes.append(f"data.global_batch={batch} from the published recipe: the file states neither BATCH_SIZE nor ranks")
    return {"data.global_batch": batch, "data.micro_batch": 0}


def _recipe_batch(values: dict[str, Any]) -> int:
    """Returns images per step of the published recipes: get_started.md, the files' comments, SimMIM's paper."""
    if values["MODEL.NAME"].startswith("simmim_"):
        return 2048
    return 4096 if values["DATA.DATASET"] == "imagenet22K" else 1024


def _world_in_name(path: Path) -> int | None:
    match = re.search(r"_(\d+)gpu(?:_|$)", path.stem)
    return int(match[1]) if match else None


def _experts(values: dict[str, Any], world: int | None, path: Path) -> int:
    """Returns the global number of experts: n > 0 local experts a rank, n < 0 ranks that share one."""
    key = "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS"
    local = values[key]
    if not any(index >= 0 for stage in values["MODEL.SWIN_MOE.MOE_BLOCKS"] for index in stage):
        return 8  # no MoE block: the schema's default, without effect
    if world is None:
        raise ValueError(
            f"{path}: {key}={local} is per GPU and the number of GPUs is not known, neither from the file's name "
            f"(..._32gpu_...) nor stated; set model.moe.num_experts (or pass world_size)"
        )
    if local == 0 or (local < 0 and world % -local):
        raise ValueError(
            f"{path}: {key}={local} does not fit {world} ranks: allowed are n > 0, and -n that divides the ranks"
        )
    return world * local if local > 0 else world // -local


def leaves(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns (dotted key, value) of every leaf."""
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return out


def nest(flat: dict[str, Any]) -> dict:
    """Returns dotted keys as a tree."""
    tree: dict = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree
