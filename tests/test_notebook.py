"""The notebook runs on the demo model, and its committed output is not empty."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "inspect_weights.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_on_the_demo_model(demo_folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "probability that the chosen one is preferred" in printed


def test_the_notebook_is_committed_with_its_plots():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    plots = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(plots) == 3
