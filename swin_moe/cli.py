"""`swin-moe COMMAND ...`, or `python -m swin_moe COMMAND ...`: one name for every entry point."""

import contextlib
import difflib
import importlib
import importlib.metadata
import sys

# Each command is imported when chosen: `checkpoint` needs no torch, and must not load it.
COMMANDS = {
    "train": ("swin_moe.train", "train a run, or continue it"),
    "evaluate": ("swin_moe.evaluate", "exact metrics of a checkpoint"),
    "evaluate-features": ("swin_moe.evaluate_features", "k nearest neighbours and few-shot accuracy of a checkpoint"),
    "predict": ("swin_moe.predict", "classes of image files"),
    "inspect-routing": ("swin_moe.inspect_routing", "pictures: which expert took which patch"),
    "throughput": ("swin_moe.throughput", "images per second and memory of a model"),
    "plan": ("swin_moe.planner.command", "which layouts N devices can run: memory, time, and why others fail"),
    "simulate": ("swin_moe.planner.simulation.command", "one step on a world that is not there, with uneven experts"),
    "checkpoint": ("checkpoint_tools.__main__", "inspect, verify, compare, convert checkpoints"),
    "configs": ("swin_moe.config.listing", "names of the shipped configs"),
    "doctor": ("swin_moe.doctor", "what of this machine and installation is used, and why the rest is not"),
    "launch": ("launcher.__main__", "start a module on many ranks: swin-moe launch -n 2 -- -m swin_moe.train CONFIG"),
}


def main() -> None:
    """Runs the command named by the first argument."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: swin-moe COMMAND [arguments]; swin-moe COMMAND --help says more\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        sys.exit(0 if arguments else 2)
    name = arguments.pop(0)
    if name in ("-V", "--version"):
        print(f"swin-moe {importlib.metadata.version('swin-moe')}")
        sys.exit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        print(f"error: unknown command {name!r}; {meant}allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[name][0])
    if name == "launch":
        with contextlib.suppress(ValueError):  # the launcher says what is wrong with its own options
            check_before_launch(*module.parse(arguments))
        sys.exit(module.main(arguments))
    if name in ("plan", "simulate", "checkpoint", "configs", "doctor"):
        module.run(arguments)
    else:
        from swin_moe.run.session import run_main

        run_main(module.main, arguments)


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
        check_layout(load_config(options[0], options[1:]), ranks)
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
