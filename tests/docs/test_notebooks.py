"""Notebooks were executed to their end, and their cells run here too (--full)."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code(notebook: Path) -> list[dict]:
    """Returns the code cells of a notebook."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_in_order_and_without_errors(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert notebook.stat().st_size < 200_000


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(notebook):
    names: dict = {}
    for cell in code(notebook):
        exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
