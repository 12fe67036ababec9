"""`swin-moe COMMAND ...`, or `python -m swin_moe COMMAND ...`: one name for every entry point."""

import contextlib
import difflib
import importlib
import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING

from swin_moe.usage.texts import USAGES

if TYPE_CHECKING:
    from launcher.job.options import Parser

# Each command is imported when chosen: `checkpoint` needs no torch, and must not load it.
COMMANDS = {
    "train": ("swin_moe.train", "train a run, or continue it"),
    "evaluate": ("swin_moe.evaluate", "exact metrics of a checkpoint"),
    "evaluate-features": ("swin_moe.evaluate_features", "k nearest neighbours and few-shot accuracy of a checkpoint"),
    "data": ("swin_moe.curate.command", "own images: what is in a folder and wrong with it; train and val"),
    "predict": ("swin_moe.predict.command", "classes of image files"),
    "inspect-routing": ("swin_moe.inspect_routing", "pictures: which expert took which patch"),
    "report": ("swin_moe.report.command", "one HTML page of runs: records, experts, validation images"),
    "demo": ("swin_moe.demo.command", "a page: upload an image; classes or objects, experts, attention, features"),
    "throughput": ("swin_moe.throughput", "images per second and memory of a model"),
    "plan": ("swin_moe.planner.command", "which layouts N devices can run: memory, time, and why others fail"),
    "calibrate": ("swin_moe.planner.calibrate.command", "measure this machine for `plan --hardware FILE`"),
    "simulate": ("swin_moe.planner.simulation.command", "one step on a world that is not there, with uneven experts"),
    "checkpoint": ("checkpoint_tools.__main__", "inspect, verify, compare, convert checkpoints"),
    "weights": ("swin_moe.weights.command", "the released official files: list them, fetch them"),
    "configs": ("swin_moe.config.shipped.listing", "the shipped configs: size, published accuracy, released weights"),
    "show": ("swin_moe.config.shipped.show", "every option of a config, and where its value comes from"),
    "doctor": ("swin_moe.doctor", "what of this machine and installation is used, and why the rest is not"),
    "completion": ("swin_moe.usage.completion", "what bash, zsh or fish completes of these commands"),
    "launch": ("launcher.__main__", "start a module on many ranks: swin-moe launch -n 2 -- -m swin_moe.train CONFIG"),
}


def main() -> None:
    """Runs the command named by the first argument; an output that nobody reads on (`| head`) ends it in silence."""
    from launcher.unread import until_unread

    until_unread(_run)


