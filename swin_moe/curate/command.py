"""`swin-moe data check | split`: the command line."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.config.arguments import command_parser

_EXAMPLES = """examples:
  what is in a folder of photos, and what is wrong with it
    swin-moe data check photos
  a folder of files and a table that names their classes: split, checked, trained on
    swin-moe data split photos --labels labels.csv --val 0.2 --seed 0 --out photos_split
    swin-moe data check photos_split
    swin-moe train finetune_photos data.path=photos_split
  the same with folders of links, which other programs read too
    swin-moe data split photos --out photos_split --how links"""
_CHECK = """examples:
  folders train/ and val/ of class folders
    swin-moe data check data/imagenet
  class folders, or a folder of files with a table of labels
    swin-moe data check photos --labels labels.csv
  for a script: exit code 1 where something spoils training
    swin-moe data check photos --json --sheet none"""
_LARGE = 720  # pixels of a shorter side: decoding such photos anew every epoch takes longer than a small network
_SHEETS = (".png", ".jpg", ".jpeg", ".webp")
_SPLIT = """examples:
  class folders into train.csv and val.csv; nothing is moved
    swin-moe data split photos --out photos_split
  a table of labels, its columns named
    swin-moe data split photos --labels labels.csv --image-column id --class-column breed --out dogs
  a tenth for validation, another draw, as folders of links
    swin-moe data split photos --val 0.1 --seed 7 --out photos_7 --how links
  photos of a camera, once and for all small enough to be read quickly
    swin-moe data split photos --out photos_split --how copies --shrink 256"""


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where `check` found what spoils training; 2 after one sentence about what is wrong."""
    try:
        options = parse(argv)
        return _check(options) if options.verb == "check" else _split(options)
    except BrokenPipeError:  # the command line ends in silence
        raise
    except (ValueError, OSError) as error:
        from swin_moe.checkpoint.errors import describe  # it loads numpy, which --help needs not

        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted by Ctrl-C; nothing was written", file=sys.stderr)
        return 130


def _refuse_path(words: list[str]) -> None:
    """Raises ValueError where images stand in the place of the verb."""
    if words and words[0] not in ("check", "split") and Path(words[0]).exists():
        raise ValueError(f"swin-moe data: what to do with {words[0]}? swin-moe data check {words[0]}, or split")


