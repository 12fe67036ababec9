"""Makes the site: `python docs/site/build.py` (make docs) writes build/site, from the Markdown of the repository.

Pages are copied as they are but for links: those to other files of the repository become their names, as the site holds
no sources. Two pages are generated: every option, from the schema's source, and Python, from docstrings.
"""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "build" / "site_pages"
LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]+)?\)")


@dataclass(frozen=True)
class Option:
    """A row of the reference."""

    key: str
    kind: str
    default: str
    says: str  # the comment beside or above it


def options() -> list[Option]:
    """Returns every option of Config, in the order of the schema, with the comments of its source."""
    classes: dict[str, list[tuple[str, str, str, str]]] = {}
    for name in sorted((ROOT / "swin_moe" / "config").glob("*.py")):
        classes |= _dataclasses(name)
    return list(_walk("Config", "", classes))


def _walk(name: str, prefix: str, classes: dict):  # type: ignore[no-untyped-def, type-arg]
    for key, kind, default, says in classes[name]:
        if kind in classes:
            yield from _walk(kind, f"{prefix}{key}.", classes)
        else:
            yield Option(prefix + key, kind, default, says)


def _dataclasses(path: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    """Returns class -> (field, type, default, comment) of a file's dataclasses."""
    with open(path, "rb") as file:
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        }
    lines = path.read_text().splitlines()
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            found[node.name] = [_field(line, comments, lines) for line in fields]
    return found


def _field(node: ast.AnnAssign, comments: dict[int, str], lines: list[str]) -> tuple[str, str, str, str]:
    """Returns (name, type, default, comment): what stands beside it, or in whole lines above it."""
    assert node.end_lineno is not None
    beside = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
    above, line = [], node.lineno - 1
    while line in comments and lines[line - 1].strip().startswith("#"):
        above.insert(0, comments[line])
        line -= 1
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((k.value for k in value.keywords if k.arg in ("default", "default_factory")), None)
    default = "" if value is None else ast.unparse(value)
    return ast.unparse(node.target), ast.unparse(node.annotation), default, " ".join(above + beside)


def configuration_page() -> str:
    """Returns the page of every option, a table per section."""
    parts = [
        "# Every option",
        "",
        "From the schema, swin_moe/config/. `swin-moe show CONFIG` says what a config makes of them.",
        "",
    ]
    section = None
    for option in options():
        now = option.key.rpartition(".")[0]
        if now != section:
            section = now
            parts += ["", f"## {section}", "", "| option | type | default | |", "|---|---|---|---|"]
        kind = option.kind.replace("Literal[", "").removesuffix("]") if "Literal[" in option.kind else option.kind
        cells = (
            f"`{option.key}`",
            f"`{kind}`",
            f"`{option.default}`" if option.default else "",
            option.says.replace("<", "&lt;"),
        )
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def api_page() -> str:
    """Returns the page of what `import swin_moe` offers, from signatures and docstrings."""
    import swin_moe

    parts = ["# Python", "", "What `import swin_moe` promises; each is imported on first use.", ""]
    for name in swin_moe.__all__:
        thing = getattr(swin_moe, name)
        if not callable(thing):
            continue
        signature = str(inspect.signature(thing)).replace("swin_moe.models.swin.", "").replace("pathlib._local.", "")
        parts += [f"## swin_moe.{name}", "", "```python", f"swin_moe.{name}{signature}", "```", ""]
        parts += ["```text", inspect.getdoc(thing) or "", "```", ""]
    return "\n".join(parts)


def relinked(text: str, page: Path) -> str:
    """Returns a page's text with links to pages of the site, and the names of files in place of other links."""

    def replace(match: re.Match[str]) -> str:
        words, target, anchor = match[1], (page.parent / match[2]).resolve(), match[3] or ""
        if target == ROOT / "README.md":
            return f"[{words}](index.md{anchor})"
        if target.suffix == ".md" and target.parent in (ROOT, ROOT / "docs"):
            return f"[{words}]({target.name}{anchor})"
        if target.is_relative_to(ROOT / "docs" / "images"):
            return f"[{words}](images/{target.relative_to(ROOT / 'docs' / 'images')})"
        return f"{words} ({target.relative_to(ROOT)})" if words != match[2] else words

    return LINK.sub(replace, text)


def gather() -> None:
    """Writes the pages that MkDocs reads, anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        (PAGES / page.name).write_text(relinked(page.read_text(), page))
    (PAGES / "index.md").write_text(relinked((ROOT / "README.md").read_text(), ROOT / "README.md"))
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images")
    shutil.copy(ROOT / "docs" / "site" / "site.css", PAGES)
    (PAGES / "configuration.md").write_text(configuration_page())
    (PAGES / "api.md").write_text(api_page())


def main() -> int:
    """Returns the exit code of MkDocs, which warns of links that lead nowhere."""
    gather()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(ROOT / "docs/site/mkdocs.yml")]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
