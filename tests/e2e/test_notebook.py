"""The notebook of client examples runs as it stands, and shows what it shows."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image, ImageStat

from tests.e2e.conftest import Server
from tests.notebook import FLAGS, NOTEBOOK, execute

# Of Jupyter's own making, on the way to its kernel.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def pictures(notebook: Any) -> list[Image.Image]:
    """What its cells display."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    files = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]


def test_every_cell_runs_and_shows_its_pictures(start_server: Callable[..., Server]) -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    run = execute(start_server(*FLAGS).url)
    assert [picture.size for picture in pictures(run)] == [picture.size for picture in pictures(kept)]
    assert len(pictures(run)) >= 9


def test_the_kept_notebook_was_run_in_order() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output.output_type == "error" for cell in kept.cells for output in cell.get("outputs", []))
    for picture in pictures(kept):
        assert any(ImageStat.Stat(picture.convert("L")).var), "a picture of nothing"


def test_it_finds_the_client_beside_it_where_nothing_is_installed(tmp_path: Path) -> None:
    folder = shutil.copytree(NOTEBOOK.parent, tmp_path / "clients")
    (cell,) = [each.source for each in nbformat.read(NOTEBOOK, as_version=4).cells if "clients.client" in each.source]
    imports = cell.partition("with Client")[0]
    script = f"{imports}\nprint(sys.modules[Client.__module__].__file__)"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    assert Path(found.stdout.strip()).resolve() == (folder / "client.py").resolve()
