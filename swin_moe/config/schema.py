"""Every option of a run: frozen dataclasses are the schema, with defaults, units and range checks in one place.

YAML files and `key=value` overrides fill them (io.py); those of tasks are in tasks.py. No field
depends on the world size: degrees of parallelism are options, the number of ranks is not. Model field names are the
argument names of the official constructors (microsoft/Swin-Transformer, models/*.py) where one exists.
"""

from dataclasses import dataclass, field
from typing import Literal

from swin_moe.config.checks import NOT_STATE, check_routing, check_run, check_task
from swin_moe.config.checks import check as _check
from swin_moe.config.checks import check_choices as _check_choices
from swin_moe.config.choices import facts_of
from swin_moe.config.options.dense_data import DenseDataConfig
from swin_moe.config.tasks import TaskConfig

Family = Literal["swin", "swinv2", "swin_mlp", "swin_moe"]
DatasetName = Literal["digits", "folder", "zip", "imagenet22k", "lists", "synthetic", "canvases", "coco", "label_maps"]


@dataclass(frozen=True)
class RunConfig:
    # The run directory is <output>/<name>; of a run from a file, the name of its config.
    name: str = field(default="run", metadata=NOT_STATE)
    output: str = field(default="output", metadata=NOT_STATE)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self, "run")
        check_run(self)


@dataclass(frozen=True)
class DataConfig:
    name: DatasetName = "digits"
    # Folder or zip root; holds train/ and val/ (or train.zip and val.zip; or train.csv and val.csv of `data split`).
    path: str = field(default="", metadata=NOT_STATE)
    # Train with model.num_classes = the classes of the data, whatever the config says.
    count_classes: bool = field(default=False, metadata=NOT_STATE)
    global_batch: int = 128  # images per optimizer step, over all ranks
    # Images per rank and forward; 0 = global_batch / ranks, no accumulation.
    micro_batch: int = field(default=0, metadata=NOT_STATE)
    eval_batch: int = field(default=0, metadata=NOT_STATE)  # images per rank and evaluation forward; 0 = micro_batch
    drop_last: bool = True  # False: an epoch's last, smaller batch is trained on too
    images_per_class: int = 0  # training images of each class, drawn once for all runs; 0 = all (few-shot: 5)
    subset: int = 0  # which draw of them
    workers: int = field(default=0, metadata=NOT_STATE)  # loader processes per rank; 0 = load in the training process
    on_broken: Literal["skip", "fail"] = "fail"  # a broken image is reported with its path either way
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # random-resized-crop area, fraction of the image
    hflip: float = 0.5
    color_jitter: float = 0.4  # no effect beside auto_augment, as in timm
    auto_augment: str = "rand-m9-mstd0.5-inc1"  # timm policy string; "" = off
    erase_prob: float = 0.25
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = 1
    eval_crop: bool = True  # resize to 256/224 of the image size, then centre crop; False = resize to the size
    resize: bool = True  # False: images have the model's size; training crops them out of a black border of 4 pixels
    # Training decodes a JPEG at a half, a quarter or an eighth of its sides where a crop then still has model.img_size.
    draft: bool = False
    exif: bool = False  # turn images as their EXIF orientation says; torchvision, so the official code, does not
    synthetic_samples: int = 10_000  # training images of the synthetic data set
    cache: bool = field(default=True, metadata=NOT_STATE)  # keep decoded images of the digits in memory
    dense: DenseDataConfig = field(default_factory=DenseDataConfig)  # boxes, masks, label maps

    def __post_init__(self) -> None:
        _check_choices(self, "data")
        _check(self.global_batch > 0, "data.global_batch", self.global_batch, "> 0")
        _check(self.micro_batch >= 0, "data.micro_batch", self.micro_batch, ">= 0 (0 = from the world)")
        _check(self.images_per_class >= 0, "data.images_per_class", self.images_per_class, ">= 0 (0 = all)")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        needs_path = self.name in ("folder", "zip", "imagenet22k", "lists", "coco", "label_maps")
        _check(bool(self.path) or not needs_path, "data.path", self.path, f"set for data.name={self.name}")


