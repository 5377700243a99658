"""What the tool `moectl` answers, as data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Union

from ._errors import MoectlError

PathLike = Union[str, os.PathLike]


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


def metrics(trace: PathLike, *, pandas: bool = False) -> Any:
    """Every metric of every record of a trace or run log: a list of dicts, or a DataFrame."""
    records = [json.loads(line) for line in _ask("metrics", os.fspath(trace), "--format", "json").splitlines()]
    if not pandas:
        return records
    import pandas as pd

    return pd.json_normalize(records)


def simulate(*configs: PathLike, **options: Any) -> List[dict]:
    """The loop closed on the simulated router: one dict of figures a config. Options as those of `moectl simulate`, as
    steps=300, scenario="shift"."""
    given = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return json.loads(_ask("simulate", *map(os.fspath, configs), *given, "--format", "json"))


def compare(*runs: PathLike) -> List[dict]:
    """The figures of runs, side by side: one dict a run."""
    return json.loads(_ask("compare", *map(os.fspath, runs), "--format", "json"))


def report(*runs: PathLike, output: PathLike) -> None:
    """Writes one self-contained HTML page about one or several runs or traces."""
    _ask("report", *map(os.fspath, runs), "-o", os.fspath(output))


def main() -> None:
    """The tool itself, for the command `moectl` that pip installs."""
    try:
        os.execv(tool(), ["moectl", *sys.argv[1:]])
    except MoectlError as error:
        sys.exit(f"moectl: {error}")
