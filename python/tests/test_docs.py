"""The programs of docs/python.md and of the README run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


PROGRAMS = programs("docs/python.md")


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_programs_of_the_page_run(program):
    if "import torch" in program:
        pytest.importorskip("torch", reason="python3-torch is not installed")
    exec(compile(program, "docs/python.md", "exec"), {"__name__": "page"})


def test_the_three_lines_of_the_readme_balance_a_model(monkeypatch):
    torch = pytest.importorskip("torch", reason="python3-torch is not installed")
    from test_torch import Gate

    class Block(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.moe = torch.nn.Module()
            self.moe.router = Gate(seed=seed)

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block(1), Block(2)])
    (program,) = programs("README.md")
    lines = program.splitlines(keepends=True)
    assert len(lines) == 3
    monkeypatch.chdir(ROOT)  # a config is named by its path
    names = {"model": model, "loss": torch.tensor(2.5)}
    exec("".join(lines[:2]), names)
    each_step, ratios = compile(lines[2], "README.md", "exec"), []
    for _ in range(140):
        for block in model.blocks:
            block.moe.router()
        exec(each_step, names)
        report = names["balancer"].controller.report()
        assert report.tokens == 512
        ratios.append(report.over_floor)
    assert ratios[0] > 3
    assert sum(ratios[60:]) / 80 <= 1.15


def test_the_page_names_the_packages_that_the_build_asks_for():
    command = re.search(r"^    apt install --no-install-recommends (.*?)\n    python3 ", (ROOT / "docs/python.md").read_text(), re.S | re.M)
    named = set(command.group(1).replace("\\", " ").split())
    asked = set(re.findall(r'^ *moectl_need\(\w+ "?([\w.-]+)', (ROOT / "CMakeLists.txt").read_text(), re.M))
    before = re.search(r"^lacks = (.*?)^\) if not", (ROOT / "setup.py").read_text(), re.S | re.M).group(1)
    asked |= set(re.findall(r', "([\w+-]+)"\),$', before, re.M))
    assert len(asked) == 11
    # Of Python itself.
    assert named == asked | {"python3-venv", "python3-setuptools"}
    dev = re.search(r'^pip_packages="(.*?)"', (ROOT / "dev").read_text(), re.S | re.M).group(1)
    assert set(dev.split()) == named
