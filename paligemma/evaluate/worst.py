"""The worst rows of a run, drawn: the truth beside the answer."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paligemma.evaluate.comparison import compare
from paligemma.evaluate.examples import Example, Prediction
from paligemma.files import written_whole


class WorstRows:
    """Keeps the worst rows of every task with their pictures. Among equally bad rows, those with the highest score (the
    model was sure and wrong) count as worse."""

    def __init__(self, limit: int, tasks: Iterable[str]) -> None:
        self.limit = limit
        self.heaps: dict[str, list[tuple[float, float, int, Example, Prediction]]] = {task: [] for task in tasks}

    def offer(self, example: Example, prediction: Prediction, bad: float, position: int) -> None:
        """bad: see `summary.badness`. position: of the row among the examples."""
        if bad > 0 and self.limit:
            heap = self.heaps[example.task]
            heapq.heappush(heap, (bad, prediction.score, -position, example, prediction))
            if len(heap) > self.limit:
                heapq.heappop(heap)

    def draw(self, folder: Path) -> list[dict[str, Any]]:
        """Draws the worst row of each task, then the second worst of each, and so on up to the limit. Returns what was
        drawn, for the report."""
        ranked = [sorted(heap, reverse=True) for heap in self.heaps.values()]
        chosen = [heap[i] for i in range(self.limit) for heap in ranked if i < len(heap)][: self.limit]
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        drawn = []
        for k, (bad, _, _, example, prediction) in enumerate(chosen):
            name = f"{k:02d}_{example.task}.png"
            with written_whole(folder / name) as beside:
                compare(example, prediction).save(beside)
            drawn.append({"file": f"worst/{name}", "id": example.id, "task": example.task, "badness": bad})
        return drawn
