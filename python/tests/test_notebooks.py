"""The notebooks run with nothing but the package as it is installed: by Jupyter where that is installed, else their code as
it stands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
def test_the_notebook_runs(notebook, tmp_path):
    if not os.environ.get("MOECTL_TOOL"):
        pytest.skip("MOECTL_TOOL is not set")
    code = "\n".join(code_of(notebook))
    if "import torch" in code or "moectl.torch" in code:
        pytest.importorskip("torch", reason="python3-torch is not installed")
    # Away from the sources: no file of theirs but the package is there.
    shutil.copytree(ROOT / "moectl", tmp_path / "installed/moectl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "here").mkdir()
    shutil.copy(notebook, tmp_path / "here")
    if importlib.util.find_spec("nbconvert") and importlib.util.find_spec("ipykernel"):
        command = ["-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", tmp_path, notebook.name]
    else:
        command = ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, *command], cwd=tmp_path / "here", env=environment, check=True)


def test_the_callback_of_the_notebook_is_the_recipe():
    recipe = (ROOT / "recipes/balance_huggingface.py").read_text().split('"""\n\n', 1)[1]
    assert code_of(ROOT / "notebooks/balance_your_hugging_face_moe.ipynb")[0] + "\n" == recipe
