"""What docs/training.md says is done here as it is written there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from paligemma.cli import main as cli
from paligemma.train.options import TrainOptions
from paligemma.train.setup import steps_of

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def block(name: str, language: str) -> str:
    """The code block that stands behind a marker <!-- name -->."""
    (found,) = re.findall(rf"<!-- {name} -->\n```{language}\n(.*?)```", DOCS, re.S)
    return found


@pytest.mark.slow
def test_the_first_run(tmp_path):
    """It learns its four rows by heart, and leaves the folder that the page describes."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "scene.png", tmp_path / "examples")
    (tmp_path / "rows.jsonl").write_text(block("first-rows", "json"))
    for line in block("first-training", "sh").splitlines():
        command = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "ball\n"
    (tree,) = re.findall(r"```\nruns/first/\n(.*?)```", DOCS, re.S)
    named = re.findall(r"^  ([\w.]+)(?:, ([\w.]+))?", tree, re.M)
    names = {name for pair in named for name in pair if name} - {"tensorboard"}  # which may not be installed
    assert len(names) == 8 and names <= {path.name for path in (tmp_path / "runs" / "first").iterdir()}


def test_the_options_are_those_of_the_command():
    options = {name for parameter in get_command(cli.app).commands["train"].params for name in parameter.opts}
    named = set(re.findall(r"`(--[a-z][a-z-]+)", DOCS)) - {"--no-resume"}  # of `--resume`
    assert len(named) > 30 and named <= options


def test_the_defaults_are_those_of_the_command():
    plain = TrainOptions("tiny", "rows.jsonl", "run")
    named = {name: int(value) for name, value in re.findall(r"`--([a-z-]+)` \(default (\d+)\)", DOCS)}
    assert named == {"epochs": 1, "batch": plain.batch, "rank": plain.rank}
    assert steps_of(plain, 10 * plain.batch) == 10, "one epoch"
    lora = TrainOptions("tiny", "rows.jsonl", "run", lora=("decoder",))
    assert "default is 1e-5, with LoRA 1e-4" in DOCS and (plain.peak_lr, lora.peak_lr) == (1e-5, 1e-4)
    assert "first 5% of the run" in DOCS and plain.warmup == 0.05
    assert "256 of these rows" in DOCS and plain.validation_rows == 256
    assert "every two minutes (`--save-every`)" in DOCS and plain.save_every == 120
