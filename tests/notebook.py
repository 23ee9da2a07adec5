"""The notebook of client examples, run from first cell to last: ``python -m tests.notebook`` keeps the pictures.

A test runs it too, and compares its cells' results with those that are kept.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.e2e.conftest import running_server

NOTEBOOK = Path(__file__).parents[1] / "clients" / "sdxl-client-examples.ipynb"


FLAGS = ("--use_refiner", "true", "--refiner_id", "demo")
"""What the server runs with, for the chapter on the refiner."""


def execute(url: str) -> Any:
    """The notebook with the outputs of a run against the server at `url`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # In the notebook's own folder, as Jupyter does it, and with nothing that the machine says of another server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SDXL_")}
    environment |= {"SDXL_URL": url}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(NOTEBOOK.parent), env=environment)
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata = {
        "kernelspec": notebook.metadata.kernelspec,
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *FLAGS) as server:
        nbformat.write(execute(server.url), NOTEBOOK)
