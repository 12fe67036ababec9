"""Every command of README and docs, and what executes it: a row here (tests/docs/test_documented.py runs it), another
test, or nothing here, and then why.

A command of a page that has no row fails a test. Words that stand for something (CONFIG, RUN) are filled in.
"""

SMALL = "model.embed_dim=8 model.num_heads=[1,2] data.images_per_class=4 data.global_batch=20 model.moe.group_images=20"
SMALL += " optim.epochs=1 optim.warmup_epochs=0 log.tensorboard=false"
LOADED = f"digits_swin_moe checkpoint.load=output/digits {SMALL}"
PROGRAM = "-- -m swin_moe.train digits_swin_moe"

# As it stands in a page -> as it is run ("" = as it stands), in a folder with photos, new/, output/digits (SMALL) and
# mine.yaml, a file of a machine.
RUN = {
    "swin-moe launch script --scheduler slurm --nodes 2 ... -- ...": (
        f"launch script --scheduler slurm --nodes 2 {PROGRAM}"
    ),
    "swin-moe evaluate CONFIG checkpoint.load=PATH": f"evaluate {LOADED}",
    "swin-moe evaluate-features CONFIG checkpoint.load=PATH": f"evaluate-features {LOADED} --draws 1",
    "swin-moe data check": "data check photos",
    "swin-moe predict CONFIG": f"predict {LOADED} new/0.png",
    "swin-moe plan CONFIG --gpus 64 --hardware a100_80": "plan digits_swin_moe --gpus 64 --hardware a100_80",
    "swin-moe report RUN ...": "report output/digits",
    "swin-moe inspect-routing CONFIG checkpoint.load=PATH IMAGE ...": f"inspect-routing {LOADED} --images 1",
    "swin-moe train CONFIG key=value ...": f"train digits_swin_moe run.name=again {SMALL}",
    "swin-moe completion bash": "completion bash",
    "swin-moe configs [WORD ...]": "configs digits",
    "swin-moe show CONFIG key=value ...": "show digits_swin_moe optim.lr=1",
    "swin-moe weights list": "weights list",
    "swin-moe checkpoint inspect": "checkpoint inspect output/digits",
    "swin-moe checkpoint reshard RUN/checkpoints/0000010000 OUT --world 16 --expert 4": (
        "checkpoint reshard output/digits resharded --world 16 --expert 4"
    ),
    "swin-moe train CONFIG model.attention=auto": f"train digits_swin_moe run.name=auto model.attention=auto {SMALL}",
    "swin-moe doctor": "doctor --no-measure",
    "swin-moe predict RUN engine.optimize=true engine.precision=bf16 photo.jpg": (
        "predict output/digits engine.optimize=true engine.precision=bf16 new/0.png"
    ),
    "swin-moe predict RUN engine.optimize=int8 engine.precision=bf16 photo.jpg": (
        "predict output/digits engine.optimize=int8 engine.precision=bf16 new/0.png"
    ),
    "swin-moe evaluate CONFIG checkpoint.load=PATH model.moe.eval_capacity_factor=0.625": (
        f"evaluate {LOADED} model.moe.eval_capacity_factor=0.625"
    ),
    "swin-moe data split photos --out photos_split": "data split photos --out photos_split",
    "swin-moe simulate CONFIG --gpus 16384 --hardware a100_80 --spread 0.5 --leaf 16 --oversubscription 4": (
        "simulate digits_swin_moe --gpus 64 --hardware a100_80 --spread 0.5 --leaf 16 --oversubscription 4 "
        "data.global_batch=4096"
    ),
    "swin-moe throughput CONFIG data.name=synthetic": f"throughput digits_swin_moe data.name=synthetic {SMALL}",
    "swin-moe train CONFIG parallel=auto parallel.hardware=h100": (
        f"train digits_swin_moe run.name=planned parallel=auto parallel.hardware=h100 {SMALL}"
    ),
    "swin-moe plan digits_swin_moe --gpus 2 --hardware mine.yaml": "",
    "swin-moe plan swinv2_giant_3b_patch4_window12_192_22k --gpus 512 --hardware a100_80 engine.precision=bf16": "",
    "swin-moe plan swin_moe_base_patch4_window12_192_32expert_32gpu_22k --gpus 32 --hardware h100 --json": "",
}
# Those that take longer: with --full.
LONG = (
    "swin-moe plan swin",
    "swin-moe simulate",
    "swin-moe doctor",
    "swin-moe evaluate-features",
    "swin-moe predict RUN",
)

