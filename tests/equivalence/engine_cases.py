"""One table of engines, ZeRO stages and layouts that train a tiny Swin-MoE; engine_runs.py has what a rank runs.

A new engine or layout is a row of CASES; with full=True where other rows of the engine have each of its properties
(stages 2 and 3 of engine torch are one class; what the plainest rows have, most others do as well). All rows of a
world run in one MPI start; each is compared with the same run on one rank by engine torch without ZeRO
(test_engines.py). Gate noise, drop path and expert dropout are on everywhere.
"""

import importlib.util
from dataclasses import dataclass

STEPS = 5  # three and two of an epoch where it is uneven, so that every kind of step has followed every other
STEPS_FULL = 20  # with --full
BATCH = 16
MODEL = (
    "model.img_size=16",
    "model.patch_size=2",
    "model.embed_dim=8",
    "model.depths=[1,2]",
    "model.num_heads=[1,2]",
    "model.window_size=4",
    "model.drop_path_rate=0.2",
    "model.moe.blocks=[[0],[1]]",
    "model.moe.group_images=2",
    "model.moe.gate_noise=1.0",
    "model.moe.dropout=0.2",
    "data.name=synthetic",
    f"data.global_batch={BATCH}",
    "data.eval_batch=8",
    "data.crop_scale=[0.8,1.0]",
    "data.erase_prob=0.0",
    "optim.lr=0.002",
    "optim.epochs=40",
    "optim.warmup_epochs=0",
    "optim.ema=0.9",
    "optim.clip_norm=0.1",
    "log.tensorboard=false",
    "engine.device=cpu",
)


@dataclass(frozen=True)
class Case:
    """One run; what it is compared with depends only on `oracle`."""

    engine: str
    zero: int
    world: int
    expert: int = 0  # 0 = automatic, as in the config
    expert_shard: int = 0
    num_experts: int = 4
    precision: str = "fp64"
    accumulation: int = 1
    recompute: bool = False
    uneven: bool = False  # epochs of 33 images: the third step has one image, all ranks but the first have none
    offload: str = "none"
    options: tuple[str, ...] = ()  # further key=value, of the oracle too
    full: bool = False  # only with --full

    @property
    def name(self) -> str:
        """Returns the test's name."""
        parts = [self.engine, f"zero{self.zero}", f"w{self.world}"]
        parts += [f"{key}{value}" for key, value in (("ep", self.expert), ("es", self.expert_shard)) if value]
        parts += [f"{self.num_experts}x", self.precision]
        parts += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        parts += [word for word in ("recompute", "uneven") if getattr(self, word)]
        parts += [f"offload={self.offload}"] if self.offload != "none" else []
        return "-".join([*parts, *([LABELS[self.options]] if self.options in LABELS else self.options)])

    @property
    def missing(self) -> str:
        """Returns the package this case needs and does not find, or nothing."""
        return "" if self.engine == "torch" or importlib.util.find_spec(self.engine) else self.engine

    @property
    def oracle(self) -> "Case":
        """Returns the same training on one rank."""
        return Case(
            "torch",
            0,
            1,
            num_experts=self.num_experts,
            precision=self.precision,
            uneven=self.uneven,
            options=self.options,
        )

    @property
    def overrides(self) -> list[str]:
        """Returns the configuration as key=value."""
        return [
            *MODEL,
            f"engine.name={self.engine}",
            f"parallel.zero={self.zero}",
            f"parallel.expert={self.expert}",
            f"parallel.expert_shard={self.expert_shard}",
            f"model.moe.num_experts={self.num_experts}",
            f"engine.precision={self.precision}",
            f"data.micro_batch={BATCH // self.world // self.accumulation}",
            f"parallel.recompute={'block' if self.recompute else 'none'}",
            f"engine.offload={self.offload}",
            f"data.synthetic_samples={33 if self.uneven else 64}",
            f"data.drop_last={'false' if self.uneven else 'true'}",
            *self.options,
        ]


TOP2 = ("model.moe.top_k=2",)
COSINE = ("model.moe.router=cosine", "model.moe.cosine_dim=4", "model.moe.capacity_factor=0.0")
# One routing group of all images, whatever the ranks; evaluation is by need, as it must be then.
SLICES = (*TOP2, "model.moe.overlap=3")  # experts called once for several slices, under every engine's hooks
PADDED = (*TOP2, "model.moe.backend=padded")
SPANNING = (f"model.moe.group_images={BATCH}", "model.moe.eval_capacity_factor=0", "model.moe.batch_prioritized=true")

