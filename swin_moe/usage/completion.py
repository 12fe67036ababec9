"""`swin-moe completion bash | zsh | fish`: what the shell asks when Tab is pressed, and the answer."""

import argparse
import sys
from collections.abc import Iterable

from swin_moe.config import Config
from swin_moe.config.arguments import command_parser, print_answer
from swin_moe.config.coerce import schema_keys
from swin_moe.config.io import config_files, config_folder
from swin_moe.config.shipped.released import released
from swin_moe.usage.texts import EXAMPLES

# Options of every command beside -h; those of launch are the launcher's most used ones.
OPTIONS: dict[str, tuple[str, ...]] = {
    "train": (),
    "evaluate": (),
    "evaluate-features": ("--k", "--temperature", "--shots", "--draws", "--l2"),
    "predict": ("--top", "--json", "--csv", "--batch", "--names", "--out", "--score"),
    "inspect-routing": ("--out", "--images"),
    "throughput": (),
    "data": ("--labels", "--image-column", "--class-column", "--sheet", "--json", "--workers")
    + ("--val", "--seed", "--out", "--how", "--shrink"),
    "demo": ("--host", "--port"),
    "report": ("--out", "--pictures", "--images"),
    "plan": ("--gpus", "--hardware", "--json", "--top", "--images", "--skew", "--plot", "--check", "--refit", "--out"),
    "calibrate": ("--out", "--overwrite", "--like", "--preflight"),
    "simulate": ("--gpus", "--hardware", "--spread", "--routing", "--seed", "--oversubscription", "--leaf", "--json"),
    "checkpoint": (),
    "weights": ("--folder", "--json", "--task"),
    "configs": ("--json",),
    "show": ("--changed", "--section", "--json"),
    "doctor": ("--no-measure",),
    "completion": (),
    "launch": ("--hostfile", "--dry-run", "--restarts", "--log-dir", "--preflight", "--plan", "--hardware"),
}
VERBS = {
    "data": ("check", "split"),
    "weights": ("list", "fetch", "path"),
    "completion": ("bash", "zsh", "fish"),
    "checkpoint": (
        "inspect",
        "verify",
        "diff",
        "plan",
        "reshard",
        "convert",
        "upcycle",
        "experts",
        "average",
        "export",
    ),
}
CONFIGURED = (
    *("train", "evaluate", "evaluate-features", "predict", "inspect-routing", "throughput"),
    *("plan", "simulate", "show", "demo"),
)
# A word that ends in "=" is gone on with; the others end with a space, which the shell adds nothing to.
_SCRIPTS = {
    "bash": """_swin_moe() {
    local IFS=$'\\n'
    COMPREPLY=($(swin-moe completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o default -o nospace -F _swin_moe swin-moe""",
    "zsh": """#compdef swin-moe
_swin_moe() {
    local -a found
    found=("${(@f)$(swin-moe completion words -- "${words[@]:1:$((CURRENT - 1))}" 2>/dev/null)}")
    [[ -n "${found[1]}" ]] && compadd -Q -S '' -- "${found[@]}" || _files
}
compdef _swin_moe swin-moe""",
    "fish": """function __swin_moe
    swin-moe completion words -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null | string trim --right
end
complete -c swin-moe -a '(__swin_moe)'""",
}


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    words = sys.argv[1:] if argv is None else argv
    if words[:2] == ["words", "--"]:  # what the scripts call
        print("\n".join(candidates(words[2:])))
        return 0
    return print_answer(lambda: _SCRIPTS[_parse(words).shell])


def candidates(words: list[str]) -> list[str]:
    """Returns what the last word may become, with a space where it is then complete; [] = a file, or anything.

    words: After swin-moe, up to where the cursor is.
    """
    begun, before = (words[-1], words[:-1]) if words else ("", [])
    if not before:
        return _that_begin(begun, [*OPTIONS, "--version", "--help"])
    command, rest = before[0], before[1:]
    if begun.startswith("-"):
        return _that_begin(begun, [*OPTIONS.get(command, ()), "--help"])
    if command in VERBS and not rest:
        return _that_begin(begun, VERBS[command])
    if command == "weights" and rest[0] in ("fetch", "path"):
        return _that_begin(begun, released())
    if command in CONFIGURED and not rest:
        return _that_begin(begun, _configs())
    if command in CONFIGURED or command == "launch" and "swin_moe.train" in rest:
        if command == "launch" and rest[-1] == "swin_moe.train":
            return _that_begin(begun, _configs())
        return [f"{key}=" for key in _keys() if key.startswith(begun)] if begun else []
    return []


def _that_begin(begun: str, words: Iterable[str]) -> list[str]:
    return [f"{word} " for word in words if word.startswith(begun)]


def _configs() -> list[str]:
    return sorted(path.stem for path in config_files() if path.parent != config_folder())


def _keys() -> list[str]:
    """Returns the dotted names of options that have a value, not of their sections."""
    keys = list(schema_keys(Config))
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def _parse(words: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "completion",
        "Prints a script that completes commands, configs, options and their keys.",
        EXAMPLES["completion"],
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    return parser.parse_args(words)