# The same of commands that start ranks, or are no `swin-moe`: each in a process of its own.
STARTED = {
    "swin-moe launch -n 8 -- -m swin_moe.train CONFIG key=value ...": (
        f"swin-moe launch -n 2 {PROGRAM} run.name=ranks {SMALL}"
    ),
    "swin-moe launch -n 4 -- -m swin_moe.train digits_swin_moe engine.name=deepspeed parallel.zero=2": (
        f"swin-moe launch -n 2 {PROGRAM} engine.name=deepspeed parallel.zero=2 run.name=deepspeed {SMALL}"
    ),
    "python -m launcher -n 4 --log-dir logs -- -m swin_moe.train CONFIG": (
        f"python -m launcher -n 2 --log-dir logs {PROGRAM} run.name=logged {SMALL}"
    ),
    "python -m launcher script --scheduler slurm --nodes 2 --ranks-per-node 4 --cores-per-rank 8 --gpus-per-node 4 "
    "--time 8:00:00 --queue gpu --account lab --name swin -o swin.slurm -- -m swin_moe.train "
    "swin_moe_base_patch4_window12_192_32expert_32gpu_22k run.name=first": "",
}

CLUSTER, DOWNLOAD, HOURS, FORM = "needs several machines", "needs a download", "trains for hours", "a form, no command"
MINUTES = "measures for minutes; its parts are tested with small figures"
COCO, GPUS = "needs COCO, or other data of the reader's", "needs GPUs"
PHOTOS = "tests/docs/test_commands_in_docs.py"
ELSEWHERE = {
    "swin-moe launch -- -m swin_moe.train CONFIG": CLUSTER,
    "swin-moe demo RUN": "tests/demo/test_demo.py",
    "swin-moe launch -n 8 --preflight": "tests/launcher/preflight/test_preflight_ranks.py",
    "swin-moe calibrate --out mine.yaml": "tests/planner/test_calibrate.py",
    "swin-moe launch -n 8 -- -m swin_moe.train swin_moe_small_patch4_window12_192_8expert_32gpu_22k "
    "data.path=/data/imagenet22k data.micro_batch=64 parallel.recompute=block": COCO,
    "python -m launcher -n 32 -- -m swin_moe.train swin_moe_base_patch4_window12_192_32expert_32gpu_22k "
    "optim.lr=2e-4": CLUSTER,
    "swin-moe checkpoint VERB ... one process, no GPU, no process group": FORM,
    "python -m launcher -n 8 -- -m checkpoint_tools VERB ... the same in parallel, with the same output bytes": FORM,
    "swin-moe launch -n 16 -- -m swin_moe.train CONFIG model.moe.transport=hierarchical model.moe.payload=bf16 "
    "model.moe.overlap=2": CLUSTER,
    "swin-moe demo output/mine": "tests/demo/test_demo.py",
    "swin-moe demo swin_tiny_patch4_window7_224 checkpoint.load=FILE": "tests/demo/test_demo.py",
    "swin-moe train CONFIG data.name=coco data.path=my_data model.num_classes=3": COCO,
    "swin-moe train CONFIG data.name=label_maps data.path=my_data model.num_classes=12": COCO,
    "swin-moe predict CONFIG checkpoint.load=PATH [--out FOLDER] [--score 0.3] [--json] [--names FILE] IMAGE": FORM,
    "swin-moe train debug/canvas_mask_rcnn": HOURS,
    "swin-moe train debug/canvas_reppoints": HOURS,
    "swin-moe train debug/canvas_soft_teacher": HOURS,
    "swin-moe train mask_rcnn_swin_tiny_patch4_window7_mstrain_480-800_adamw_1x_coco "
    "checkpoint.init=swin_tiny_patch4_window7_224.pth data.path=coco": COCO,
    "swin-moe train ... data.global_batch=2 optim.lr=1.25e-5": FORM,
    "swin-moe evaluate CONFIG checkpoint.load=official_detector.pth": DOWNLOAD,
    "swin-moe train reppoitsv2_swin_tiny_patch4_window7_mstrain_480_960_giou_gfocal_bifpn_adamw_3x_coco "
    "checkpoint.init=swin_tiny_patch4_window7_224.pth data.path=coco": COCO,
    "swin-moe train soft_teacher_faster_rcnn_swin_tiny_patch4_window7_coco_180k "
    "checkpoint.init=swin_tiny_patch4_window7_224.pth data.path=coco": COCO,
    "swin-moe train CONFIG data.path=my_data data.dense.labelled=1.0 data.dense.unlabelled=drop "
    "data.dense.unlabelled_images=more": COCO,
    "python -m launcher [-n N": FORM,
    "python -m launcher -n 4 -- -m swin_moe.train digits_swin_moe": "tests/training/test_commands.py",
    "python -m launcher -- -m swin_moe.train CONFIG": CLUSTER,
    "python -m launcher --hostfile hosts --exclude n03 -- -m swin_moe.train CONFIG": CLUSTER,
    "python -m launcher --hostfile hosts --restarts 5 --allowed-ranks 32,24,16 -- -m swin_moe.train CONFIG": CLUSTER,
    "python -m launcher --hostfile hosts --preflight": CLUSTER,
    "python -m launcher --hostfile hosts --preflight --preflight-file FILE -- -m ...": CLUSTER,
    "swin-moe launch -n 4 -- -m swin_moe.doctor": "tests/commands/test_doctor.py",
    "swin-moe train digits_swin_moe run.name=moe-short data.images_per_class=40 optim.epochs=10 "
    "optim.warmup_epochs=1 log.every=2": HOURS,
    "swin-moe data check photos": PHOTOS,
    "swin-moe weights fetch swin_tiny_patch4_window7_224": DOWNLOAD,
    "swin-moe train finetune_photos data.path=photos_split run.name=mine": DOWNLOAD,
    "swin-moe report output/mine": PHOTOS,
    "swin-moe predict output/mine new/*.jpg": PHOTOS,
    "swin-moe data split photos --out photos_split --how copies --shrink 256": PHOTOS,
    "swin-moe train photos_from_scratch data.path=photos_split run.name=mine": PHOTOS,
    "swin-moe train photos_from_scratch data.path=more_split run.name=more checkpoint.init=output/mine": PHOTOS,
    "swin-moe launch -n 8 --plan --hardware h100 -- -m swin_moe.train CONFIG": GPUS,
    "swin-moe plan --check RUN [--hardware NAME]": "tests/planner/test_runs.py",
    "swin-moe plan --refit RUN... --hardware NAME --out FILE.yaml": "tests/planner/test_runs.py",
    "swin-moe launch -n 2 -- -m swin_moe.planner.calibrate --out mine.yaml": MINUTES,
    "swin-moe calibrate --out mine.yaml --preflight preflight.json": MINUTES,
    "swin-moe launch -n 4 -- -m swin_moe.train simmim_pretrain__swinv2_base__img192_window12__800ep "
    "run.name=pre": HOURS,
    "swin-moe launch -n 2 -- -m swin_moe.train simmim_finetune__swinv2_base__img224_window14__800ep run.name=tuned "
    "checkpoint.init=output/pre": HOURS,
    "swin-moe evaluate simmim_finetune__swinv2_base__img224_window14__800ep run.name=tuned": HOURS,
    "swin-moe train distill_swinv2_base__img224_window14__300ep task.distill.teacher=output/teacher": HOURS,
    "swin-moe train ... task.distill.teacher=swin.pth task.distill.teacher_model=swin_base_patch4_window7_224": FORM,
    "swin-moe train ... task.distill.teacher=clip.pth task.distill.teacher_model=timm:vit_base_patch16_clip_224": FORM,
}
