"""Execute the notebooks and save them with their outputs: `make notebooks`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom, in its folder; the file stays as it is."""
    # What libraries say about themselves is nothing to commit.
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources
    ).execute(env={**os.environ, **quiet})
    notebook.metadata.language_info = {"name": "python"}  # not the version of whoever ran it
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        nbformat.write(execute(FOLDER / name), FOLDER / name)
