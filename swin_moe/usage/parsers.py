"""The options of commands that import much for their work: their help, and what is wrong with their words, need none.

PARSERS is the table: a new command of this kind is a row, and its command.py takes its options from here.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swin_moe.config.arguments import command_parser
from swin_moe.config.shipped.machines import own_hardware, shipped_hardware
from swin_moe.usage.texts import EXAMPLES

MOST_GPUS = 1 << 20  # that commands take: layouts of still more would be looked through for hours
_LAYOUTS = 12  # on the screen
_IMAGES = 2000  # of validation


def plan(argv: list[str] | None) -> Any:
    """Returns the options of `swin-moe plan`; raises ValueError for wrong ones."""
    parser = command_parser(
        "plan",
        "Which layouts of a config N ranks can run, what each needs and how long a step takes.",
        EXAMPLES["plan"],
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="a YAML file or the name of one in configs/")
    add("overrides", nargs="*", metavar="key=value", help="any option of the config")
    add("--gpus", type=int, metavar="N", help="ranks, one per device; of a run, where its records do not say them")
    known = ", ".join(shipped_hardware())
    add("--hardware", default="", metavar="NAME", help=f"{known}, or a YAML file (default: {own_hardware()})")
    add("--json", action="store_true", help="all layouts and rejections as JSON")
    add("--top", type=int, default=_LAYOUTS, metavar="K", help=f"layouts in the table ({_LAYOUTS})")
    add("--images", type=int, default=0, metavar="N", help="training images of an epoch (default: known ones)")
    add("--skew", default="", metavar="RUN", help="a run whose recorded loads of experts give the interval of a step")
    add("--plot", default="", metavar="FILE.png", help="draw best layouts over numbers of ranks, and their memory")
    add("--check", default="", metavar="RUN", help="instead: predicted against measured, of a run's folder")
    add("--refit", nargs="+", default=[], metavar="RUN", help="instead: fit the machine's *_share to runs, into --out")
    add("--out", default="", metavar="FILE.yaml", help="where --refit writes the machine")
    options = parser.parse_intermixed_args(argv)
    _check_plan(options)
    return options


def _check_plan(options: Any) -> None:
    """Raises ValueError for options that do not go together."""
    of_runs = bool(options.check or options.refit)
    _check_numbers("plan", options, gpus=1, top=1, images=0)
    if of_runs and options.config is not None:
        raise ValueError(f"swin-moe plan: --check and --refit read a run's own config, got {options.config} as well")
    if options.check and options.refit:
        raise ValueError("swin-moe plan: --check and --refit are two commands; give one of them")
    if bool(options.refit) != bool(options.out):
        raise ValueError("swin-moe plan: --refit RUN... and --out FILE.yaml go together")
    if not of_runs and (options.config is None or options.gpus is None):
        missing = "CONFIG" if options.config is None else "--gpus N"
        raise ValueError(f"swin-moe plan: {missing} is needed; swin-moe plan --help says more")
    if options.plot and Path(options.plot).suffix.lower() != ".png":
        raise ValueError(f"swin-moe plan: --plot must be a .png file, got {options.plot}")


def calibrate(argv: list[str] | None) -> Any:
    """Returns the options of `swin-moe calibrate`; raises ValueError for wrong ones."""
    parser = command_parser(
        "calibrate",
        "Measures the machine at hand and writes a hardware file for `swin-moe plan --hardware FILE`.",
        EXAMPLES["calibrate"],
    )
    parser.add_argument("--out", default="machine.yaml", metavar="FILE", help="what is written (machine.yaml)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    known = ", ".join(shipped_hardware())
    parser.add_argument("--like", metavar="NAME", help=f"whose price, power and links are taken: {known}, or a file")
    parser.add_argument("--preflight", metavar="FILE", help="links from what `swin-moe launch --preflight-file` wrote")
    options = parser.parse_args(argv)
    if not options.out.endswith((".yaml", ".yml")):
        raise ValueError(f"--out must be a YAML file, got {options.out!r}")
    return options


def simulate(argv: list[str] | None) -> Any:
    """Returns the options of `swin-moe simulate`; raises ValueError for wrong ones."""
    parser = command_parser(
        "simulate",
        "One optimizer step on a world that is not there, event by event, with uneven experts.",
        EXAMPLES["simulate"],
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option of the config")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, one per device")
    known = ", ".join(shipped_hardware())
    parser.add_argument("--hardware", required=True, metavar="NAME", help=f"{known}, or a YAML file")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        metavar="CV",
        help="standard deviation over mean of the experts' loads (0 = even)",
    )
    parser.add_argument("--routing", metavar="RUN", help="folder of a run, or its metrics.jsonl, to draw loads from")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument("--oversubscription", type=float, metavar="X", help="in the place of the hardware file's")
    parser.add_argument("--leaf", type=int, metavar="NODES", help="nodes on a leaf switch, likewise")
    parser.add_argument("--json", action="store_true", help="layout, plan and simulation as JSON")
    options = parser.parse_intermixed_args(argv)
    _check_numbers("simulate", options, gpus=1, leaf=1, oversubscription=1, spread=0, seed=0)
    if options.spread and options.routing:
        raise ValueError("swin-moe simulate: --spread and --routing both say how uneven experts are; give one")
    if options.routing and not Path(options.routing).exists():
        raise ValueError(f"swin-moe simulate: --routing {options.routing}: no such file or folder")
    return options


def report(argv: list[str] | None) -> Any:
    """Returns the options of `swin-moe report`; raises ValueError for wrong ones."""
    parser = command_parser(
        "report", "One HTML page of runs: their records, experts, validation images, configuration.", EXAMPLES["report"]
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="RUN", help="folder of a run; key=value: an option for its validation images")
    add("--out", default="", metavar="FILE.html", help="the page (default: report.html in the first run's folder)")
    add("--pictures", action="store_true", help="also write every picture as a PNG, into a folder beside the page")
    add("--images", type=int, default=_IMAGES, metavar="N", help=f"validation images at most ({_IMAGES}); 0 = none")
    options = parser.parse_intermixed_args(argv)
    _check_numbers("report", options, images=0)
    return options


def _check_numbers(command: str, options: Any, **least: int) -> None:
    """Raises ValueError for a given number below the least of its option, an infinite one, or too many --gpus."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:
            raise ValueError(f"swin-moe {command}: --{name} must be >= {smallest}, got {value}")
    if (getattr(options, "gpus", None) or 0) > MOST_GPUS:
        raise ValueError(f"swin-moe {command}: --gpus must be at most {MOST_GPUS}, got {options.gpus}")


PARSERS: dict[str, Callable[[list[str] | None], Any]] = {
    "plan": plan,
    "calibrate": calibrate,
    "simulate": simulate,
    "report": report,
}