# Router state that no gradient moves: a bias that follows the loads of all ranks and micro-batches. And what is dense.
BALANCED = (
    "model.moe.scores=sigmoid",
    "model.moe.bias_rate=0.01",
    "model.moe.balance_loss=none",
    "model.moe.top_k=2",
    "model.moe.normalize_gate=true",
    "model.moe.z_loss_weight=0.01",
    "model.moe.shared_experts=1",
    "model.moe.expert_groups=4",
    "model.moe.group_limit=3",
)
GLOBAL = ("model.moe.balance_scope=global", "model.moe.top_k=2")
EXPERTS_CHOOSE = ("model.moe.choice=expert", "model.moe.balance_loss=none", "model.moe.top_k=2")
SOFT = ("model.moe.choice=soft", "model.moe.balance_loss=none", "model.moe.slots=3")
LABELS = {BALANCED: "balanced", GLOBAL: "global", EXPERTS_CHOOSE: "experts-choose", SOFT: "soft"}

# With seed 0 and 32 experts a ReLU of the position bias stands at 0: one rank in float32 is on the other side of it
# than in float64, 1.2e-3 away in that bias, while two ranks in float32 (torch, DeepSpeed) are 2.7e-6 from float64.
# So it is with slices in float32 (5.5e-4 in that bias; gradients of the first step 1.1e-6).
SEED = ("run.seed=1",)

