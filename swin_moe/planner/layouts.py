"""Every way to spread a config over N ranks, through the checks of training itself; plain arithmetic, no network.

Choices that change results (payloads beyond the config's, another capacity) are not candidates. What one check refuses
is refused once, in the words of training, and not tried with everything else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from swin_moe.config import Config, MoEConfig, ParallelConfig
from swin_moe.config.checks import field_types
from swin_moe.engine.base import SERVES
from swin_moe.engine.limits import check_engine
from swin_moe.models.attention import fused_problem
from swin_moe.parallel.sharding import Degrees
from swin_moe.registry import is_outside
from swin_moe.run.session import check_layout, layout_of

_OVERLAPS = (1, 2, 4)
_CHUNK = 16  # windows at once: SwinV2's sequential attention


@dataclass(frozen=True)
class Layout:
    """A candidate: the options by which it differs from others, and what follows from them."""

    world_size: int
    expert: int
    expert_shard: int
    expert_data: int
    engine: str
    zero: int
    recompute: str
    attention_chunk: int
    micro_batch: int
    accumulation: int
    overlap: int
    transport: str
    payload: str
    offload: str

    @property
    def degrees(self) -> Degrees:
        """Sizes of the axes that the world is the product of."""
        return Degrees(self.expert, self.expert_shard, self.expert_data)

    @property
    def cuts_weights(self) -> bool:
        """True where a rank keeps a cut of what it could hold whole: ZeRO-3, and stage 2 of the torch engine."""
        return self.zero == 3 or (self.zero == 2 and self.engine == "torch")

    def options(self) -> dict[str, Any]:
        """Returns the options of a config that make it run so."""
        return {
            "parallel.expert": self.expert,
            "parallel.expert_shard": self.expert_shard,
            "engine.name": self.engine,
            "parallel.zero": self.zero,
            "parallel.recompute": self.recompute,
            "model.attention_chunk": self.attention_chunk,
            "data.micro_batch": self.micro_batch,
            "model.moe.overlap": self.overlap,
            "model.moe.transport": self.transport,
            "model.moe.payload": self.payload,
            "engine.offload": self.offload,
        }

    def apply(self, config: Config) -> Config:
        """Returns the config that runs so."""
        moe: dict[str, Any] = {"overlap": self.overlap, "transport": self.transport, "payload": self.payload}
        parallel: dict[str, Any] = {
            "expert": self.expert,
            "expert_shard": self.expert_shard,
            "zero": self.zero,
            "recompute": self.recompute,
        }
        engine: dict[str, Any] = {"name": self.engine, "offload": self.offload}
        model = replace(config.model, attention_chunk=self.attention_chunk, moe=replace(config.model.moe, **moe))
        return replace(
            config,
            model=model,
            parallel=replace(config.parallel, **parallel),
            engine=replace(config.engine, **engine),
            data=replace(config.data, micro_batch=self.micro_batch),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Rejected:
    """Options that no layout here may have, and why."""

    options: dict[str, Any]
    reason: str


def enumerate_layouts(config: Config, world_size: int, ranks_per_node: int) -> tuple[list[Layout], list[Rejected]]:
    """Returns (candidates without duplicates, what was refused with the sentence of the check).

    Memory is not looked at. Engines, degrees and micro-batches are checked apart, then every candidate's engine with
    its degrees; what is left of the options goes with all of them.

    Raises:
        ValueError: There is no candidate, with the reason and the nearest worlds.
    """
    rejected: list[Rejected] = []
    engines, degrees, batches = (
        _passing(found(config, world_size), rejected, config, world_size) for found in (_engines, _degrees, _batches)
    )
    layouts = []
    for engine, zero in engines:
        for expert, shard in degrees:
            pair = {"engine.name": engine, "parallel.zero": zero}
            if not _fits_together(config, world_size, pair, expert, shard, rejected):
                continue
            spread, crosses = expert * shard > 1, expert * shard > ranks_per_node
            free = list(_free_options(config, spread=spread, crosses=crosses))
            for micro, steps in batches:
                for rest in free:
                    layouts.append(
                        Layout(
                            world_size, expert, shard, world_size // (expert * shard), engine, zero,
                            micro_batch=micro, accumulation=steps, offload=config.engine.offload, **rest,
                        )
                    )  # fmt: skip
    return layouts, rejected


def layout_in(config: Config, ranks: int) -> Layout:
    """Returns the layout that a config says itself, in a world of so many ranks; raises ValueError as training."""
    degrees = Degrees.resolve(*layout_of(config), ranks)
    micro, accumulation = config.accumulation(ranks)
    moe, parallel = config.model.moe, config.parallel
    return Layout(
        ranks,
        degrees.expert,
        degrees.expert_shard,
        degrees.expert_data,
        config.engine.name,
        parallel.zero,
        parallel.recompute,
        config.model.attention_chunk,
        micro,
        accumulation,
        moe.overlap,
        moe.transport,
        moe.payload,
        config.engine.offload,
    )


def check_candidate(config: Config, layout: Layout) -> None:
    """Raises ValueError as training would, for the whole of a candidate."""
    check_layout(layout.apply(config), layout.world_size)


def _passing(
    tried: Iterable[tuple[dict[str, Any], Any, Any]], rejected: list[Rejected], config: Config, world_size: int
) -> list[Any]:
    """Returns what passes its check, a function to call; the others go to `rejected`.

    Raises:
        ValueError: None passes.
    """
    passed, reason = [], ""
    for options, value, check in tried:
        try:
            check()
        except ValueError as error:
            reason = str(error)
            rejected.append(Rejected(options, reason))
        else:
            passed.append(value)
    if not passed:
        near = [n for n in nearest_worlds(config, world_size) if n != world_size]
        fit = f"; worlds whose ranks get equal shares of the batch: {' and '.join(map(str, near))}" if near else ""
        raise ValueError(f"no layout of {world_size} ranks runs this config: {reason}{fit}")
    return passed


def _engines(config: Config, world_size: int) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    stages = get_args(field_types(ParallelConfig)["zero"])
    names = [config.engine.name] if is_outside(config.engine.name) else list(SERVES)
    for name in names:
        for zero in stages:
            if world_size == 1 and name == "torch" and zero:
                continue  # the same as without: there is nobody to share with
            chosen = replace(
                config,
                engine=replace(config.engine, name=name),
                parallel=replace(config.parallel, zero=zero, expert=1, expert_shard=1),
            )

            def check(chosen: Config = chosen) -> None:
                check_engine(chosen, _divisor(chosen, world_size))

            yield {"engine.name": name, "parallel.zero": zero}, (name, zero), check


def _divisor(config: Config, world_size: int) -> int:
    """Returns the world size where its batch can be cut, else 1: engines are asked apart from batches."""
    try:
        config.accumulation(world_size)
    except ValueError:
        return 1
    return world_size


def _degrees(config: Config, world_size: int) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Degrees that spread experts evenly; an expert over several ranks only where each rank would hold one."""
    experts = config.model.moe.num_experts
    if not config.model.moe.has_blocks:
        yield {}, (1, 1), lambda: None
        return
    wanted = [(e, 1) for e in _divisors(experts) if world_size % e == 0]
    wanted += [(experts, s) for s in _divisors(world_size // experts) if s > 1 and world_size % (experts * s) == 0]
    if config.parallel.expert or config.parallel.expert_shard:
        wanted = [(config.parallel.expert, config.parallel.expert_shard)]
    found = set()
    for expert, shard in wanted:
        parallel = replace(config.parallel, expert=expert, expert_shard=shard)
        options = {"parallel.expert": expert, "parallel.expert_shard": shard}
        try:
            degrees = Degrees.resolve(parallel, experts, world_size)
        except ValueError as error:
            yield options, None, _raising(error)
            continue
        found.add((degrees.expert, degrees.expert_shard))
    for pair in sorted(found):
        yield {}, pair, lambda: None


def _raising(error: ValueError) -> Any:
    def check() -> None:
        raise error

    return check


def _batches(config: Config, world_size: int) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Micro-batches that divide a rank's share of the batch, the largest ones; those of the config if it says one."""
    share, rest = divmod(config.data.global_batch, world_size)
    sizes = [config.data.micro_batch] if config.data.micro_batch else []
    if not rest and share:
        sizes = sizes or _divisors(share)
    for size in sizes or [0]:
        chosen = replace(config, data=replace(config.data, micro_batch=size))
        found: list[int] = [size, 1]

        def check(chosen: Config = chosen, found: list[int] = found) -> None:
            found[:] = chosen.accumulation(world_size)
            chosen.check(world_size)

        yield {"data.micro_batch": size}, found, check


def _fits_together(
    config: Config, world_size: int, engine: dict[str, Any], expert: int, shard: int, rejected: list[Rejected]
) -> bool:
    chosen = replace(
        config,
        engine=replace(config.engine, name=engine["engine.name"]),
        parallel=replace(config.parallel, zero=engine["parallel.zero"], expert=expert, expert_shard=shard),
    )
    try:
        check_engine(chosen, _divisor(chosen, world_size))
        Degrees.resolve(*layout_of(chosen), world_size)
    except ValueError as error:
        rejected.append(Rejected(engine | {"parallel.expert": expert, "parallel.expert_shard": shard}, str(error)))
        return False
    return True


def _free_options(config: Config, *, spread: bool, crosses: bool) -> Iterator[dict[str, Any]]:
    """Options that go with any layout. spread: Experts are on several ranks; crosses: and on several nodes."""
    payloads = get_args(field_types(MoEConfig)["payload"])
    payloads = payloads[: payloads.index(config.model.moe.payload) + 1] if spread else ("none",)
    transports = ("linear", "hierarchical") if spread and crosses else ("linear",)
    # The fused kernel keeps no scores, so that turns save nothing.
    turns = config.model.attention != "fused" and bool(fused_problem(config.model))
    chunks = sorted({config.model.attention_chunk, *((0, _CHUNK) if turns else ())})
    for recompute in ("none", "block"):
        for chunk in chunks:
            for overlap in _OVERLAPS if spread else (1,):
                for transport in transports:
                    for payload in payloads:
                        yield {
                            "recompute": recompute,
                            "attention_chunk": chunk,
                            "overlap": overlap,
                            "transport": transport,
                            "payload": payload,
                        }


def _divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending; of very many the largest ones and 1."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_worlds(config: Config, world_size: int) -> list[int]:
    """Returns the worlds nearest to one that no batch fits, below and above, whose ranks get equal shares."""
    fitting = _divisors(config.data.global_batch)
    below = [n for n in fitting if n <= world_size][-1:]
    return below + [n for n in fitting if n > world_size][:1]
