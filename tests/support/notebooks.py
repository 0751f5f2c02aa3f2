"""Execute the notebooks of docs/, each in an empty folder.

python tests/support/notebooks.py    # stores the new outputs in docs/notebooks
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of an execution in a folder, without a network."""
    node = nbformat.read(notebook, as_version=4)
    # This checkout's package, and nothing of the user's: neither caches nor a token.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / ".cache"),
        "HF_HUB_OFFLINE": "1",
    }
    client = NotebookClient(
        node,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    for cell in code_cells(node):
        # Bars, and the lines of libraries about the machine: for a reader who waits.
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return node


def code_cells(node: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in node.cells if cell.cell_type == "code"]


def main() -> None:
    for notebook in NOTEBOOKS:
        with TemporaryDirectory() as folder:
            node = execute(notebook, Path(folder))
        node.metadata.pop("language_info", None)  # the version of this machine's Python
        nbformat.write(node, notebook)


if __name__ == "__main__":
    main()