# 32 experts, 16 or 64 tokens an image: in a step with one image most experts have no token.
CASES = (
    # Every stage in the layouts that differ: all experts apart, replicated experts, shards of experts, uneven experts.
    *(Case("torch", zero, 2, full=zero < 3) for zero in (0, 1, 2, 3)),
    *(Case("torch", zero, 2, expert=1, expert_shard=1, full=zero == 3) for zero in (1, 3)),
    *(Case("torch", zero, 2, expert=2, num_experts=3, uneven=True, full=zero > 1) for zero in (1, 2, 3)),
    Case("torch", 3, 2, expert=1, expert_shard=2, options=TOP2),
    Case("torch", 2, 2, accumulation=4, options=TOP2),
    Case("torch", 3, 2, accumulation=2, uneven=True, recompute=True, num_experts=32),
    Case("torch", 1, 2, accumulation=2, offload="optimizer"),
    Case("torch", 3, 2, offload="optimizer", expert=1, expert_shard=1),
    Case("torch", 3, 2, precision="fp32", recompute=True),
    Case("torch", 2, 2, precision="bf16", expert=1, expert_shard=1),
    Case("torch", 3, 2, precision="fp16"),
    Case("torch", 0, 4, expert=2, expert_shard=2),
    Case("torch", 1, 4, expert=2, uneven=True),
    Case("torch", 2, 4, expert=2, options=TOP2),
    Case("torch", 3, 4, expert=2, accumulation=2, uneven=True),
    Case("torch", 3, 4, expert=4, num_experts=5, options=TOP2),
    Case("torch", 3, 4, expert=1, expert_shard=2, num_experts=3),
    Case("torch", 3, 4, expert=1, expert_shard=4, full=True),
    Case("torch", 3, 4, expert=1, expert_shard=1, num_experts=3, recompute=True, options=COSINE),
    Case("torch", 3, 4, expert=2, precision="fp32", full=True),
    Case("torch", 3, 4, expert=2, options=SPANNING),
    Case("torch", 1, 2, options=BALANCED, full=True),
    Case("torch", 2, 2, expert=1, expert_shard=1, accumulation=2, recompute=True, uneven=True, options=BALANCED),
    Case("torch", 3, 4, expert=2, accumulation=2, options=BALANCED),
    Case("torch", 0, 2, uneven=True, options=GLOBAL),
    Case("torch", 2, 2, accumulation=2, uneven=True, options=EXPERTS_CHOOSE),
    Case("torch", 3, 2, accumulation=2, uneven=True, options=SOFT),
    Case("torch", 0, 2, options=SLICES),
    Case("torch", 3, 4, expert=2, accumulation=2, recompute=True, options=SLICES),
    Case("torch", 3, 4, expert=2, expert_shard=1, num_experts=3, uneven=True, options=SLICES, full=True),
    Case("deepspeed", 3, 2, precision="fp32", options=(*SLICES, *SEED)),
    Case("fairscale", 2, 2, options=SLICES),
    Case("torch", 3, 4, expert=2, uneven=True, recompute=True, options=PADDED),
    # DeepSpeed: float32 at most, equal experts on every rank.
    *(Case("deepspeed", zero, 2, precision="fp32", full=True) for zero in (1, 2, 3)),
    Case("deepspeed", 1, 2, precision="fp32", expert=1, expert_shard=1, offload="optimizer"),
    Case("deepspeed", 2, 2, precision="fp32", expert=1, expert_shard=2, accumulation=4, options=TOP2),
    Case("deepspeed", 3, 2, 0, 0, 32, "fp32", accumulation=2, uneven=True, recompute=True, options=SEED),
    Case("deepspeed", 3, 2, precision="fp32", accumulation=2, offload="parameters"),
    Case("deepspeed", 2, 2, precision="bf16", expert=1, expert_shard=1),
    Case("deepspeed", 3, 2, precision="fp16"),
    Case("deepspeed", 1, 4, precision="fp32", expert=2, uneven=True, accumulation=2),
    Case("deepspeed", 2, 4, precision="fp32", expert=2, expert_shard=2, recompute=True),
    Case("deepspeed", 2, 4, precision="fp32", expert=4, accumulation=2, offload="optimizer", full=True),
    Case("deepspeed", 3, 4, precision="fp32", expert=2, accumulation=2, uneven=True, full=True),
    Case("deepspeed", 3, 4, precision="fp32", expert=1, expert_shard=1, num_experts=3, options=COSINE, full=True),
    Case("deepspeed", 2, 2, precision="fp32", options=SPANNING),
    Case("deepspeed", 3, 4, precision="fp32", expert=2, options=SPANNING, full=True),
    Case("deepspeed", 2, 2, precision="fp32", accumulation=2, options=BALANCED),
    Case("deepspeed", 3, 4, precision="fp32", expert=2, recompute=True, options=BALANCED, full=True),
    # FairScale.
    *(Case("fairscale", zero, 2, full=True) for zero in (1, 2)),
    Case("fairscale", 2, 2, expert=2, num_experts=3, uneven=True, accumulation=2),
    Case("fairscale", 1, 2, expert=2, num_experts=3, uneven=True, accumulation=2, full=True),
    Case("fairscale", 2, 2, expert=1, expert_shard=2, recompute=True, options=TOP2),
    Case("fairscale", 2, 2, precision="fp16"),
    Case("fairscale", 1, 4, expert=2, precision="fp32"),
    Case("fairscale", 2, 4, expert=2, accumulation=2, uneven=True),
    Case("fairscale", 2, 4, expert=4, num_experts=5, options=TOP2, full=True),
    Case("fairscale", 2, 4, expert=1, expert_shard=2, num_experts=3),
    Case("fairscale", 2, 2, options=SPANNING, full=True),
    Case("fairscale", 2, 4, expert=2, accumulation=2, options=BALANCED, full=True),
    # The rest of the matrix.
    *(Case("torch", zero, world, options=SPANNING, full=True) for zero in (0, 1, 2) for world in (2, 4)),
    *(
        Case("torch", zero, 4, expert=2, expert_shard=2, recompute=True, options=options, full=True)
        for zero in (0, 3)
        for options in (GLOBAL, EXPERTS_CHOOSE, SOFT)
    ),
    *(Case("torch", zero, world, options=BALANCED, full=True) for zero in (0, 1, 2, 3) for world in (2, 4)),
    *(Case("deepspeed", zero, 2, precision="fp32", options=BALANCED, full=True) for zero in (1, 3)),
    *(Case("deepspeed", zero, 2, precision="fp32", options=SPANNING, full=True) for zero in (1, 3)),
    Case("fairscale", 1, 4, expert=2, options=SPANNING, full=True),
    *(
        Case("torch", zero, world, expert, shard, experts, precision, accumulation, recompute, uneven, full=True)
        for zero in (0, 1, 2, 3)
        for world, expert, shard, experts in (
            (2, 2, 1, 4),
            (2, 1, 1, 3),
            (2, 2, 1, 3),
            (2, 1, 2, 4),
            (4, 4, 1, 4),
            (4, 2, 1, 4),
            (4, 2, 2, 4),
            (4, 1, 2, 3),
            (4, 1, 4, 2),
            (4, 4, 1, 5),
            (4, 1, 1, 3),
        )
        for precision, accumulation, recompute, uneven in (
            ("fp64", 2, False, True),
            ("fp64", 1, True, False),
            ("fp32", 1, False, True),
            ("fp32", 2, True, False),
        )
    ),
    *(
        Case("torch", zero, world, expert, 1, precision=precision, accumulation=accumulation, full=True)
        for zero in (0, 1, 2, 3)
        for world, expert in ((2, 2), (4, 2))
        for precision, accumulation in (("bf16", 1), ("bf16", 2), ("fp16", 1))
    ),
    *(
        Case("deepspeed", zero, world, expert, shard, 4, "fp32", accumulation, recompute, uneven, offload, full=True)
        for zero in (1, 2, 3)
        for world, expert, shard in ((2, 2, 1), (2, 1, 1), (2, 1, 2), (4, 4, 1), (4, 2, 1), (4, 2, 2), (4, 1, 4))
        for accumulation, recompute, uneven, offload in (
            (1, True, True, "none"),
            (2, False, True, "none"),
            (2, True, False, "optimizer"),
        )
    ),
    *(
        Case("fairscale", zero, world, expert, shard, experts, precision, accumulation, recompute, uneven, full=True)
        for zero in (1, 2)
        for world, expert, shard, experts in ((2, 2, 1, 4), (2, 1, 1, 3), (4, 2, 2, 4), (4, 4, 1, 5), (4, 1, 1, 3))
        for precision, accumulation, recompute, uneven in (
            ("fp64", 2, False, True),
            ("fp64", 1, True, False),
            ("fp32", 2, True, True),
        )
    ),
    *(
        Case(engine, zero, 4, 2, 1, precision=precision, accumulation=2, full=True)
        for engine, zero in (("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fairscale", 1), ("fairscale", 2))
        for precision in ("bf16", "fp16")
    ),
)