def _run() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: swin-moe COMMAND [arguments]; swin-moe COMMAND --help says more\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        sys.exit(0 if arguments else 2)
    name = arguments.pop(0)
    if name in ("-V", "--version"):
        print(f"swin-moe {_version()}")
        sys.exit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        print(f"error: unknown command {name!r}; {meant}allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if name in USAGES and (not arguments or "-h" in arguments or "--help" in arguments):  # without torch
        print(USAGES[name])
        sys.exit(0 if arguments else 2)
    if name in ("train", "evaluate", "evaluate-features", "throughput"):
        check_config(arguments)
    if name in ("plan", "calibrate", "simulate", "report"):
        check_words(name, arguments)
    module = importlib.import_module(COMMANDS[name][0])
    if name == "launch":
        if arguments[:1] in (["-h"], ["--help"]):
            print(launch_help(), end="")
            sys.exit(0)
        try:
            refuse_words_of_others(arguments)
            arguments = with_plan(arguments)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        with contextlib.suppress(ValueError):  # the launcher says what is wrong with its own options
            check_before_launch(*module.parse(arguments))
        sys.exit(module.main(arguments))
    if name in ("plan", "simulate", "checkpoint", "weights", "configs", "show", "doctor", "data", "completion", "demo"):
        module.run(arguments)
    else:
        from swin_moe.run.session import run_main

        run_main(module.main, arguments)


def check_config(arguments: list[str]) -> None:
    """Exits with one sentence and code 2 where a command of one process would refuse its config: it would say the same
    after importing torch, which takes seconds. Reading a config twice takes 0.1 s.

    Ranks say it together (session.run_main), and options beside key=value are the command's.
    """
    from launcher.env import detect
    from swin_moe.checkpoint.errors import describe
    from swin_moe.config.io import load_config

    asks_for_more = os.environ.get("SWIN_MOE_TRACEBACK") or any(word.startswith("-") for word in arguments)
    if asks_for_more or detect(os.environ) != "single":
        return
    try:
        load_config(arguments[0], arguments[1:])
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


def _version() -> str:
    try:
        return importlib.metadata.version("swin-moe")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the import path
        return "of a checkout that is not installed (pip install -e . gives it a version)"


def check_words(name: str, arguments: list[str]) -> None:
    """Exits with the help of a command that loads torch, or with one sentence and code 2 for wrong options: reading
    them twice costs less than the imports, which take seconds. Ranks say it together (session.run_main)."""
    from launcher.env import detect
    from swin_moe.usage.parsers import PARSERS

    if os.environ.get("SWIN_MOE_TRACEBACK") or detect(os.environ) != "single":
        return
    try:
        PARSERS[name](arguments)
    except BrokenPipeError:  # of its help; `until_unread` ends it
        raise
    except (ValueError, OSError) as error:
        from swin_moe.checkpoint.errors import describe  # it loads numpy

        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


# What other launchers call it -> what to type here.
_RANKS = "-n N is the number of all ranks"
_LAUNCHERS = {
    **dict.fromkeys(("-np", "--np", "--nproc", "--nproc_per_node", "--num_processes", "--gpus", "--num_gpus"), _RANKS),
    **dict.fromkeys(
        ("--nodes", "--nnodes", "--num_nodes", "--num_machines"),
        f"{_RANKS}, and --hostfile FILE names the nodes; an allocation of a scheduler needs neither (swin-moe launch "
        f"script writes its batch script)",
    ),
}


def refuse_words_of_others(arguments: list[str]) -> None:
    """Raises ValueError for options of other launchers, and for a command or config where a program has to stand."""
    from launcher.job.options import split_at_dashes

    before, program = split_at_dashes(arguments)
    for number, word in enumerate(before):
        if (name := word.partition("=")[0]) in _LAUNCHERS and arguments[:1] != ["script"]:
            raise ValueError(f"swin-moe launch has no option {name}: {_LAUNCHERS[name]}")
        if word == "-m":
            said = " ".join([*before[:number], "--", *before[number:]])
            raise ValueError(f"swin-moe launch: the program stands after --: swin-moe launch {said}")
    if not program or program[0].startswith("-") or os.path.isfile(program[0]):
        return
    words = program[1:] if program[0] in ("swin-moe", "python", "python3") else program
    if words[:1] == ["-m"]:
        raise ValueError(f"swin-moe launch: Python is started by it: -- {' '.join(words)}")
    if words[:1] == ["train"] or words and _is_config(words[0]):
        said = " ".join(words[1:] if words[0] == "train" else words) or "CONFIG"
        raise ValueError(f"swin-moe launch: after -- stands a module: -- -m swin_moe.train {said}")


def _is_config(word: str) -> bool:
    from swin_moe.config.io import find_config

    try:
        return find_config(word).is_file()
    except ValueError:
        return False


def with_plan(arguments: list[str]) -> list[str]:
    """Returns the launcher's arguments without our own --plan and --hardware NAME, which become options of the program:
    training takes the best layout of the planner for the ranks that are there, also after a restart on fewer.

    Raises:
        ValueError: The program is not our training, or one option is there without the other's sense.
    """
    from launcher.job.options import Parser, split_at_dashes

    before, program = split_at_dashes(arguments)
    options, own = _add_plan(Parser(prog="swin-moe launch", add_help=False, allow_abbrev=False)).parse_known_args(
        before
    )
    if options.hardware is None and not options.plan:
        return arguments
    if not options.plan:
        raise ValueError("swin-moe launch: --hardware is for --plan; give that as well")
    if program[:2] != ["-m", "swin_moe.train"] or len(program) < 3:
        raise ValueError(
            "swin-moe launch: --plan chooses the layout of training; it goes with -- -m swin_moe.train CONFIG"
        )
    hardware = [] if options.hardware is None else [f"parallel.hardware={options.hardware}"]
    return [*own, "--", *program, "parallel.plan=auto", *hardware]


def launch_help() -> str:
    """Returns the launcher's help with what `swin-moe launch` takes beside it."""
    from launcher.job.options import parser

    return _add_plan(parser()).format_help()


def _add_plan(made: "Parser") -> "Parser":
    add = made.add_argument_group("of swin-moe launch, for -m swin_moe.train").add_argument
    add("--plan", action="store_true", help="train with the best layout that `swin-moe plan` finds for the ranks")
    add("--hardware", metavar="NAME", help="the machine to plan for: a name or a YAML file, as `swin-moe plan` takes")
    return made


def check_before_launch(ranks: int, program: list[str]) -> None:
    """Exits with one sentence and code 2 where every rank of a program of ours would refuse its config or layout.

    `python -m launcher` knows nothing of us; under it each rank finds the same before it allocates or meets the others.
    """
    from swin_moe.checkpoint.errors import describe
    from swin_moe.config.io import load_config
    from swin_moe.run.session import check_layout

    starts = [["-m", f"swin_moe.{name}"] for name in ("train", "evaluate", "throughput")]
    options = program[2:]
    if ranks < 1 or program[:2] not in starts or not options or options[0] in ("-h", "--help"):
        return
    try:
        config = load_config(options[0], options[1:])
        if program[1] != "swin_moe.train" or config.parallel.plan == "none":
            check_layout(config, ranks)  # a planned layout is checked when there is one
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
