"""What `swin-moe COMMAND --help` says of the commands that take CONFIG key=value, and examples of the others.

Here, and not beside what they describe, so that asking for help loads no torch.
"""

TRAIN = """usage: swin-moe train CONFIG|RUN [key=value ...]

CONFIG is a YAML file or the name of one in configs/ (`swin-moe configs`), RUN a run's directory; key=value overrides
any option (`swin-moe show CONFIG` lists them). Running it again resumes from the newest checkpoint. Ctrl-C, SIGTERM,
SIGUSR1 and SIGHUP save and stop, with exit code 75; Ctrl-C twice stops at once.

examples:
  the digits, one process; typed again it continues
    swin-moe train digits_swin_moe
  own photos, beginning with official weights
    swin-moe train finetune_photos data.path=photos_split run.name=mine
  eight ranks of this machine, another learning rate, a run of its own
    swin-moe launch -n 8 -- -m swin_moe.train swin_tiny_patch4_window7_224 optim.lr=2e-4 run.name=lr2e-4"""
EVALUATE = """usage: swin-moe evaluate CONFIG|RUN [checkpoint.load=PATH] [key=value ...]

PATH is a checkpoint directory of this system, a run directory (newest checkpoint), or weights of any format that
`swin-moe checkpoint convert` reads: official, timm or transformers files, rank files by their path without .rank0, ...
Every sample counts once, whatever the batch size or number of ranks.

examples:
  the newest checkpoint of a run
    swin-moe evaluate output/mine
  a released file, on ImageNet
    NAME=swin_tiny_patch4_window7_224
    swin-moe evaluate $NAME checkpoint.load=$NAME data.path=/data/imagenet
  at another size, on 4 ranks
    swin-moe launch -n 4 -- -m swin_moe.evaluate output/mine model.img_size=256"""
EVALUATE_FEATURES = """usage: swin-moe evaluate-features CONFIG|RUN [checkpoint.load=PATH] [key=value ...] [--k 20]
       [--temperature 0.07] [--shots 5] [--draws 3] [--l2 1024]

What the backbone's features tell about classes, whatever task trained it: a vote of the K nearest training images
(--k 0: none), and a ridge regression on SHOTS images of each class, mean over DRAWS choices (--shots 0: none).

examples:
  of a run that was pre-trained without labels
    swin-moe evaluate-features digits_simmim
  the nearest neighbours alone, of a released file
    NAME=swin_base_patch4_window7_224_22k
    swin-moe evaluate-features $NAME checkpoint.load=$NAME --shots 0
  ten images of each class, 5 draws
    swin-moe evaluate-features output/mine --k 0 --shots 10 --draws 5"""
PREDICT = """usage: swin-moe predict CONFIG|RUN [checkpoint.load=PATH] [key=value ...] [--top N] [--json] [--csv]
       [--batch B] [--names FILE] [--out FOLDER] [--score S] IMAGE|FOLDER|GLOB|- ...

Prints the N (5) most likely classes and their probabilities for every image file, and for every image below a folder;
- reads more of them from standard input, one a line. With --json one object per line, with --csv a table of image,
rank, class and probability. Class names are the checkpoint's; those of an official file are numbers unless FILE names
them, one a line. Images are prepared as evaluation does, B at a time (16; 1 where images of a batch compete for
experts); one that cannot be read is told, and the others go on; exit code 2 then, unless data.on_broken=skip. No
training data is needed.

Detectors and segmentation networks draw what they find over the images, into FOLDER (predictions): objects with a score
of at least S (0.3), which predictions.json has as COCO's rows, and a class per pixel, as IMAGE_labels.png.

examples:
  a run that was trained here
    swin-moe predict output/mine photo.jpg
  a folder, as a table
    swin-moe predict output/mine holiday --top 1 --csv > holiday.csv
  an official file, and paths from another program
    NAME=swin_tiny_patch4_window7_224
    find . -name '*.jpg' | swin-moe predict $NAME checkpoint.load=$NAME --names classes.txt -"""