@dataclass(frozen=True)
class MoEConfig:
    blocks: tuple[tuple[int, ...], ...] = ()  # per stage, indices of MoE blocks; (-1,) or () = none
    num_experts: int = 8  # global number, over all ranks
    top_k: int = 1
    capacity_factor: float = (
        1.25  # > 0: slack over an even load; 0: by need; < 0: by need, capped at its absolute value
    )
    eval_capacity_factor: float | None = 0.0  # the same for evaluation, may be lower; None = capacity_factor
    capacity_scope: Literal["rank", "images"] = (
        "rank"  # who competes for slots: a rank's micro-batch, or group_images images
    )
    group_images: int = 0  # images per routing group with capacity_scope=images
    # Who chooses, a row of choices.CHOICES: tokens their top_k experts, experts their tokens (arXiv:2202.09368), or
    # nobody, soft.
    choice: str = "token"
    slots: int = 1  # choice=soft (arXiv:2308.00951): slots of one expert for one image
    router: Literal["linear", "cosine"] = "linear"
    scores: Literal["softmax", "sigmoid"] = "softmax"  # over experts, or of each for itself (DeepSeek-V3)
    bias_rate: float = 0.0  # scores=sigmoid: step of the bias that balances instead of a loss (arXiv:2408.15664: 1e-3)
    expert_groups: int = 1  # groups of consecutive experts, for group_limit
    group_limit: int = 0  # a token uses experts of its best group_limit groups (DeepSeek-V3: 4 of 8); 0 = no limit
    normalize_gate: bool = False  # gates of the k choices sum to 1 (k > 1)
    batch_prioritized: bool = True  # confident tokens take slots first (V-MoE, arXiv:2106.05974)
    balance_loss: Literal["load_importance", "gshard", "none"] = "load_importance"
    balance_scope: Literal["group", "global"] = (
        "group"  # what is balanced: a routing group, or the micro-batches of all ranks together (arXiv:2501.11873)
    )
    aux_loss_weight: float = 0.01  # of the balance loss
    z_loss_weight: float = 0.0  # of the mean square of log sum exp of the logits (arXiv:2202.08906: 1e-3)
    gate_noise: float = 1.0  # standard deviation of the logit noise times num_experts, training only
    cosine_dim: int = 256
    cosine_init_t: float = 0.5
    shared_experts: int = 0  # experts that every token visits, as one dense network (arXiv:2401.06066)
    dropout: float = 0.0  # after GELU, inside the experts, not inside the shared ones
    # Of images that a batch pads to one size (dense tasks) the padding is not routed, but with choice=soft, which mixes
    # whole maps.
    skip_padding: bool = True
    backend: str = "native"  # who moves rows to experts: native, padded, tutel, local; docs/communication.md
    transport: Literal["linear", "hierarchical"] = "linear"  # one all-to-all, or inside nodes and then between them
    payload: Literal["none", "bf16", "fp8"] = "none"  # what rows between ranks are rounded to; docs/communication.md
    overlap: int = 1  # slices that dispatch, experts and combine are pipelined in
    tune: Literal["off", "measure"] = "off"  # measure: choose transport, overlap and payload (at most `payload`)
    tune_cache: str = ""  # folder of measured choices; "" = swin_moe/tuned/ in the user's cache directory

    def __post_init__(self) -> None:
        _check_choices(self, "model.moe")
        _check(self.num_experts >= 1, "model.moe.num_experts", self.num_experts, ">= 1")
        _check(1 <= self.top_k <= self.num_experts, "model.moe.top_k", self.top_k, f"in [1, {self.num_experts}]")
        _check(self.group_images >= 0, "model.moe.group_images", self.group_images, ">= 0")
        scoped = self.capacity_scope == "rank" or self.group_images > 0
        _check(scoped, "model.moe.group_images", self.group_images, "> 0 with model.moe.capacity_scope=images")
        needs_noise = self.balance_loss == "load_importance" and self.aux_loss_weight != 0 and self.has_blocks
        _check(
            self.gate_noise > 0 or not needs_noise,
            "model.moe.gate_noise",
            self.gate_noise,
            "> 0 with model.moe.balance_loss=load_importance (its load term divides by the noise)",
        )
        check_routing(self)

    @property
    def eval_factor(self) -> float:
        """The capacity factor of evaluation."""
        return self.capacity_factor if self.eval_capacity_factor is None else self.eval_capacity_factor

    @property
    def has_blocks(self) -> bool:
        """True if any block is a MoE block."""
        return any(index >= 0 for stage in self.blocks for index in stage)


