"""notebooks/explore.ipynb says what to do where the demo has not run; on what it writes it runs in test_demo."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "explore.ipynb"


def execute(demo: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """Run the notebook from its own folder, as Jupyter and `make notebooks` do; its kernel is gone afterwards."""
    monkeypatch.setenv("BERTRAY_DEMO", str(demo))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own backend makes the pictures
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernels: list[tuple[str, int]] = []
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.on_notebook_start = lambda notebook: kernels.append((client.km.ip, client.km.provisioner.pid))
    try:
        client.execute()
    finally:
        [(address, process_id)] = kernels
        assert address == "127.0.0.1"
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    return notebook


def test_without_outputs_the_notebook_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CellExecutionError, match="make demo") as caught:
        execute(tmp_path / "nowhere", monkeypatch)
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {cell.id}: clear the outputs before committing"
            assert cell.execution_count is None, f"cell {cell.id}: clear the outputs before committing"
