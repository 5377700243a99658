import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

import moectl.convert  # noqa: E402


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


def test_counts_may_be_floats(tmp_path):
    torch.save({"logical_count": torch.tensor([[[4.0, 2, 1, 1]]])}, tmp_path / "dump.pt")
    done = convert(tmp_path / "dump.pt", "--top-k", 2)
    assert json.loads(done.stdout.splitlines()[1]) == {"step": 0, "layer": 0, "tokens": 4, "counts": [4, 2, 1, 1]}


def test_a_converter_needs_pytorch_and_no_library(tmp_path):
    torch.save({"logical_count": torch.ones(1, 2, 4, dtype=torch.int64)}, tmp_path / "dump.pt")
    code = f"import runpy, sys; sys.argv = ['convert', {str(tmp_path / 'dump.pt')!r}, '--top-k', '2']; " \
           "runpy.run_module('moectl.convert', run_name='__main__')"
    bare = {**os.environ, "MOECTL_LIBRARY": str(tmp_path / "missing.so")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=bare)
    assert done.returncode == 0 and done.stdout.startswith(b'{"format":"moectl-trace"'), done.stderr
    # What needs the library says so.
    done = subprocess.run([sys.executable, "-c", "from moectl import Controller"], capture_output=True, check=False, env=bare)
    assert done.returncode == 1 and b"libmoectl.so.0 cannot be loaded" in done.stderr


@pytest.mark.parametrize("dump, top_k, words", [
    ({"rank": 0}, 2, "a dict of rank: must be a dict with logical_count"),
    ([1, 2], 2, "list: must be a dict with logical_count"),
    ({"logical_count": [[1, 2]]}, 2, "logical_count: list: must be a tensor of whole numbers"),
    ({"logical_count": torch.zeros(4, dtype=torch.int64)}, 2, "logical_count: [4]: must be [steps, layers, experts] or"),
    ({"logical_count": torch.full((1, 2, 4), 0.5)}, 2, "logical_count: torch.float32: must be whole numbers"),
    ({"logical_count": torch.full((1, 2, 4), float("inf"))}, 2, "logical_count: torch.float32: must be whole numbers"),
    ({"logical_count": torch.ones(1, 2, 4, dtype=torch.bool)}, 2, "logical_count: torch.bool: must be whole numbers"),
    ({"logical_count": torch.zeros(1, 2, 4)}, 2, "logical_count: every count is 0: must hold the tokens"),
    ({"logical_count": torch.ones(2, 4, dtype=torch.int64).to_sparse()}, 2,
     "logical_count: torch.sparse_coo on cpu: must be a dense tensor"),
    ({"logical_count": torch.tensor([[1, -2, 3, 4]])}, 2, "logical_count: -2: must not be negative"),
    ({"logical_count": torch.ones(2, 4, dtype=torch.int64)}, 5, "--top-k: 5: must be from 1 to the 4 experts"),
    ({"logical_count": torch.ones(2, 4, dtype=torch.int64)}, 0, "--top-k: 0: must be from 1 to the 4 experts"),
])
def test_what_is_no_dump_is_said(dump, top_k, words, tmp_path, monkeypatch, capsys):
    torch.save(dump, tmp_path / "dump.pt")
    file = str(tmp_path / "dump.pt")
    monkeypatch.setattr(sys, "argv", ["convert", file, "--top-k", str(top_k)])
    with pytest.raises(SystemExit) as ended:
        moectl.convert.main()
    assert str(ended.value).startswith(f"moectl.convert: {file}: {words}")
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("no pickle")
    torch.save({"logical_count": torch.ones(2, 4, dtype=torch.int64)}, tmp_path / "good.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:300])
    for name, words in (("none.pt", b"No such file"), ("text.pt", b"must be a file of torch.save"),
                        ("torn.pt", b"must be a file of torch.save")):
        done = convert(tmp_path / name, "--top-k", 2)
        assert done.returncode == 1 and words in done.stderr and b"Traceback" not in done.stderr
        assert b"weights_only" not in done.stderr  # whose other value runs what the file holds
        assert done.stderr.startswith(f"moectl.convert: {tmp_path / name}: ".encode())
    done = convert(tmp_path / "good.pt", "--top-k", 2, "-o", tmp_path / "no/trace")
    assert done.returncode == 1 and done.stderr.startswith(f"moectl.convert: {tmp_path}/no/trace: No such file".encode())


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_dump_never_runs(legacy, tmp_path):
    made = tmp_path / "made"
    torch.save({"logical_count": torch.ones(2, 4, dtype=torch.int64), "more": Hostile(str(made))}, tmp_path / "dump.pt",
               _use_new_zipfile_serialization=not legacy)
    done = convert(tmp_path / "dump.pt", "--top-k", 2)
    assert not made.exists()
    assert done.returncode == 1 and b"must be a file of torch.save that holds tensors" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_pytorch_that_would_run_code_is_refused(tmp_path, monkeypatch):
    torch.save({"logical_count": torch.ones(2, 4, dtype=torch.int64)}, tmp_path / "dump.pt")
    monkeypatch.setattr(torch, "load", lambda file, map_location=None: pytest.fail("loaded"))
    with pytest.raises(moectl.MoectlError, match="must be 1.13 or later"):
        moectl.convert.load(str(tmp_path / "dump.pt"))
