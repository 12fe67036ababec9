"""The import table of the architecture, the optional packages and the size limits, checked on the syntax trees."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("swin_moe", "launcher", "checkpoint_tools")

# Lowest first; a unit (module or sub-package of swin_moe) imports only units of rows above its own.
LAYERS = (
    ("layout", "registry", "choice_cache", "randomness", "names"),
    ("config",),
    ("usage",),
    ("ops",),
    ("moe",),
    ("models", "parallel"),
    ("data", "optim", "checkpoint"),
    ("engine", "tasks"),
    ("run",),
    ("weights", "planner", "curate"),
    ("evaluate",),
    ("train", "throughput", "predict", "inspect_routing", "evaluate_features"),
    ("doctor", "report", "demo"),
    ("cli",),
    ("__main__",),
)
ROW = {unit: row for row, units in enumerate(LAYERS) for unit in units}
# swin_moe modules that checkpoint_tools may use; prefixes.
TOOLS_MAY_IMPORT = ("layout", "registry", "config", "names", "checkpoint", "parallel.sharding")
# What single tools need beyond that: they build a network, so they load torch, when they are chosen.
TOOLS_MAY_ALSO_IMPORT = {"checkpoint_tools.verbs.export_program": ("models", "moe")}
# Programs may start as a rank of plain mpirun, so they call launcher.mpi; nothing else knows the launcher.
ENTRY_POINTS = ("run", "cli", "doctor")
# What reads files of other programs asks checkpoint_tools, through one module; that imports lower rows only.
READERS = {"weights": "checkpoint_tools.weights"}
OPTIONAL = {"tutel", "deepspeed", "fairscale", "mpi4py", "tensorboard", "timm", "pycocotools", "gradio", "launcher"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES = 16  # loose in a folder
CODE = ("swin_moe", "launcher", "checkpoint_tools", "csrc", "benchmarks", "tests")
DATA = ("benchmarks/results/", "tests/golden/")  # below CODE: what was measured, what others computed
MAX_COMPLEXITY = 14  # cyclomatic, of a function; ruff counts it (make lint)
ROOMS = ("files", "sources", "formats", "verbs")  # of checkpoint_tools, lowest first
# What mypy checks without an error (pyproject.toml); the list may only grow.
TYPED = ("swin_moe", "launcher", "checkpoint_tools", "benchmarks", "tests", "setup.py")


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path, *, whole: bool = True) -> set[str]:
    """Returns the absolute names a file imports; with `whole` false only those that run when it is imported."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names}
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if whole or not (is_function or _only_for_types(node)):
            waiting += ast.iter_child_nodes(node)
    return found


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def unit_of(module: str) -> str:
    """Returns the unit of an import: "swin_moe.parallel.groups.Groups" is parallel; "" for swin_moe itself."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", sources("swin_moe"), ids=name_of)
def test_swin_moe_imports_only_lower_layers(path):
    unit = unit_of(name_of(path))
    if not unit:
        return  # swin_moe/__init__.py is the public surface
    assert unit in ROW, f"swin_moe.{unit} has no row in LAYERS"
    for module in imports(path):
        if module.split(".")[0] != "swin_moe":
            continue
        other = unit_of(module)
        assert other in ROW, f"{name_of(path)} imports {module}, which has no row in LAYERS"
        assert other == unit or ROW[other] < ROW[unit], f"{name_of(path)} must not import {module}: not a lower layer"


@pytest.mark.parametrize("path", sources("swin_moe"), ids=name_of)
def test_swin_moe_imports_optional_packages_lazily(path):
    at_import = {module.split(".")[0] for module in imports(path, whole=False)} & OPTIONAL
    assert not at_import, f"{name_of(path)} imports {at_import} at module level; import it where it is chosen"
    unit = unit_of(name_of(path))
    others = {module for module in imports(path) if module.split(".")[0] in ("launcher", "checkpoint_tools")}
    door = READERS.get(unit, "launcher or checkpoint_tools")
    assert unit in ENTRY_POINTS or all(module.startswith(f"{door}.") or module == door for module in others)


@pytest.mark.parametrize("unit", READERS)
def test_tools_import_nothing_above_what_reads_through_them(unit):
    used = {name.partition(".")[0] for name in TOOLS_MAY_IMPORT}
    assert all(ROW[name] < ROW[unit] for name in used)


@pytest.mark.parametrize("path", sources("launcher"), ids=name_of)
def test_launcher_stands_alone(path):
    foreign = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
    assert foreign <= {"launcher", "mpi4py"}
    assert "mpi4py" not in {module.split(".")[0] for module in imports(path, whole=False)}


@pytest.mark.parametrize("path", sources("checkpoint_tools"), ids=name_of)
def test_checkpoint_tools_use_only_formats_and_layouts(path):
    allowed = TOOLS_MAY_IMPORT + TOOLS_MAY_ALSO_IMPORT.get(name_of(path), ())
    for module in imports(path):
        if module.split(".")[0] == "swin_moe" and module != "swin_moe":
            inner = module.removeprefix("swin_moe.")
            assert any(inner == name or inner.startswith(f"{name}.") for name in allowed), module
        assert module.split(".")[0] != "launcher" or path.name == "__main__.py"
    if name_of(path) not in TOOLS_MAY_ALSO_IMPORT:
        assert "torch" not in {module.split(".")[0] for module in imports(path, whole=False)}


def assert_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_files_and_functions_stay_readable(path):
    assert_readable(path)


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_so_do_those_around_the_packages(folder):
    for path in sources(folder):
        assert_readable(path)


def arrows() -> dict[str, set[str]]:
    """Returns file -> the files of ours it imports, as module names; what a package's first file hands on counts."""
    files = {name_of(path): path for path in sources(*PACKAGES)}

    def target(module: str) -> str:
        while module and module not in files:
            module = module.rpartition(".")[0]
        return module

    return {name: {target(module) for module in imports(path)} - {"", name} for name, path in files.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the files of a circle of imports, [] where there is none."""
    left = {name: set(others) for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_files_import_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle(arrows()) == []


def test_rooms_of_checkpoint_tools_import_only_lower_ones():
    for name, others in arrows().items():
        room = name.split(".")[1] if name.startswith("checkpoint_tools.") else ""
        if room in ROOMS:
            higher = ROOMS[ROOMS.index(room) + 1 :]
            above = {other for other in others if other.split(".")[1:2] and other.split(".")[1] in higher}
            assert not above, f"{name} imports {above}"


def loose_files() -> Counter[str]:
    """Returns how many files lie loose in every folder of code, committed or not, as git or the disk knows them."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "--", *CODE]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        names = [name for name in found.stdout.splitlines() if (ROOT / name).exists()]
    else:  # a source archive
        paths = (path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix not in (".pyc", ".so"))
        names = [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]
    return Counter(name.rpartition("/")[0] for name in names if not name.startswith(DATA))


def test_folders_stay_small():
    found = loose_files()
    assert all(found[folder] for folder in CODE)
    large = {folder: files for folder, files in found.items() if files > MAX_FILES}
    assert not large, f"more than {MAX_FILES} loose files, __init__.py too: {large}; make rooms that mean something"


@pytest.mark.parametrize("in_git", [True, False])
def test_a_seventeenth_file_is_seen(tmp_path, monkeypatch, in_git):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for folder in (*CODE, "csrc/cuda/moe", *DATA):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a.cu").touch()
    if in_git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    else:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for number in range(15):
        (tmp_path / "csrc/cuda/moe" / f"{number}.h").touch()
    test_folders_stay_small()
    (tmp_path / "csrc/cuda/moe/__init__.py").touch()
    with pytest.raises(AssertionError, match="csrc/cuda/moe': 17"):
        test_folders_stay_small()


@pytest.mark.parametrize("path", [p for p in sources(*PACKAGES) if p.name == "__init__.py"], ids=name_of)
def test_a_package_says_what_it_is(path):
    """What is in it, which table it has, what a new row needs: three lines, and every file they name is there."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len([line for line in text.splitlines() if line.strip()]) >= 3
    folders = [path.parent, *(entry for entry in path.parent.iterdir() if entry.is_dir())]
    named = re.findall(r"(?<![\w/.])\w+\.py\b", text)
    assert [name for name in named if not any((folder / name).is_file() for folder in folders)] == []


def test_the_list_of_what_is_type_checked_does_not_shrink():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert set(TYPED) <= set(listed)


def test_lint_holds_how_complex_a_function_may_be():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "C90" in lint["select"] and "C901" not in lint["ignore"]
    assert lint["mccabe"]["max-complexity"] <= MAX_COMPLEXITY


def test_the_checker_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "swin_moe" / "moe" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import timm.data\nfrom ..engine import base\nfrom . import y\ndef f():\n    import tutel\n")
    assert imports(path) == {"timm.data", "swin_moe.engine.base", "swin_moe.moe.y", "tutel"}
    assert imports(path, whole=False) == {"timm.data", "swin_moe.engine.base", "swin_moe.moe.y"}
