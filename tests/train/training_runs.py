"""What several tests of `paligemma train` have in common: eight rows of colours, and a run over them."""

import json
import os
import signal
from pathlib import Path

from PIL import Image
from test_train import COLORS

from paligemma.train.batches import RowBatches
from paligemma.train.finetune import finetune
from paligemma.train.options import TrainOptions


def write_data(folder: Path) -> str:
    """Eight rows: two pictures of each of four colours, asked for in different words."""
    folder.mkdir()
    lines = []
    for i in range(8):
        name, color = list(COLORS.items())[i % 4]
        Image.new("RGB", (28, 28), color).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "prefix": f"answer en what color is it{' now' * (i // 4)} ?", "suffix": name}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


SMALL = {"steps": 6, "batch": 4, "lr": 3e-3, "save_every": 0.0}  # a checkpoint after every step


def run(base: str, data: str, out: Path, **others) -> list[str]:
    """What was said."""
    said: list[str] = []
    finetune(TrainOptions(model=base, data=data, out=str(out), **{**SMALL, **others}), said.append)
    return said


def interrupt_in_step_4(monkeypatch, number: int = signal.SIGINT) -> None:
    """Ctrl-C (or another signal) while its batch is made."""
    lay_out = RowBatches.lay_out

    def interrupted(self, step, loaded):
        if step == 3:
            os.kill(os.getpid(), number)
        return lay_out(self, step, loaded)

    monkeypatch.setattr(RowBatches, "lay_out", interrupted)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    entries = [entry for entry in log_of(out) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def during(action):
    """A `say` that acts when the announcement is over, when the rows were checked and nothing was trained yet."""

    def say(line: str) -> None:
        if line.startswith("numbers"):
            action()

    return say
