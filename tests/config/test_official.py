"""Official yacs files, unchanged, against our configs of the same name."""

import logging
import re
from pathlib import Path

import pytest

from swin_moe.config import Config
from swin_moe.config.coerce import schema_keys
from swin_moe.config.io import load_config
from swin_moe.config.official import OFFICIAL

FILES = sorted((Path(__file__).parents[1] / "golden" / "official_configs").glob("*.yaml"))
MOE = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"


def load(tmp_path: Path, text: str, name: str = "mine", **options) -> Config:
    (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / f"{name}.yaml", **options)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_official_files_equal_our_configs(path):
    assert load_config(path) == load_config(path.stem)


def test_every_rule_names_a_key_of_ours_or_a_reason():
    ours = set(schema_keys(Config))
    for key, rule in OFFICIAL.items():
        assert [bool(told) for told in (rule.key, rule.into, rule.why)].count(True) == 1, key
        assert set(filter(None, (rule.key, *rule.into.split(", ")))) <= ours, key


def test_an_empty_official_section_gives_the_official_defaults(tmp_path):
    config = load(tmp_path, "DATA: {}")
    assert (config.model.name, config.model.embed_dim, config.model.window_size) == ("swin", 96, 7)
    assert (config.optim.lr, config.optim.lr_reference_batch, config.data.global_batch) == (5e-4, 512, 1024)
    assert (config.engine.precision, config.data.workers, config.run.name) == ("fp16", 8, "mine")


@pytest.mark.parametrize(
    ("local", "world", "name", "experts"),
    [
        (2, 8, "x", 16),
        (-4, 32, "x", 8),
        (1, None, "x_64gpu_22k", 64),
        (-2, None, "y_32gpu", 16),
        (1, 4, "x_64gpu_22k", 64),
    ],
)
def test_local_experts_become_a_global_number(tmp_path, local, world, name, experts):
    text = f"MODEL: {{TYPE: swin_moe, SWIN_MOE: {{NUM_LOCAL_EXPERTS: {local}, MOE_BLOCKS: [[1], [-1], [0], [-1]]}}}}"
    config = load(tmp_path, text, name, world_size=world)
    assert config.model.moe.num_experts == experts
    assert config.model.moe.blocks == ((1,), (-1,), (0,), (-1,))


def test_experts_without_a_world_need_the_global_number(tmp_path):
    text = "MODEL: {TYPE: swin_moe, SWIN_MOE: {MOE_BLOCKS: [[1], [-1], [-1], [-1]]}}"
    with pytest.raises(ValueError, match=r"NUM_LOCAL_EXPERTS=1 is per GPU.*model\.moe\.num_experts"):
        load(tmp_path, text)
    assert load(tmp_path, text, overrides=["model.moe.num_experts=12"]).model.moe.num_experts == 12
    assert load(tmp_path, "base: mine\nmodel: {moe: {num_experts: 6}}", "ours").model.moe.num_experts == 6
    with pytest.raises(ValueError, match="does not fit 32 ranks"):
        load(tmp_path, text.replace("{MOE", "{NUM_LOCAL_EXPERTS: -5, MOE"), world_size=32)


