"""`swin-moe COMMAND ...`: one name for every entry point."""

import importlib
import sys

from swin_moe.session import run_main

COMMANDS = {
    "train": ("swin_moe.train", "train a run, or continue it"),
    "evaluate": ("swin_moe.evaluate", "exact metrics of a checkpoint"),
    "predict": ("swin_moe.predict", "classes of image files"),
    "throughput": ("swin_moe.throughput", "images per second and memory of a model"),
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
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[name][0])
    if name == "launch":
        sys.exit(module.main(arguments))
    run_main(module.main, arguments)


if __name__ == "__main__":
    main()
