"""The log of a run, written for TensorBoard as well: curves, and pictures of the validation rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paligemma.images import load_image

PICTURES = 4  # of each validation


class TensorBoard:
    """Takes entries of the log. Where TensorBoard is not installed, or can no longer write, it says so once and does
    nothing from then on."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        """step: where the run goes on; later events of a run that was killed are dropped."""
        self.folder, self.say = folder, say
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard: pip install 'paligemma[train]' (log.jsonl has the same figures)")
            return
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, entry: dict[str, Any]) -> None:
        if self.writer is None:
            return
        validation = entry.get("validation")
        try:
            if validation:
                self._scalars("validation", validation, entry["step"])
                self._pictures(entry["step"])
            else:
                self._scalars("train", entry, entry["step"])
        except OSError as error:  # a full disk ends the events, not the run
            self.say(f"TensorBoard ends here: {error}")
            self.writer = None

    def _scalars(self, group: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and name not in ("step", "time"):
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def _pictures(self, step: int) -> None:
        folder = self.folder.parent / "validation" / f"step-{step:08d}" / "examples"
        for path in sorted(folder.glob("*.png"))[:PICTURES]:
            self.writer.add_image(f"examples/{path.stem}", np.asarray(load_image(path)), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