def test_the_batch_is_per_gpu_where_the_world_is_stated(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert load(tmp_path, "DATA: {DATASET: imagenet22K}").data.global_batch == 4096
    assert "data.global_batch=4096 from the published recipe" in caplog.text
    assert load(tmp_path, "DATA: {}", world_size=3).data.global_batch == 384
    data = load(tmp_path, "DATA: {BATCH_SIZE: 64}\nTRAIN: {ACCUMULATION_STEPS: 2}", world_size=8).data
    assert (data.global_batch, data.micro_batch) == (1024, 64)
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE=64.*data\.global_batch"):
        load(tmp_path, "DATA: {BATCH_SIZE: 64}")
    assert load(tmp_path, "DATA: {BATCH_SIZE: 64}", overrides=["data.global_batch=640"]).data.global_batch == 640


def test_a_world_in_the_name_counts_before_the_stated_one():
    path = next(p for p in FILES if p.stem == MOE)
    assert load_config(path, world_size=2) == load_config(path)


def test_base_files_and_overrides(tmp_path):
    (tmp_path / "parent.yaml").write_text(
        "MODEL: {TYPE: swinv2, SWINV2: {EMBED_DIM: 128, NUM_HEADS: [4, 8, 16, 32]}}\nTAG: t"
    )
    config = load(
        tmp_path,
        "BASE: ['parent.yaml']\nMODEL: {SWINV2: {WINDOW_SIZE: 9}}",
        overrides=["optim.epochs=1", "optim.warmup_epochs=0"],
    )
    assert (config.model.name, config.model.embed_dim, config.model.window_size) == ("swinv2", 128, 9)
    assert (config.optim.epochs, config.run.name) == (1.0, "mine_t")


def test_values_written_as_python(tmp_path):
    train = "TRAIN: {BASE_LR: 2e-05, OPTIMIZER: {BETAS: '(0.9, 0.98)'}}"
    config = load(tmp_path, f"MODEL: {{SWIN: {{QK_SCALE: None}}}}\n{train}\nAUG: {{AUTO_AUGMENT: none}}")
    assert (config.model.qk_scale, config.optim.lr, config.optim.betas) == (None, 2e-5, (0.9, 0.98))
    assert config.data.auto_augment == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TRAIN: {EPOCH: 3}", "unknown official key 'TRAIN.EPOCH'; did you mean TRAIN.EPOCHS"),
        ("TRAIN: {EPOCHS: many}", "TRAIN.EPOCHS must be of type int"),
        ("TRAIN: {USE_CHECKPOINT: 1}", "TRAIN.USE_CHECKPOINT must be of type bool"),
        ("MODEL: {TYPE: vit}", "MODEL.TYPE must be one of swin, swinv2, swin_moe, swin_mlp, got 'vit'"),
        ("MODEL: {RESUME: a.pth}", "MODEL.RESUME must be '', got 'a.pth': .*checkpoint.load=PATH"),
        ("AUG: {MIXUP_MODE: elem}", "AUG.MIXUP_MODE must be 'batch'"),
        ("TRAIN: {OPTIMIZER: {NAME: fused_lamb}}", "TRAIN.OPTIMIZER.NAME must be one of"),
        ("TRAIN: {LR_SCHEDULER: {NAME: cosin}}", "optim.schedule must be one of"),
        ("DATA: {DATASET: cifar}", "DATA.DATASET must be one of imagenet, imagenet22K, got 'cifar'"),
        ("DATA: {CACHE_MODE: never}", "DATA.CACHE_MODE must be one of no, full, part, got 'never'"),
        ("DATA: {}\nmodel: {embed_dim: 1}", "unknown official key 'model.embed_dim'"),
        ("BASE: [gone.yaml]", "BASE file 'gone.yaml' does not exist"),
        ("BASE: [mine.yaml]\nDATA: {}", "BASE files form a cycle"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, said):
    with pytest.raises(ValueError, match=f"mine.yaml: .*{said}"):
        load(tmp_path, text)


def test_two_official_files_that_share_a_name_do_not_share_a_run():
    names = [load_config(p).run.name for p in FILES]
    assert names == [p.stem for p in FILES]


def test_moe_file_in_full():
    moe = load_config(next(p for p in FILES if p.stem == MOE)).model.moe
    assert (moe.num_experts, moe.top_k, moe.capacity_factor, moe.eval_capacity_factor) == (8, 1, 1.25, 0.0)
    assert (moe.router, moe.balance_loss, moe.batch_prioritized, moe.dropout) == (
        "linear",
        "load_importance",
        True,
        0.1,
    )


def test_simmim_pretraining_resizes_bilinear(tmp_path):
    text = "MODEL: {NAME: simmim_pretrain}\nDATA: {IMG_SIZE: 192, INTERPOLATION: bicubic}"
    assert load(tmp_path, text).data.interpolation == "bilinear"
    assert load_config("simmim_pretrain__swin_base__img192_window6__800ep").data.interpolation == "bilinear"
    assert load(tmp_path, "DATA: {INTERPOLATION: random}").data.interpolation == "random"
    assert load_config("simmim_finetune__swin_base__img224_window7__800ep").data.interpolation == "bicubic"


@pytest.mark.parametrize(
    "name",
    ["base_moby", "base_linear_probe", "moby_linear_swin_tiny_patch4_window7_224_100ep", "base_simmim_pretrain"]
    + ["moby_swin_tiny_patch4_window7_224_300ep", "swinv2_giant_3b_patch4_window12_192_simmim"],
)
def test_configs_of_torchvisions_transforms_resize_bilinear(name):
    """SimMIM's, MoBY's and its linear evaluation's transforms name no interpolation, so torchvision's default holds."""
    assert load_config(name).data.interpolation == "bilinear"


@pytest.mark.parametrize("size, resize", [(32, False), (33, True), (224, True)])
def test_small_images_are_not_resized(tmp_path, size, resize):
    assert load(tmp_path, f"DATA: {{IMG_SIZE: {size}}}").data.resize is resize


def test_the_optimizers_name_ignores_case(tmp_path):
    names = {"AdamW": "adamw", "SGD": "sgd", "Fused_Adam": "adamw"}
    for theirs, ours in names.items():
        assert load(tmp_path, f"TRAIN: {{OPTIMIZER: {{NAME: {theirs}}}}}").optim.name == ours


def test_keys_that_change_nothing_are_told(tmp_path, caplog):
    text = "TRAIN: {MOE: {SAVE_MASTER: true}}\n"
    text += "DATA: {CACHE_MODE: full, PIN_MEMORY: true}\nMODEL: {NUM_CLASSES: 7}"
    with caplog.at_level(logging.INFO):
        load(tmp_path, text)
    told = ("TRAIN.MOE.SAVE_MASTER=True", "DATA.CACHE_MODE='full'")
    for text in (*told, "MODEL.NUM_CLASSES=7"):
        assert f"{text} is ignored: " in caplog.text
    assert "PIN_MEMORY" not in caplog.text  # as it is anyway


def test_the_start_epoch_is_ours(tmp_path):
    assert load(tmp_path, "TRAIN: {START_EPOCH: 3}").optim.start_epoch == 3
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match="optim.start_epoch must be (>= 0|in .0, 300)"):
            load(tmp_path, f"TRAIN: {{START_EPOCH: {wrong}}}")


