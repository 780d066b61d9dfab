"""The notebooks run from top to bottom, in the order in which they are read."""

import shutil
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.mark.slow
def test_notebooks(tmp_path):
    names = ("method", "own_parts", "read_a_run")
    assert sorted(names) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", tmp_path)
        notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=None, resources=resources).execute()
    assert (tmp_path / "report.html").stat().st_size > 100_000