def parse(argv: list[str] | None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    _refuse_path(sys.argv[1:] if argv is None else argv)
    raw: Any = argparse.RawDescriptionHelpFormatter
    parser = command_parser("data", "Images before training.", _EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", metavar="check | split", required=True)
    check = verbs.add_parser(
        "check",
        help="classes, counts, sizes, broken files, images that stand twice, a contact sheet",
        description="Looks at every image once. Exact duplicates have the same decoded pixels; near ones, between val "
        "and train, have thumbnails that hardly differ.",
        epilog=_CHECK,
        formatter_class=raw,
    )
    split = verbs.add_parser(
        "split",
        help="a folder of images into train and val",
        description="Every class gives its share; which images are a function of the seed and their names.",
        epilog=_SPLIT,
        formatter_class=raw,
    )
    for made in (check, split):
        add = made.add_argument
        add("path", metavar="PATH", type=Path, help="the folder of images, or a table of them")
        add("--labels", type=Path, metavar="TABLE", help="a .csv or .tsv with the class of every image")
        add("--image-column", default="", metavar="NAME", help="its column of file names (default: found by its name)")
        add("--class-column", default="", metavar="NAME", help="its column of classes (default: found by its name)")
    check.add_argument(
        "--sheet",
        default=None,
        metavar="FILE.png",
        help="the contact sheet; none = without (PATH_sheet.png here)",
    )
    check.add_argument("--json", action="store_true", help="everything found, as JSON")
    cores = len(os.sched_getaffinity(0))
    check.add_argument("--workers", type=int, default=cores, help=f"processes that decode (default here: {cores})")
    split.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of every class, for validation (0.2)")
    split.add_argument("--seed", type=int, default=0, help="another number, another draw (0)")
    split.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    split.add_argument(
        "--how", choices=("lists", "links", "copies"), default="lists", help="tables (default), or folders"
    )
    split.add_argument("--shrink", type=int, default=0, metavar="PIXELS", help="of copies: their shorter side at most")
    options, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the verb's own parser, which knows what may have been meant
        (check if options.verb == "check" else split).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.verb == "split" and not 0 < options.val < 1:
        raise ValueError(f"swin-moe data split: --val must be between 0 and 1, got {options.val:g}")
    if options.verb == "split" and options.shrink and (options.shrink < 16 or options.how != "copies"):
        raise ValueError(
            "swin-moe data split: --shrink PIXELS (at least 16) makes smaller copies and goes with --how copies, got "
            f"--shrink {options.shrink} --how {options.how}"
        )
    if options.verb == "check" and options.workers < 1:
        raise ValueError(f"swin-moe data check: --workers must be at least 1, got {options.workers}")
    if options.verb == "check" and options.sheet == "none":
        options.sheet = ""
    elif options.verb == "check" and options.sheet:
        _check_sheet(Path(options.sheet))
    return options


def _check_sheet(path: Path) -> None:
    """Raises ValueError for a contact sheet that could not be written, before every image is looked at."""
    if path.suffix.lower() not in _SHEETS:
        raise ValueError(f"swin-moe data check: --sheet must end in {', '.join(_SHEETS)}, got {str(path)!r}")
    if not path.parent.is_dir() or path.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"swin-moe data check: --sheet {path}: {what}")


def _found(options: Any) -> Any:
    from swin_moe.curate.find import find

    return find(options.path, labels=options.labels, columns=(options.image_column, options.class_column))


def _check(options: Any) -> int:
    from swin_moe.curate.check import as_text, as_tree, check
    from swin_moe.curate.sheet import contact_sheet
    from swin_moe.run.counter import Counter

    found = _found(options)
    counter = Counter("images looked at", sum(map(len, found.splits.values())))
    report = check(found, workers=options.workers, progress=counter)
    counter.clear()
    sheet = f"{options.path.resolve().name}_sheet.png" if options.sheet is None else options.sheet
    if sheet:
        first = next(iter(found.splits))
        contact_sheet(found.splits[first], report.broken[first]).save(sheet)
    if options.json:
        print(json.dumps(as_tree(report) | {"sheet": sheet}, indent=1))
    else:
        print(as_text(report) + (f"\ncontact sheet: {sheet}" if sheet else ""))
        if "" in found.splits:
            large = len(report.size_N2) and int(np.median(report.size_N2.min(axis=1))) > _LARGE
            smaller = " --how copies --shrink 256" if large else ""
            print(f"next: swin-moe data split {_again(options)} --out {options.path.resolve().name}_split{smaller}")
        elif len(found.splits) == 2:
            print("\n".join(_next(options.path)))
    return 0 if report.is_clean else 1


def _split(options: Any) -> int:
    from swin_moe.curate.split import split
    from swin_moe.run.counter import Counter

    found = _found(options)
    counter = Counter("images placed", sum(map(len, found.splits.values())))
    made = {"share": options.val, "seed": options.seed, "how": options.how, "shrink": options.shrink}
    counts = split(found, options.out, **made, progress=counter)
    counter.clear()
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    said = ", ".join(f"{count:,} {part}" for part, count in counts.items())
    print(f"{options.out}: {said}, {len(found.classes)} classes; train with data.path={options.out}")
    print("\n".join(_next(options.out)))
    return 0


def _next(out: Path) -> list[str]:
    """Returns the two commands that may follow."""
    return [
        f"next: swin-moe train finetune_photos data.path={out}  # from ImageNet weights; says how to get them",
        f"  or: swin-moe train photos_from_scratch data.path={out}  # without any: a small network, in minutes",
    ]


def _again(options: Any) -> str:
    """Returns what was typed to name the images, for the next command."""
    words = [str(options.path)]
    for name, value in (
        ("labels", options.labels),
        ("image-column", options.image_column),
        ("class-column", options.class_column),
    ):
        words += [f"--{name} {value}"] if value else []
    return " ".join(words)
