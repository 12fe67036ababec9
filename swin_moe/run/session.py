"""What every entry point sets up in the same order: configuration, ranks, device, model; and how errors end it."""

import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.checkpoint.errors import describe, out_of_memory
from swin_moe.config import Config, ParallelConfig
from swin_moe.config.arguments import refuse_options
from swin_moe.config.checks import MOST_THREADS
from swin_moe.config.choices import facts_of
from swin_moe.config.io import apply_overrides, load_config
from swin_moe.engine.common import materialize
from swin_moe.engine.limits import check_engine
from swin_moe.engine.precision import DTYPES
from swin_moe.models.attention import check_attention, stage_geometry
from swin_moe.models.network import Network
from swin_moe.moe import MoELayer
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.exchange.tune import tune
from swin_moe.parallel.groups import Degrees, Groups, build_groups, init_distributed, meeting_store
from swin_moe.parallel.heartbeat import LONG_SECONDS, Heartbeat
from swin_moe.run.agreement import check_agreement
from swin_moe.run.expert_load import moe_layers
from swin_moe.run.metrics import LOGGER
from swin_moe.run.state import STOPPED, Stopped
from swin_moe.tasks.base import Task, build_task, find_task

# In what gloo and NCCL say when a peer closed its connections; gloo raises plain RuntimeErrors.
_BROKEN_COLLECTIVE = r"gloo|NCCL|Connection (closed|reset|refused)"
_LESS_MEMORY = (
    "lower data.micro_batch (in evaluation data.eval_batch) or the sizes under model, set parallel.recompute=block, or "
    "use more ranks"
)


