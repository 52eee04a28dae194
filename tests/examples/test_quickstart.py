"""The notebook runs, with a tiny model and for a few steps."""

import os
from pathlib import Path

import pytest

import tiny_checkpoint

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.filterwarnings("ignore")  # of Jupyter
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("QUICKSTART_MODEL", str(tiny_checkpoint.save(tmp_path / "tiny")))
    monkeypatch.setenv("QUICKSTART_MINUTES", "0.03")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip its outputs"

    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()

    printed = "".join(o.text for cell in code for o in cell.outputs if o.output_type == "stream")
    assert printed.count("same answer: True") == 8  # four before and four after training
    assert printed.count("agrees with the last layer at") == 2
    assert "model.safetensors" in printed
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