@dataclass(frozen=True)
class ModelConfig:
    name: Family = "swin_moe"
    img_size: tuple[int, int] = (224, 224)  # nominal (height, width) in pixels; other sizes run too, padded per window
    patch_size: tuple[int, int] = (4, 4)
    in_chans: int = 3
    num_classes: int = 1000  # 0 = no head
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None  # None = head_dim ** -0.5
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1  # of the last block; linear from 0
    ape: bool = False
    patch_norm: bool = True
    mlp_fc2_bias: bool = True  # False: fc2 without bias (Swin-MoE)
    init_std: float = 0.02
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    extra_norm_every: int = 0  # a LayerNorm on the main branch after every n-th block of a stage (SwinV2-G: 6)
    attention: Literal["auto", "fused", "sdpa", "analytic", "reference"] = (
        "auto"  # how window attention is computed: what measures fastest, or always one way; docs/attention.md
    )
    attention_chunk: int = 0  # windows attended at once, over all images; less memory, one more forward; 0 = all
    post_norm_init: float = 0.0  # initial weight and bias of the res-post norms (swinv2; SwinV2-G: 1e-5)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _check_choices(self, "model")
        small = all(patch <= side for patch, side in zip(self.patch_size, self.img_size))
        _check(small, "model.patch_size", self.patch_size, f"at most model.img_size={self.img_size}")
        stages = len(self.depths)
        _check(stages >= 1, "model.depths", self.depths, "at least one stage")
        _check(len(self.num_heads) == stages, "model.num_heads", self.num_heads, f"{stages} numbers, one per stage")
        for stage, heads in enumerate(self.num_heads):
            dim = self.embed_dim * 2**stage
            _check(heads >= 1 and dim % heads == 0, f"model.num_heads[{stage}]", heads, f"a divisor of {dim} channels")
        _check(self.attention_chunk >= 0, "model.attention_chunk", self.attention_chunk, ">= 0 (0 = all windows)")
        whole = self.attention != "fused" or (self.attention_chunk == 0 and self.attn_drop_rate == 0)
        allowed = "not fused with model.attention_chunk or model.attn_drop_rate, which are computed window by window"
        _check(whole, "model.attention", self.attention, allowed)
        _check(len(self.moe.blocks) <= stages, "model.moe.blocks", self.moe.blocks, f"at most {stages} lists")
        for stage, blocks in enumerate(self.moe.blocks):
            valid = all(-1 <= b < self.depths[stage] for b in blocks)
            _check(
                valid, f"model.moe.blocks[{stage}]", blocks, f"indices below depth {self.depths[stage]}, or -1 for none"
            )


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_reference_batch: int = (
        0  # > 0: lr, warmup_lr and min_lr hold for this batch and scale with global_batch (official: 512)
    )
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9  # sgd
    clip_norm: float = 5.0  # one global norm over dense and expert gradients; 0 = off
    epochs: float = 300.0
    start_epoch: int = 0  # where a run without a checkpoint begins: learning rate and data as after so many epochs
    warmup_epochs: float = 20.0
    schedule: Literal["cosine", "linear", "step", "multistep", "poly"] = "cosine"
    warmup_prefix: bool = True  # the schedule starts after the warm-up instead of running under it
    decay_epochs: float = 30.0  # step
    decay_rate: float = 0.1  # step and multistep
    milestones: tuple[float, ...] = ()  # multistep, in epochs
    layer_decay: float = 1.0  # lr factor per layer, from the head down
    ema: float = 0.0  # decay of the weight average per step; 0 = off
    freeze: Literal["none", "experts", "moe", "backbone"] = (
        "none"  # what keeps its weights: experts; whole MoE layers; all but the class head, a linear probe
    )

    def __post_init__(self) -> None:
        _check_choices(self, "optim")
        _check(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, ">= 0 (0 = off)")
        _check(self.epochs > 0, "optim.epochs", self.epochs, "> 0")
        _check(0 <= self.start_epoch < self.epochs, "optim.start_epoch", self.start_epoch, f"in [0, {self.epochs})")
        _check(
            0 <= self.warmup_epochs <= self.epochs, "optim.warmup_epochs", self.warmup_epochs, f"in [0, {self.epochs}]"
        )


