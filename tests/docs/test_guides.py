"""The guides are true: sentences that troubleshooting quotes are printed, links of the comparison lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
GAP = "\0"  # of a sentence: what is filled in when it is printed


def sentences(*names: str) -> list[str]:
    """Returns every string of our sources, as the parser joins them, with GAP for each value that is filled in."""
    found = []
    paths = [p for name in names for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(_text(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\(\w+\))?[-.\d]*[sdgfr]", GAP, node.value))
    return found


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else GAP


def is_printed(quoted: str, printed: list[str]) -> bool:
    """Returns whether what stands between the `...` of a quoted sentence stands in one of ours, in that order."""
    plain = re.sub(r"%[-.\d]*[sdgfr]", "...", quoted)
    parts = [part.strip() for part in plain.split("...") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(sentence) for sentence in printed)


def anchors(page: Path) -> set[str]:
    """Returns what a link may name in a page: its headings as GitHub and MkDocs spell them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def dead_links(page: Path) -> list[str]:
    """Returns the links of a page, to files and headings of this repository, that lead nowhere."""
    dead = []
    for link in LINK.findall(re.sub(r"^    .*$", "", page.read_text(), flags=re.MULTILINE)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_sentences_of_troubleshooting_are_printed():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^#+ `([^`]+)`$", text, re.MULTILINE)
    printed = sentences("swin_moe", "launcher", "checkpoint_tools", "setup.py")
    assert len(quoted) >= 30
    assert [sentence for sentence in quoted if not is_printed(sentence, printed)] == []


def test_every_cell_of_ours_in_the_comparison_has_a_link():
    text = (ROOT / "docs" / "comparison.md").read_text()
    rows = re.findall(r"^\| (?!---|what )(.+) \|$", text, re.MULTILINE)
    ours = [row.split(" | ")[-1] for row in rows]
    heads = " ".join(re.findall(r"^## (.+)$", text, re.MULTILINE))
    assert all(name in heads for name in ("timm", "transformers", "mmpretrain", "Lightning", "torchtitan"))
    assert len(ours) >= 30 and text.count("| what | theirs | ours |") == 5
    assert [cell for cell in ours if not LINK.search(cell)] == []


def test_the_checks_see_what_is_wrong(tmp_path):
    assert is_printed("a ... of ...", [f"a cat of {GAP}"]) and not is_printed("a ... of ...", ["of a", "a cat"])
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](#three) [c](page.md#one-two) [d](gone.md) [e](https://x.org)\n")
    assert dead_links(page) == ["#three", "gone.md"]