def test_when_to_save_and_whether_to_resume(tmp_path):
    checkpoint = load(tmp_path, "SAVE_FREQ: 5\nTRAIN: {AUTO_RESUME: false}").checkpoint
    assert (checkpoint.every_epochs, checkpoint.resume) == (5.0, "never")
    checkpoint = load(tmp_path, "DATA: {}").checkpoint
    assert (checkpoint.every_epochs, checkpoint.resume) == (1.0, "auto")


@pytest.mark.parametrize(
    "text, instead",
    [
        ("MODEL: {PRETRAINED: a.pth}", "checkpoint.init"),
        ("MODEL: {RESUME: a.pth}", "checkpoint.load"),
        ("DATA: {INTERPOLATION: lanczos}", "bicubic is the nearest"),
        ("DATA: {INTERPOLATION: hamming}", "bicubic is the nearest"),
        ("AUG: {MIXUP_MODE: pair}", "leave the key out"),
        ("AUG: {CUTMIX_MINMAX: [0.2, 0.8]}", "task.classify.cutmix"),
        ("TRAIN: {OPTIMIZER: {NAME: fused_lamb}}", "adamw"),
        ("EVAL_MODE: true", "swin-moe evaluate"),
    ],
)
def test_refused_options_name_what_to_use_instead(tmp_path, text, instead):
    with pytest.raises(ValueError, match=re.escape(instead)):
        load(tmp_path, text + ("" if "DATA" in text else "\nDATA: {}"))