@dataclass(frozen=True)
class Session:
    """A checked configuration on this rank of a started world."""

    config: Config
    groups: Groups
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    plan: str = ""  # what chose the layout, in words, where the planner did

    @property
    def rank(self) -> int:
        """This process, 0 to world_size - 1."""
        return self.groups.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.groups.world_size

    @property
    def directory(self) -> Path:
        """The run directory, <output>/<name>."""
        return Path(self.config.run.output) / self.config.run.name

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a collective that fails because a rank is gone into a ConnectionError naming it; ends the heartbeat."""
        try:
            yield
        except RuntimeError as error:
            broken = isinstance(error, dist.DistError) or re.search(_BROKEN_COLLECTIVE, str(error))
            sentence = self.heartbeat.find_lost() if broken and self.world_size > 1 else None
            if sentence is None:
                raise
            raise ConnectionError(sentence) from error
        finally:
            self.heartbeat.stop()


def parse_arguments(argv: list[str], usage: str, options: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Returns (config path or name, the other words); prints the usage and exits for -h or a missing config.

    Args:
        usage: Begins with "usage: swin-moe COMMAND".
        options: Those that the command has beside key=value.

    Raises:
        ValueError: Another option.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(usage)
        raise SystemExit(0 if argv else 2)
    refuse_options(usage.split()[2], argv, options)
    return argv[0], argv[1:]


def pick_device(name: str, local_rank: int) -> torch.device:
    """Returns this rank's device.

    Raises:
        ValueError: engine.device=cuda without a CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("engine.device=cuda, but this torch sees no CUDA device; use engine.device=cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def fit_precision(config: Config, device: torch.device, *, told: bool, cpuinfo: str = "/proc/cpuinfo") -> Config:
    """Returns the config with what a CPU computes well in place of fp16, which official files ask of GPUs.

    A Swin-T step of 16 images took 5.6 s of a CPU in fp16, 0.32 in fp32 and 0.19 in bf16. bf16 only where the processor
    has instructions for it. Whoever writes engine.precision=fp16 on the command line gets it.

    Args:
        told: Say so on the console, in one line.
    """
    if device.type != "cpu" or config.engine.precision != "fp16":
        return config
    file = Path(cpuinfo)
    native = file.is_file() and re.search(r"\b(avx512_bf16|amx_bf16)\b", file.read_text(errors="replace"))
    precision: Literal["bf16", "fp32"] = "bf16" if native else "fp32"
    if told:
        print(f"engine.precision={precision} instead of the config's fp16, which is slow on a CPU", file=sys.stderr)
    return replace(config, engine=replace(config.engine, precision=precision))


def layout_of(config: Config) -> tuple[ParallelConfig, int]:
    """Returns (degrees wanted, number of experts); a model without experts is plain data parallel."""
    if config.model.moe.has_blocks:
        return config.parallel, config.model.moe.num_experts
    return replace(config.parallel, expert=1, expert_shard=1), 1


def default_threads() -> int:
    """Returns the threads of OMP_NUM_THREADS if set, else the cores this rank is bound to; torch counted them before.

    Raises:
        ValueError: More than engine.threads may be; torch would end the process without a word.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is by nested levels
    if not (threads.isdecimal() and threads.isascii() and threads.strip("0")):
        return len(os.sched_getaffinity(0))
    if len(threads) > 6 or int(threads) > MOST_THREADS:
        raise ValueError(f"environment variable OMP_NUM_THREADS must be at most {MOST_THREADS}, got {threads[:20]}")
    return int(threads)


def check_layout(config: Config, world_size: int) -> None:
    """Raises ValueError where a world of this many ranks cannot run the config; pure arithmetic, starts nothing."""
    config.check(world_size)
    check_engine(config, world_size, changes_weights=find_task(config).changes_weights)
    Degrees.resolve(*layout_of(config), world_size)


Chooser = Callable[[Config, int, Sequence[str]], tuple[list[str], str]]


def open_session(path: str, overrides: list[str], choose: Chooser | None = None) -> Session:
    """Returns the session; everything that can be refused is refused here, before memory is allocated.

    Args:
        choose: With parallel.plan=auto, asked on rank 0 for (overrides that make the layout, why, in words) of a config
            in a world of so many ranks with the overrides of the command line. Without it the config's own layout runs.

    Raises:
        ValueError: Bad config, one that differs between ranks, or a world that cannot hold the layout.
    """
    from launcher import guard, mpi  # entry points only: the package itself never needs the launcher

    env = mpi.bootstrap()
    config = load_config(path, overrides)
    planned = choose is not None and config.parallel.plan == "auto"
    if not planned:
        check_layout(config, env.world_size)
    torch.set_num_threads(config.engine.threads or default_threads())
    device = pick_device(config.engine.device, env.local_rank)
    if not any(word.partition("=")[0].strip() == "engine.precision" for word in overrides):
        config = fit_precision(config, device, told=env.rank == 0)
    heartbeat = Heartbeat(env.rank, env.world_size, timeout=config.engine.timeout, note=guard.note)
    limit = LONG_SECONDS + config.engine.timeout  # the heartbeat is what ends a hang, long before a collective does
    if env.world_size > 1:
        init_distributed(device, timeout=limit, patience=config.engine.timeout)
        heartbeat.start(meeting_store(), lambda sentence: _end_job(env.rank, sentence, heartbeat.culprit))
        check_agreement(config, env.rank, meeting_store())
    plan = ""
    if choose is not None and planned:
        heartbeat.enter("planning the layout", long=True)
        config, plan = _planned(config, env.rank, env.world_size, lambda: choose(config, env.world_size, overrides))
        check_layout(config, env.world_size)
    routing_ranks = config.routing_ranks(env.world_size)
    moe = config.model.moe
    two_hops = moe.has_blocks and (moe.transport == "hierarchical" or moe.tune == "measure")
    groups = build_groups(
        *layout_of(config),
        device,
        routing_ranks=routing_ranks,
        timeout=limit,
        two_hops=two_hops,
        saves_in_background=config.checkpoint.asynchronous,
    )
    return Session(config, groups, device, heartbeat, plan)


def _planned(
    config: Config, rank: int, world_size: int, choose: Callable[[], tuple[list[str], str]]
) -> tuple[Config, str]:
    """Returns (the config with the layout that rank 0 chose, why, in words), the same on all ranks."""
    if world_size == 1:
        chosen, plan = choose()
        return apply_overrides(config, chosen), plan
    store, key = meeting_store(), "swin_moe/plan"
    if rank == 0:
        store.set(key, json.dumps(choose()))
    store.wait([key], timedelta(seconds=LONG_SECONDS))
    chosen, plan = json.loads(store.get(key))
    return apply_overrides(config, chosen), plan


def _end_job(rank: int, sentence: str, culprit: int) -> None:
    """Prints why, on the console and in this rank's log, and ends every rank; for a thread beside a hanging one."""
    from launcher import ending
    from launcher.failure.kinds import STALL

    _log_to_file(sentence)
    words = ending.end_stalled(culprit, f"error: {sentence}")
    print(f"[rank {rank}] {words}", file=sys.stderr, flush=True)
    os._exit(STALL)


def _log_to_file(text: str) -> None:
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, text, (), None))