@dataclass(frozen=True)
class ParallelConfig:
    expert: int = 0  # ranks that the experts are spread over; 0 = as many ranks as divide the experts
    expert_shard: int = 0  # ranks that share one expert; 0 = ranks / experts when ranks outnumber experts, else 1
    zero: Literal[0, 1, 2, 3] = 0
    placement: Literal["consecutive"] = "consecutive"
    recompute: Literal["none", "block"] = "none"  # block: activations of every block are recomputed in backward
    compile: Literal["none", "block", "model"] = "none"  # what torch.compile makes one graph of, in training
    # auto: train takes the best layout of `swin-moe plan` for the ranks that are there; `parallel: auto` says the same
    plan: Literal["none", "auto"] = "none"
    hardware: str = ""  # what plans reckon with: a name in configs/hardware/ or a YAML file; "" = the machine's own

    def __post_init__(self) -> None:
        _check_choices(self, "parallel")
        _check(self.expert >= 0, "parallel.expert", self.expert, ">= 0 (0 = automatic)")
        _check(self.expert_shard >= 0, "parallel.expert_shard", self.expert_shard, ">= 0 (0 = automatic)")


@dataclass(frozen=True)
class EngineConfig:
    name: str = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to the CPU; parameters: the optimizer too
    timeout: float = 60.0  # seconds the ranks wait for one of them until the job ends with its name
    threads: int = 0  # CPU threads per rank; 0 = what the launcher bound this rank to
    cuda_graphs: bool = False  # a forward, in train with its backward, is recorded once per shape and replayed
    # predict, evaluate and throughput of a classifier on the CPU run its inference form (docs/inference.md); int8: with
    # the linear layers of blocks in whole numbers of 8 bits, all else in engine.precision.
    optimize: bool | Literal["int8"] = False

    def __post_init__(self) -> None:
        _check_choices(self, "engine")
        _check(self.timeout > 0, "engine.timeout", self.timeout, "> 0 seconds")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # optimizer steps between checkpoints; 0 = by every_epochs
    every_epochs: float = 1.0  # epochs between checkpoints
    resume: Literal["auto", "never"] = "auto"  # never: a run folder that holds checkpoints is refused, not continued
    keep: int = 2  # newest checkpoints kept, besides the best; 0 = all
    asynchronous: bool = False  # training goes on from a copy of the rank's share while a thread writes it
    load: str = ""  # checkpoint to continue from or to evaluate; "" = newest of the run
    accept_changes: bool = False  # continue although classes, data, seed, task or network differ from the checkpoint's
    init: str = ""  # weights a new run begins with: a checkpoint of any task and layout, or an official .pth file
    file_size: int = 1 << 30  # target bytes per shard file

    def __post_init__(self) -> None:
        _check_choices(self, "checkpoint")
        _check(self.every >= 0, "checkpoint.every", self.every, ">= 0 (0 = by checkpoint.every_epochs)")
        _check(self.keep >= 0, "checkpoint.keep", self.keep, ">= 0 (0 = all)")


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # optimizer steps between metric records
    tensorboard: bool = True
    eval_every: float = 1.0  # epochs between evaluations; 0 = only at the end
    eval_first: bool = False  # evaluate what was loaded before the first step, as the official scripts do

    def __post_init__(self) -> None:
        _check_choices(self, "log")


