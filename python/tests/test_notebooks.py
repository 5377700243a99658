"""The notebooks run: by Jupyter where it is installed, else their code as it stands."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
def test_the_notebook_runs(notebook, tmp_path):
    if not os.environ.get("MOECTL_TOOL"):
        pytest.skip("MOECTL_TOOL is not set")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    if "import torch" in code:
        pytest.importorskip("torch", reason="python3-torch is not installed")
    if importlib.util.find_spec("nbconvert"):
        command = ["-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", tmp_path, notebook]
    else:
        command = ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, *command], cwd=notebook.parent, env=environment, check=True)
