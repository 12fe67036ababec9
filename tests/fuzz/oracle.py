"""What may become of a wrong input: it works, or it is refused in one sentence that names the key or the file."""

import re
import traceback
from pathlib import Path

from launcher.failure.kinds import CONFIGURATION, MEMORY
from swin_moe.config import Config
from swin_moe.config.coerce import schema_keys

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = tuple(str(ROOT / package) for package in ("swin_moe", "launcher", "checkpoint_tools"))
WORKS = (0, 75)  # done; stopped after a step, on request
FOUND = ("checkpoint", "doctor")  # commands whose code 1 is an answer
LONGEST = 900  # characters
RAW = re.compile(
    r"\b[A-Z]\w+Error\b|Errno|object has no|object is not|not subscriptable|cannot reshape|broadcast|not iterable"
    r"|unexpected keyword|'NoneType'|invalid literal|must be real|unhashable type|positional argument|^error: '\w+'$"
)
_KEYS = {part for key in schema_keys(Config) for part in (key, key.rpartition(".")[2]) if re.search("[._]", part)}
KEYS = re.compile(rf"\b({'|'.join(map(re.escape, sorted(_KEYS)))})\b")
TOLD = re.compile(r"(weights: |engine\.precision=)")  # what a command says of its course on stderr
NAMES = re.compile(r"--?[a-z]\w*|/|\.(yaml|pth|png|safetensors)\b")  # an option, or a path


def judge_command(command: str, code: object, error: str, subjects: tuple[str, ...]) -> tuple[str, str]:
    """Returns (works, refused or wrong; what is wrong) of a command's exit code and what it wrote to stderr.

    Args:
        error: With SWIN_MOE_TRACEBACK set, so that the sentence's origin stands before it.
        subjects: Words one of which the sentence has to name, where it names no option, key or path.
    """
    if code in WORKS or code == 1 and command in FOUND and "Traceback" not in error:
        return "works", ""
    if code not in (CONFIGURATION, MEMORY):
        return "wrong", f"exit code {code}"
    trace, lines = _split(error)
    lines = [line for line in lines if not TOLD.match(line)]
    if len(lines) != 1 or not lines[0].startswith(("error: ", "launcher: ")):
        return "wrong", f"{len(lines)} lines"
    if lines[0].startswith("error: out of memory") or code == MEMORY:
        return ("refused", "") if "out of memory" in lines[0] and code == MEMORY else ("wrong", f"exit code {code}")
    if trace and not _raised_by_us(trace):
        return "wrong", "no sentence of ours"
    return _judge_sentence(lines[0], subjects)


def judge_call(error: BaseException | None, subjects: tuple[str, ...]) -> tuple[str, str]:
    """Returns the same of what a Python function raised, or None."""
    if error is None:
        return "works", ""
    if not isinstance(error, ValueError | TypeError | OSError):
        return "wrong", f"raises {type(error).__name__}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = frame.filename.startswith(OURS) and (frame.line or "").startswith("raise ")
    if not isinstance(error, OSError) and not ours:
        return "wrong", "no sentence of ours"
    if isinstance(error, OSError) and error.filename:
        return "refused", ""
    return _judge_sentence(str(error), subjects)


def _judge_sentence(text: str, subjects: tuple[str, ...]) -> tuple[str, str]:
    if raw := RAW.search(text):
        return "wrong", f"raw words: {raw[0]}"
    all_names = "weights do not fit the model (" in text  # whose contract is to name every tensor
    if len(text) > LONGEST and not all_names or "\n" in text:
        return "wrong", f"{len(text)} characters, {text.count(chr(10)) + 1} lines"
    named = NAMES.search(text) or KEYS.search(text) or any(word and word in text for word in subjects)
    return ("refused", "") if named else ("wrong", "names neither key nor file")


def _split(error: str) -> tuple[str, list[str]]:
    """Returns (tracebacks, the other lines)."""
    trace, head, rest = error.rpartition("Traceback (most recent call last):\n")
    if not head:
        return "", [line for line in error.splitlines() if line.strip()]
    match = re.search(r"^(error|launcher): ", rest, re.MULTILINE)
    cut = match.start() if match else len(rest)
    before = trace.partition("Traceback (most recent call last):\n")[0]
    return rest[:cut], [line for line in (before + rest[cut:]).splitlines() if line.strip()]


def _raised_by_us(trace: str) -> bool:
    """Returns whether the innermost frame is a `raise` of ours; an OSError tells its path by itself."""
    frames = re.findall(r'^  File "(.+?)", line \d+, in .+\n    (.*)', trace, re.MULTILINE)
    if re.search(r"^\w*(OS|FileNotFound|IsADirectory|NotADirectory|Permission|FileExists)Error: ", trace, re.MULTILINE):
        return True
    return bool(frames) and frames[-1][0].startswith(OURS) and frames[-1][1].startswith("raise ")