def build_meta_model(session: Session, task: Task) -> Network:
    """Returns this rank's part of a task's network without memory: an engine shards and materializes it."""
    config = session.config
    assert (session.groups.routing is not None) == (config.routing_ranks(session.world_size) > 1)
    check_attention(config.model, device_type=session.device.type, dtype=DTYPES[config.engine.precision])
    with torch.device("meta"):
        model = task.build_network()
    model = parallelize(model, layout_of(config)[0], session.groups)
    task.connect(model, session.groups)
    if config.model.moe.tune == "measure":
        session.heartbeat.enter("tuning the exchange of rows", long=True)
        dtype = DTYPES[config.engine.precision]
        tune(_rows_of_layers(model, config, session.world_size), session.groups, dtype=dtype, device=session.device)
    return model


def _rows_of_layers(model: nn.Module, config: Config, world_size: int) -> Iterator[tuple[MoELayer, int]]:
    """Yields every MoE layer with the rows that one rank sends to experts in one micro-batch, if none is dropped."""
    micro_batch, _ = config.accumulation(world_size)
    moe = config.model.moe
    stages = [stage for stage, depth in enumerate(config.model.depths) for _ in range(depth)]
    for _, layer in moe_layers(model):
        tokens = math.prod(stage_geometry(config.model, stages[layer.layer]).resolution)
        yield layer, micro_batch * facts_of(moe).rows(moe, tokens)


def build_local_model(session: Session, task: Task) -> Network:
    """Returns this rank's part of a task's network, initialized from the seed; never experts of other ranks."""
    return materialize(build_meta_model(session, task), session.config, session.device)


def build_classifier(session: Session) -> Network:
    """Returns this rank's part of a classification network, initialized from the seed, for entry points that need one.

    Raises:
        ValueError: The config is of another task.
    """
    if not session.config.task.options.classifies:
        raise ValueError(f"this command is for task.name=classify, the config has task.name={session.config.task.name}")
    return build_local_model(session, build_task(session.config))


def run_main(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs an entry point on this rank; an error of the user's becomes one sentence and exit code 2, 71 for memory.

    What all ranks find alike is printed once (launcher/ending.py); a run that was asked to stop ends with STOPPED.
    """
    from launcher import mpi

    mpi.call(lambda: _run_guarded(main, sys.argv[1:] if argv is None else argv))


def _run_guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    from launcher import ending, unread
    from launcher.failure.kinds import CONFIGURATION, MEMORY

    unread.open_streams()
    try:
        main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("error: interrupted by Ctrl-C; what was saved before is kept", ending.INTERRUPTED)
    except Stopped:
        code = STOPPED
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and not dist.is_initialized() and unread.is_unread():
            unread.end_unread()
        short = out_of_memory(error)
        if short is None and not isinstance(error, ValueError | OSError):
            raise
        sentence = describe(error) if short is None else f"{short}: {_LESS_MEMORY}"
        if os.environ.get("SWIN_MOE_TRACEBACK"):
            traceback.print_exc()
        _log_to_file(sentence)
        _let_rank_0_speak()
        _fail(f"error: {sentence}", CONFIGURATION if short is None else MEMORY)
    else:
        code = 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        ending.fail("", code)


def _fail(words: str, code: int) -> NoReturn:
    """Ends every rank as ending.fail does; where MPI does not end them, without a word of the interpreter's.

    Threads of gloo still run then, perhaps in a collective that will never end. One that asks for the interpreter while
    that is being taken down would end the process with "terminate called without an active exception" instead.
    """
    from launcher import ending

    ending.end_all_ranks(code, words)
    if dist.is_initialized():
        print(words, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ending.fail(words, code)


def _let_rank_0_speak() -> None:
    """Waits a moment in other ranks than 0 that have not met it and cannot ask MPI what it says: if it finds the same,
    its exit ends them."""
    from launcher.env import speaks_first

    if not dist.is_initialized() and not speaks_first(os.environ) and "mpi4py.MPI" not in sys.modules:
        time.sleep(10)
