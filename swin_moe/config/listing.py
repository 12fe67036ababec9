"""`swin-moe configs [WORD ...]`: the names of the shipped configs, by folder."""

import sys

from swin_moe.config.io import config_files, config_folder


def shipped(words: list[str]) -> dict[str, list[str]]:
    """Returns folder -> names of the shipped configs with every word in them, but for bases, which are no runs."""
    found: dict[str, list[str]] = {}
    for path in config_files():
        folder = path.parent.name
        if path.parent != config_folder() and all(word in f"{folder}/{path.stem}" for word in words):
            found.setdefault(folder, []).append(path.stem)
    return found


def run(arguments: list[str]) -> None:
    """Prints the names; ends with exit code 2 where no name holds the words."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: swin-moe configs [WORD ...]\n\nNames of the shipped configs that contain every word.")
        return
    found = shipped(arguments)
    if not found:
        print(f"error: no shipped config has {' and '.join(map(repr, arguments))} in its name", file=sys.stderr)
        sys.exit(2)
    for folder, names in found.items():
        print(f"{folder}/\n" + "\n".join(f"  {name}" for name in names))