INSPECT_ROUTING = """usage: swin-moe inspect-routing CONFIG|RUN [key=value ...] [--out DIR] [--images N] IMAGE ...

For every image file draws DIR/<name>.png: the image, and per MoE layer the image tinted by the expert that each patch
chose first. From N validation images (default 256, 0: none) draws DIR/classes.png: which experts serve which classes.
All numbers stand in DIR/routing.json. DIR is <run directory>/routing unless given. Weights are those of
checkpoint.load=PATH, or of the run's newest checkpoint.

examples:
  two images through the experts of a run
    swin-moe inspect-routing output/digits_swin_moe a.png b.png
  which experts serve which classes, of 1,000 validation images
    swin-moe inspect-routing output/digits_swin_moe --images 1000 --out routing a.png
  another checkpoint of the same network
    swin-moe inspect-routing digits_swin_moe checkpoint.load=output/other a.png"""
THROUGHPUT = """usage: swin-moe throughput CONFIG [data.name=synthetic] [data.eval_batch=64] [key=value ...]

Prints images per second over all ranks, with random weights, and the peak memory of a rank.

examples:
  batches of 64 noise images
    swin-moe throughput swin_tiny_patch4_window7_224 data.name=synthetic data.eval_batch=64
  with experts, on 2 ranks
    swin-moe launch -n 2 -- -m swin_moe.throughput digits_swin_moe data.name=synthetic
  in bfloat16
    swin-moe throughput swinv2_tiny_patch4_window8_256 data.name=synthetic engine.precision=bf16"""
USAGES = {
    "train": TRAIN,
    "evaluate": EVALUATE,
    "evaluate-features": EVALUATE_FEATURES,
    "predict": PREDICT,
    "inspect-routing": INSPECT_ROUTING,
    "throughput": THROUGHPUT,
}
EXAMPLES = {
    "plan": """examples:
  which layouts 64 GPUs can run, and how fast
    swin-moe plan swin_moe_small_patch4_window12_192_32expert_32gpu_22k --gpus 64 --hardware a100_80
  with another batch, as JSON
    swin-moe plan swinv2_base_patch4_window16_256 data.global_batch=4096 --gpus 16 --hardware h100 --json
  predicted against measured, of a run
    swin-moe plan --check output/mine""",
    "calibrate": """examples:
  this machine, for swin-moe plan --hardware machine.yaml
    swin-moe calibrate
  with price, power and links of an H100
    swin-moe calibrate --like h100 --out mine.yaml
  with links as a preflight measured them
    swin-moe calibrate --preflight links.json --out cluster.yaml""",
    "simulate": """examples:
  one step on 256 GPUs
    swin-moe simulate swin_moe_base_patch4_window12_192_32expert_32gpu_22k --gpus 256 --hardware a100_80
  with experts of uneven load
    swin-moe simulate swin_moe_base_patch4_window12_192_32expert_32gpu_22k --gpus 64 --hardware h100 --spread 0.5
  with the loads that a run recorded
    swin-moe simulate digits_swin_moe --gpus 8 --hardware cpu --routing output/digits_swin_moe""",
    "report": """examples:
  of one run, into its folder
    swin-moe report output/digits_swin_moe
  several side by side, and the pictures as files
    swin-moe report output/dense output/experts --out compare.html --pictures
  of a run on another machine's data
    swin-moe report output/flowers data.path=/data/flowers""",
    "doctor": """examples:
  what is used here, and the times of the attention paths
    swin-moe doctor
  the same without measuring
    swin-moe doctor --no-measure
  of every rank of a job
    swin-moe launch -n 8 -- -m swin_moe.doctor""",
    "completion": """examples:
  of bash, for good
    swin-moe completion bash >> ~/.bashrc
  of zsh: a folder of $fpath
    swin-moe completion zsh > "${fpath[1]}/_swin-moe"
  of fish
    swin-moe completion fish > ~/.config/fish/completions/swin-moe.fish""",
}
