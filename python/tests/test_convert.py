import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

import moectl  # noqa: E402


def convert(*arguments):
    return subprocess.run([sys.executable, "-m", "moectl.convert", *map(str, arguments)], capture_output=True, check=False)


def test_a_dump_becomes_a_trace(tmp_path):
    counts = torch.tensor([[[4, 2, 1, 1], [2, 2, 2, 2]], [[3, 3, 0, 1], [0, 0, 0, 0]]])
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "dump.pt")
    assert convert(tmp_path / "dump.pt", "--top-k", 2, "-o", tmp_path / "trace.jsonl").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines[0] == {"format": "moectl-trace", "version": 1, "layers": 2, "experts": 4, "top_k": 2}
    assert lines[1:] == [{"step": 0, "layer": 0, "tokens": 4, "counts": [4, 2, 1, 1]},
                         {"step": 0, "layer": 1, "tokens": 4, "counts": [2, 2, 2, 2]},
                         {"step": 1, "layer": 0, "tokens": 4, "counts": [3, 3, 0, 1]}]
    if os.environ.get("MOECTL_TOOL"):
        assert [r["metrics"]["max_vio"] for r in moectl.metrics(tmp_path / "trace.jsonl")][1] == 0


def test_what_is_no_dump_is_said(tmp_path):
    torch.save({"rank": 0}, tmp_path / "dump.pt")
    done = convert(tmp_path / "dump.pt", "--top-k", 2)
    assert done.returncode == 1 and b"logical_count: missing" in done.stderr
    assert b"none.pt" in convert(tmp_path / "none.pt", "--top-k", 2).stderr
