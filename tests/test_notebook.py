"""docs/quickstart.ipynb: it runs from top to bottom in an empty folder, and lies here without outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from harness import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_it_lies_here_without_outputs() -> None:
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert len(cells()) > 5
    assert [cell for cell in cells() if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [shown_by(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "<th style='text-align:left'>test_accuracy</th>" in shown[0]
    assert "predicted_class='7'" in shown[2]
    assert shown[3] == "{'ok': 60, 'truncated': 1}"
    assert "broken.png" in shown[5]
    assert 0.9 < float(shown[7]) <= 1
    assert 'src="predictions-evaluation/report.html"' in shown[8]
    assert (tmp_path / "predictions-evaluation" / "report.html").exists()


def shown_by(cell: Any) -> str:
    """The result of a cell: as HTML where there is some, else as text."""
    results = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    return str(results[-1].get("text/html", results[-1]["text/plain"])) if results else ""
