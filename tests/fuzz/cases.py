"""Draws wrong inputs: a case depends on nothing but its seed and number."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.__main__ import VERBS
from swin_moe.config import Config
from swin_moe.config.coerce import schema_keys
from swin_moe.config.tasks import MOVED
from tests.fuzz import calls

KEYS = [key for key in schema_keys(Config) if "." in key] + [f"task.{name}" for name in MOVED]
_TEACHER = "task.distill.teacher"
PATH_KEYS = (
    f"data.path run.output run.name checkpoint.load checkpoint.init {_TEACHER} task.distill.teacher_model "
    "model.moe.tune_cache"
).split()
TYPES = [
    "x",
    "",
    "[1]",
    "[[1],[2]]",
    "{a: 1}",
    "null",
    "true",
    "1.5",
    "2024-01-01",
    "!!python/name:os.x",
    "&a [*a]",
    "[",
    "'",
    "é☃",
    "~",
    "[]",
    "[[]]",
    "[1, x]",
    "[null]",
    "a\0b",
    "=",
    "a=b",
    " ",
    "\t",
    "x" * 5000,
    "on",
    "!!int x",
    "\x1b[31m",
    "%s",
    "{0}",
    "-",
    "--x",
]
NUMBERS = (
    f"0 -1 -0.5 1e-9 nan .nan inf -inf .inf 1e400 {'9' * 25} 1000000000 2 3 5 7 1e9 0x10 1_0 1e-400 [0,0] [1,2,3] [-1] "
    f"[1e9,1e9] [1,1] {'9' * 5000} 65537 [9999999999,1] [1.5,2] +1 0.999999999 1e18"
).split()
_OF_ENVIRONMENT = 0.08  # of all cases
_WHOLE = ["x", "", "-1", "1.5", "²", "9" * 25, "0x1", " 1", "0"]
_FOLDERS = [None, "", "/nope", "/dev/null", "relative", "~"]
_WORLD = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
ENVIRONMENT: dict[str, list[str | None]] = {
    **{name: [*_WHOLE] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE")},
    **{name: [*_WHOLE] for name in ("LAUNCHER_RESTART", "LAUNCHER_STALL", "SLURM_NTASKS", "COLUMNS")},
    **{name: [*_FOLDERS] for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "LAUNCHER_REPORTS", "MPI4PY_LIBMPI")},
    "MASTER_PORT": [*_WHOLE, "99999"],
    "MASTER_ADDR": ["", "nope.invalid", "x" * 80, "a..b", "é"],
    "OMP_NUM_THREADS": [*_WHOLE, "99999999", "2,1", "4097"],
    "CUDA_VISIBLE_DEVICES": ["", "nope", "-1", "99", "0,0"],
    "SWIN_MOE_NO_EXT": ["x", "1", ""],
}
NEEDS_IMAGES = ("predict", "inspect-routing")
CONFIGURED = ("train", "evaluate", "evaluate-features", "predict", "inspect-routing", "throughput", "launch")
OPTIONS = {
    "predict": ["--top", "--json", "--names", "--nope", "--to"],
    "inspect-routing": ["--out", "--images", "--nope"],
    "evaluate-features": ["--k", "--temperature", "--shots", "--draws", "--l2", "--nope"],
    "launch": ["-n", "--ranks", "--hostfile", "--env", "--mpi", "--grace", "--nope"],
    "doctor": ["--nope", "--no-measure", "x"],
}
VERB_OPTIONS = (
    "--from --to --world --expert --set --file-size --digest --on-drift --max-memory --duplicate --split --merge "
    "--prune --load --experts --blocks --top-k --router-std --weights --batch --seed --nope --dry-run --ema --json"
).split()


@dataclass(frozen=True)
class Case:
    """One input: the words of a command, or a call in Python."""

    command: str
    kind: str
    text: str  # for people
    subjects: tuple[str, ...]
    words: tuple[str, ...] = ()
    call: Callable[[], Any] | None = None
    environment: tuple[tuple[str, str | None], ...] = ()  # None: not set


def draw_case(seed: int, number: int, files: dict[str, str], scratch: Path) -> Case:
    """Returns a case; what it writes goes below `scratch`, or below what `files` names."""
    wrong = random.Random(f"environment {seed}:{number}")  # apart: a kind more leaves the other cases as they were
    if wrong.random() < _OF_ENVIRONMENT:
        return _environment_case(wrong, files, scratch)
    draw = random.Random(f"{seed}:{number}")
    kinds = {"config key": 8, "config file": 3, "option": 3, "path": 4, "checkpoint verb": 4, "command": 1, "python": 8}
    kind = draw.choices(list(kinds), list(kinds.values()))[0]
    if kind == "python":
        name, text, call = calls.draw_call(draw, files)
        return Case(name, kind, text, (*calls.SUBJECTS, ": does not exist"), call=call)
    words, subjects = _WORDS[kind](draw, files, scratch)
    return Case(words[0] if words else "", kind, f"swin-moe {' '.join(map(repr, words))}", subjects, tuple(words))


def _environment_case(draw: random.Random, files: dict[str, str], scratch: Path) -> Case:
    """Returns a right command among one or two wrong variables; half of those about the world beside a right world."""
    names = draw.sample(list(ENVIRONMENT), draw.choice((1, 1, 2)))
    wrong = {name: draw.choice(ENVIRONMENT[name]) for name in names}
    given: dict[str, str | None] = {**_WORLD} if draw.random() < 0.5 and wrong.keys() & _WORLD.keys() else {}
    given |= ({"PMI_RANK": "0"} if "PMI_SIZE" in wrong else {}) | wrong
    command = draw.choice([*CONFIGURED, "checkpoint", "doctor"])
    if command in CONFIGURED:
        words = _start(command, files["small.yaml"], [], files, scratch)
    else:
        words = [command, "--no-measure"] if command == "doctor" else [command, "inspect", files["native"]]
    text = f"{' '.join(f'{name}={value!r}' for name, value in given.items())} swin-moe {' '.join(map(repr, words))}"
    return Case(command, "environment", text, tuple(given), tuple(words), environment=tuple(given.items()))


def _start(command: str, config: str, rest: list[str], files: dict[str, str], scratch: Path) -> list[str]:
    """Returns the words that start a command with a config; images where it needs some."""
    images = [files["image.png"]] if command in NEEDS_IMAGES else []
    words = [config, f"run.output={scratch}/runs", *rest, *images]
    if command in ("evaluate", "evaluate-features", "predict", "inspect-routing"):
        words.insert(1, f"checkpoint.load={files['native']}")
    if command == "inspect-routing":
        words += ["--out", f"{scratch}/pictures", "--images", "4"]
    if command == "launch":
        return ["launch", "-n", "2", "--", "-m", "swin_moe.train", *words]
    return [command, *words]


def _misspelt(draw: random.Random, key: str) -> str:
    at = draw.randrange(len(key))
    return draw.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + draw.choice("xX._- é") + key[at:],
            key.upper(),
            f"{key}.x",
            key.rpartition(".")[2],
            key.rpartition(".")[0],
            f".{key}",
            f"{key}.",
        ]
    )


def _key_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    command, keys, values = draw.choice(CONFIGURED), draw.choices(KEYS, k=draw.choice((1, 1, 1, 2))), []
    for index, key in enumerate(keys):
        value = draw.choice(draw.choice((TYPES, NUMBERS, NUMBERS)))
        if key in PATH_KEYS:
            value = draw.choice([value, draw.choice(list(files.values()))])
        keys[index] = _misspelt(draw, key) if draw.random() < 0.2 else key
        values.append(value)
    if key == "data.path":
        keys.append("data.name")
        values.append(draw.choice(("folder", "zip", "imagenet22k")))
    return _start(command, files["small.yaml"], [f"{k}={v}" for k, v in zip(keys, values)], files, scratch), tuple(keys)


def _file_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    """Returns a config that is another file, or one with a wrong value in it, also of the wrong nesting."""
    command = draw.choice(CONFIGURED)
    if draw.random() < 0.4:
        name = draw.choice([*files, "swin_tiny", "trian", "x" * 300, "debug", "../configs", "é"])
        return _start(command, files.get(name, name), [], files, scratch), (name, files.get(name, name), "config")
    section, _, key = draw.choice(KEYS).rpartition(".")
    if draw.random() < 0.3:
        section, key = "", draw.choice([section.partition(".")[0], "nope", "base", "é", "1", "[a]"])
    key = _misspelt(draw, key) if draw.random() < 0.15 else key
    text = f"{key}: {draw.choice(draw.choice((TYPES, NUMBERS)))}".replace("\0", "\\0")
    for part in reversed(section.split(".") if section else []):
        text = f"{part}:\n  " + text.replace("\n", "\n  ")
    path = scratch / "wrong.yaml"
    path.write_text(f"base: {files['small.yaml']}\n{text}\n", encoding="utf-8")
    return _start(command, str(path), [], files, scratch), (str(path),)


def _option_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    command = draw.choice(list(OPTIONS))
    option = draw.choice(OPTIONS[command])
    value = draw.choice([*TYPES, *NUMBERS, *files.values()])
    words = draw.choice([[option, value], [option], [f"{option}={value}"]])
    if command == "doctor":
        return ["doctor", "--no-measure", *words], (option, value)
    start = _start(command, files["small.yaml"], [], files, scratch)
    if command == "launch":
        return ["launch", *words, *draw.choice([start[3:], start[1:], []])], (option, "launcher")
    return [*start, *words], (option, value)


def _path_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    command, value = draw.choice(CONFIGURED), draw.choice(list(files.values()))
    if command in NEEDS_IMAGES and draw.random() < 0.5:
        return _start(command, files["small.yaml"], [value], files, scratch), (value, "image")
    key = draw.choice(PATH_KEYS)
    more = {
        "data.path": [f"data.name={draw.choice(('folder', 'zip', 'imagenet22k'))}"],
        _TEACHER: ["task.name=distill", "task.distill.teacher_model=swin_tiny_patch4_window7_224"],
        "task.distill.teacher_model": ["task.name=distill", f"{_TEACHER}={files['model.pth']}"],
    }
    return _start(command, files["small.yaml"], [f"{key}={value}", *more.get(key, [])], files, scratch), (key, value)


def _verb_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    verb = draw.choice([*VERBS, "inspcet", ""])
    paths = draw.choices(list(files.values()), k=draw.choice((0, 1, 1, 2, 2, 3)))
    words = ["checkpoint", verb, *paths]
    if verb in ("convert", "reshard", "upcycle", "experts", "average", "export") and draw.random() < 0.7:
        words.append(str(scratch / "out"))
    needed = {"convert": "--to", "export": "--to", "reshard": "--world", "upcycle": "--experts"}.get(verb)
    for option in ([needed] if needed else []) + draw.sample(VERB_OPTIONS, draw.choice((0, 1, 2))):
        value = draw.choice([*TYPES, *NUMBERS, "native", "timm", "hf", "onnx", "safetensors", "img_size=x", "2"])
        words += draw.choice([[option, value], [option, value], [option]])
    return words, (verb, "verb", *filter(None, paths))


def _command_case(draw: random.Random, files: dict[str, str], scratch: Path) -> tuple[list[str], tuple[str, ...]]:
    word = draw.choice(["trian", "evalute", "é", "", "-x", "--nope", "TRAIN", "a\0b", "x" * 300, "checkpoint.load=x"])
    command = draw.choice([*CONFIGURED, "checkpoint", "doctor"])
    words = draw.choice([[word], [word, files["small.yaml"]], [command, word], [command, word, word]])
    return words, (word, "command", "config", "verb")


_WORDS = {
    "config key": _key_case,
    "config file": _file_case,
    "option": _option_case,
    "path": _path_case,
    "checkpoint verb": _verb_case,
    "command": _command_case,
}
