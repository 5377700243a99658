"""The programs of docs/python.md run as they stand."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/python.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_programs_of_the_page_run(program):
    if "import torch" in program:
        pytest.importorskip("torch", reason="python3-torch is not installed")
    exec(compile(program, "docs/python.md", "exec"), {"__name__": "page"})