@dataclass(frozen=True)
class DebugConfig:
    check_replicas: int = 0  # optimizer steps between bitwise comparisons of dense replicas; 0 = off

    def __post_init__(self) -> None:
        _check_choices(self, "debug")


@dataclass(frozen=True)
class CompatConfig:
    # repeat what the official loop does: weight decay on SimMIM's bias tables, bias networks and logit scales; every
    # update with the learning rate of the one before it, as its scheduler steps after the optimizer; CutMix boxes of an
    # odd side one pixel shorter, as timm 0.4.12 cuts them
    official: bool = False

    def __post_init__(self) -> None:
        _check_choices(self, "compat")


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=NOT_STATE)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=NOT_STATE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=NOT_STATE)
    log: LogConfig = field(default_factory=LogConfig, metadata=NOT_STATE)
    debug: DebugConfig = field(default_factory=DebugConfig, metadata=NOT_STATE)
    compat: CompatConfig = field(default_factory=CompatConfig)

    def accumulation(self, world_size: int) -> tuple[int, int]:
        """Returns (micro_batch per rank, forwards per optimizer step) in a world of this many ranks.

        Raises:
            ValueError: The batch cannot be cut into equal micro-batches, with the numbers.
        """
        batch, micro = self.data.global_batch, self.data.micro_batch
        if micro == 0:
            micro = -(-batch // world_size)
        steps = -(-batch // (micro * world_size))
        if steps * micro * world_size != batch:
            unit = micro * world_size
            near = sorted({max(1, batch // unit) * unit, steps * unit})
            raise ValueError(
                f"data.global_batch={batch} is not a multiple of data.micro_batch={micro} x {world_size} ranks; "
                f"{'nearest batches that are' if near[1:] else 'the nearest that is'}: {' and '.join(map(str, near))}"
            )
        return micro, steps

    def routing_ranks(self, world_size: int) -> int:
        """Returns how many consecutive ranks one routing group of training spans; 1: a rank holds whole groups.

        Raises:
            ValueError: Groups would cut a micro-batch in two, or span accumulation steps.
        """
        micro, _ = self.accumulation(world_size)
        moe = self.model.moe
        facts = facts_of(moe)
        if not moe.has_blocks or moe.capacity_scope == "rank" or not facts.has_groups or micro % moe.group_images == 0:
            return 1
        ranks, rest = divmod(moe.group_images, micro)
        if rest or world_size % ranks:
            multiples = [n * micro for n in range(2, world_size + 1) if world_size % n == 0]
            also = f", or be {' or '.join(map(str, multiples))} (whole ranks)" if multiples else ""
            raise ValueError(
                f"model.moe.group_images={moe.group_images} must divide the micro-batch of {micro} images{also}; "
                f"data.global_batch={self.data.global_batch} over {world_size} ranks"
            )
        if facts.within_rank:
            raise ValueError(
                f"model.moe.group_images={moe.group_images} must fit one rank's micro-batch of {micro} images with "
                f"model.moe.choice={moe.choice}: {facts.within_rank}"
            )
        if moe.eval_capacity_factor != 0:
            raise ValueError(
                f"model.moe.eval_capacity_factor={moe.eval_capacity_factor} must be 0 (by need) where a routing group "
                f"of {moe.group_images} images spans {ranks} ranks: evaluation deals images out one by one"
            )
        return ranks

    def check(self, world_size: int) -> None:
        """Raises ValueError where sections contradict each other in a world of this many ranks."""
        self.routing_ranks(world_size)
        check_task(self, forwards=self.accumulation(world_size)[1])
