"""What the tool `moectl` answers, as data."""

import json
import numbers
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Literal, Union, overload

from ._arrays import path, shown, whole
from ._errors import ArgumentError, MoectlError

PathLike = Union[str, "os.PathLike[str]"]


def tool() -> str:
    """The tool: the one named in MOECTL_TOOL, the one installed with this package, the one on the path."""
    beside = Path(__file__).parent / "moectl"
    found = os.environ.get("MOECTL_TOOL") or (str(beside) if beside.exists() else shutil.which("moectl"))
    if not found:
        raise MoectlError("the tool moectl is not installed: name it in MOECTL_TOOL")
    return found


def _ask(*arguments: str) -> str:
    done = subprocess.run([tool(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise MoectlError(done.stderr.decode("utf-8", "replace").strip())
    return done.stdout.decode()


def _file(name: str, given: Any) -> str:
    """A path that the tool takes for no option."""
    file = os.fsdecode(path(name, given))
    return os.path.join(".", file) if file.startswith("-") else file


@overload
def metrics(trace: PathLike, *, pandas: Literal[False] = False) -> List[Dict[str, Any]]: ...
@overload
def metrics(trace: PathLike, *, pandas: Literal[True]) -> Any: ...


def metrics(trace: PathLike, *, pandas: bool = False) -> Any:
    """Every metric of every record of a trace or run log. Plain data: a list of dicts, one a step and layer, as
    {"step": 0, "layer": 0, "metrics": {"max_vio": 0.2, …}}; a metric that is not known is None. With
    `pandas`: a DataFrame of one row a record, whose columns of metrics are named "metrics.max_vio" and so on; raises
    ImportError where pandas is not installed. Raises MoectlError with the tool's words."""
    records = [json.loads(line) for line in _ask("metrics", _file("trace", trace), "--format", "json").splitlines()]
    if not pandas:
        return records
    import pandas as pd

    return pd.json_normalize(records)


def simulate(*configs: PathLike, **options: Any) -> List[Dict[str, Any]]:
    """The loop closed on the simulated router: one dict of figures a config. Options as those of `moectl simulate`, as
    steps=300, scenario="shift". Raises MoectlError with the tool's words."""
    given = []
    for name, value in options.items():
        if not isinstance(value, numbers.Real) and hasattr(value, "__index__"):
            value = whole(name, value)
        if not isinstance(value, (str, numbers.Real, os.PathLike)) or "\0" in str(value):
            raise ArgumentError(f"{name}: {shown(value)}: must be a number, a word or a path")
        given.append(f"--{name.replace('_', '-')}={value}")
    return json.loads(_ask("simulate", *[_file("config", config) for config in configs], *given, "--format", "json"))


def compare(*runs: PathLike) -> List[Dict[str, Any]]:
    """The figures of runs (docs/tool.md), side by side: one dict a run, None where not known. Raises MoectlError with the
    tool's words."""
    return json.loads(_ask("compare", *[_file("run", run) for run in runs], "--format", "json"))


def report(*runs: PathLike, output: PathLike) -> None:
    """Writes one self-contained HTML page about one or several runs or traces to `output`. Raises MoectlError with the
    tool's words."""
    _ask("report", *[_file("run", run) for run in runs], "-o", _file("output", output))


def main() -> None:
    """The tool itself, for the command `moectl` that pip installs."""
    try:
        os.execv(tool(), ["moectl", *sys.argv[1:]])
    except MoectlError as error:
        sys.exit(f"moectl: {error}")
