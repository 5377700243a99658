"""The training example learns, balances and leaves a log that the tool reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="python3-torch is not installed")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "python/examples/train_moe_lm.py"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    files = []
    for name, pattern in (("code", "src/**/*.cc"), ("words", "docs/*.md")):
        text = "\n".join(file.read_text() for file in sorted(ROOT.glob(pattern)))
        files.append(folder / name)
        files[-1].write_text(text[:300000])
    return files


def train(texts, log, *more):
    command = [sys.executable, EXAMPLE, "--log", log, "--threads", "1", "--batch", "4", "--length", "64", *more, "--text", *texts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.PIPE).stdout.decode()


def test_the_example_learns_and_its_log_is_read(texts, tmp_path):
    log = tmp_path / "run.jsonl"
    said = train(texts, log, "--steps", "40", "--policy", ROOT / "examples/controlled.yaml")
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+)  MaxVio", said)]
    assert losses[0] > 5 and losses[-1] < 4 and "validation loss" in said
    records = [json.loads(line) for line in log.read_text().splitlines()]
    last = [r for r in records if r.get("step") == 39 and "counts" in r]
    assert len(last) == 3 and all(sum(r["counts"]) == 4 * 64 * 2 and r["sequences"] == 4 for r in last)
    assert set(last[0]["domain_counts"]) == {"code", "words"} and sum(last[0]["next_mixture"].values()) == 4 * 64
    assert any(last[0]["actuators"]["expert_bias"]["applied"])
    if os.environ.get("MOECTL_TOOL"):
        compared = subprocess.run([os.environ["MOECTL_TOOL"], "compare", "--format", "json", log], check=True,
                                  stdout=subprocess.PIPE).stdout
        figures = json.loads(compared)[0]
        assert figures["steps"] == 40 and figures["floor"] == "sampling floor"


def test_the_same_seed_gives_the_same_log(texts, tmp_path):
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for log in logs:
        train(texts, log, "--steps", "5")
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert logs[0].read_text().count('"applied":[0,0') > 0  # without a config nothing moves
