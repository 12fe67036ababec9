"""The layout that training takes with parallel.plan=auto, and the machine that a run reckons with."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from swin_moe.config import Config
from swin_moe.config.shipped.machines import own_hardware
from swin_moe.planner.hardware import Hardware, load_hardware
from swin_moe.planner.plan import Plan, Planned, make_plan
from swin_moe.planner.runs.check import compare, table, trace_run
from swin_moe.planner.runs.records import read_run
from swin_moe.registry import is_outside

_PACKAGES = ("deepspeed", "fairscale")  # engines that are packages of their own


def hardware_of(name: str) -> tuple[Hardware, str]:
    """Returns (the machine of a name or path, what to write into a config for it); "" = the machine's own.

    Raises:
        ValueError: The machine has no file of its own, with what to do; or as load_hardware.
    """
    if not name:
        if not own_hardware().is_file():
            raise ValueError(
                f"no hardware is named, and this machine has no file of its own, {own_hardware()}; say "
                "parallel.hardware=NAME (swin-moe plan --hardware NAME), or write it: swin-moe calibrate --out FILE"
            )
        name = str(own_hardware())
    return load_hardware(name), name


def choose_layout(config: Config, world_size: int, overrides: Sequence[str]) -> tuple[list[str], str]:
    """Returns (overrides that make the best layout, what was chosen, in words).

    Options that the command line says, and engines that are installed, bound the choice.

    Raises:
        ValueError: No layout fits, with what would.
    """
    hardware, name = hardware_of(config.parallel.hardware)
    plan = make_plan(config, hardware, world_size)
    best = next(_possible(plan, config, overrides), None)
    if best is None:
        asked = " ".join(overrides)
        raise ValueError(f"parallel.plan=auto: no layout of {world_size} ranks on {hardware.name} has {asked}")
    chosen = [f"{key}={value}" for key, value in best.layout.options().items()]
    expected = f"{best.images_per_second:,.0f} images/s, {best.memory.total / 2**30:.2f} GiB a rank"
    text = f"best of {len(plan.layouts)} layouts for {world_size} x {hardware.name}, {expected} expected: "
    return [*chosen, "parallel.plan=none", f"parallel.hardware={name}"], text + " ".join(chosen)


def _possible(plan: Plan, config: Config, overrides: Sequence[str]) -> Iterator[Planned]:
    said = {word.partition("=")[0].strip() for word in overrides}
    for planned in plan.layouts:
        options = planned.layout.options()
        kept = all(value == _value(config, key) for key, value in options.items() if key in said)
        if kept and _installed(planned.layout.engine):
            yield planned


def _value(config: Config, key: str) -> object:
    found: object = config
    for word in key.split("."):
        found = getattr(found, word)
    return found


def _installed(engine: str) -> bool:
    return is_outside(engine) or engine not in _PACKAGES or importlib.util.find_spec(engine) is not None


def report(directory: Path, hardware: str) -> list[str]:
    """Returns predicted against measured of a run as lines, or why there is nothing to compare."""
    try:
        machine, _ = hardware_of(hardware)
        run = read_run(str(directory))
        return table(compare(trace_run(run), machine), f"predicted for {run.ranks} x {machine.name}, and measured:")
    except (ValueError, OSError) as error:
        return [f"predicted against measured: {error}"]