# Every one of these writes the same checkpoint for the same state, and continues every other's.
CHECKPOINTS = (
    *(Case("torch", zero, 2, options=BALANCED) for zero in (0, 1, 2, 3)),
    *(Case("torch", zero, 2, expert=1, expert_shard=1, options=BALANCED, full=zero == 1) for zero in (1, 2)),
    Case("torch", 3, 2, expert=1, expert_shard=2, offload="optimizer", options=BALANCED),
    *(Case("torch", zero, 4, expert=2, options=BALANCED) for zero in (1, 3)),
    Case("torch", 3, 4, expert=1, expert_shard=1, options=BALANCED),
    Case("torch", 2, 4, expert=2, expert_shard=2, options=BALANCED),
    *(Case("fairscale", zero, 2, options=BALANCED, full=zero == 2) for zero in (1, 2)),
    Case("fairscale", 2, 4, expert=2, options=BALANCED),
    *(Case("deepspeed", zero, 2, precision="fp32", options=BALANCED, full=zero == 1) for zero in (1, 2, 3)),
    Case("deepspeed", 2, 2, expert=1, expert_shard=2, offload="optimizer", precision="fp32", options=BALANCED),
    Case("deepspeed", 3, 2, expert=1, expert_shard=1, offload="parameters", precision="fp32", options=BALANCED),
    *(Case("deepspeed", zero, 4, expert=2, precision="fp32", options=BALANCED, full=zero != 3) for zero in (1, 2, 3)),
)
# Steps that are skipped.
POISONED = (
    *(Case("torch", zero, 2, options=BALANCED, full=zero == 2) for zero in (0, 1, 2, 3)),
    *(Case("fairscale", zero, 2, options=BALANCED, full=zero == 1) for zero in (1, 2)),
    *(Case("deepspeed", zero, 2, precision="fp32", options=BALANCED, full=zero == 1) for zero in (1, 2, 3)),
    *(
        Case("deepspeed", zero, 2, precision="fp32", offload="optimizer", options=BALANCED, full=zero == 2)
        for zero in (2, 3)
    ),
)


def chosen(world: int, full: bool) -> list[Case]:
    """Returns the rows of a world that can run here, without repetition."""
    return list(dict.fromkeys(runnable(CASES, world, full)))


def runnable(cases: tuple[Case, ...], world: int, full: bool) -> list[Case]:
    """Returns the cases of a world whose packages are installed; with `full`, also those that are for --full alone."""
    return [case for case in cases if case.world == world and (full or not case.full) and not case.missing]
