"""`Predictor`: PaliGemma as a step of anybody's own Ray Data pipeline (or of a plain loop over dicts of columns).

    import ray, paligemma

    rows = ray.data.read_parquet("rows.parquet")            # columns image (path, bytes or array) and prompt
    rows.map_batches(
        paligemma.Predictor,
        fn_constructor_kwargs={"model": "google/paligemma2-3b-mix-224"},
        batch_size=32, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=4),
    ).write_parquet("answers")

Ray Data ends a job at the first exception, so a picture that cannot be opened must not raise one: it becomes an error
in its row. And an empty list has no type that Arrow could know, so nested answers are JSON in strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from paligemma.batch.rows import InputRow

NESTED = ("detections", "segments", "invalid")


class Predictor:
    """Loads a model once, and answers batches of rows.

    model: as for `paligemma.load`. prompt: of all rows, where the batches have no column of prompts. batch_size: rows
    that run together on the model. options: device, dtype, quantize, revision, image_size, loc_scale, max_new_tokens,
    temperature, top_k, top_p, beams, seed, free, forbid_repeats, max_pixels, masks: see `batch.settings.Settings`.
    Where answers are drawn with a seed, rows with equal prompts and pictures draw equal ones, in whatever batches.
    """

    def __init__(self, model: str = "tiny", prompt: str | None = None, batch_size: int = 16, **options: Any) -> None:
        from paligemma.batch.answering import load_answer
        from paligemma.batch.settings import Settings

        self.prompt = prompt
        self.answer = load_answer(Settings(model=model, batch_size=batch_size, **options))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of the batch and seven more: text, score (float), finished (bool), and in JSON detections,
        segments, invalid and error. A row that failed has error {"kind", "message"}, the text "" and the score nan; the
        error of all others is "".

        batch: column image, each a path, a data: URL, the bytes of a file, {"bytes", "path"} as Hugging Face has it,
        uint8 [H, W, 3] or None; and column prompt, unless the constructor was given one, which is also that of rows
        with the prompt None. ValueError without these columns; never because of a row.
        """
        import numpy as np

        from paligemma.batch.rows import InputRow, failed

        if "image" not in batch or ("prompt" not in batch and self.prompt is None):
            raise ValueError(f"expected the columns image and prompt, got {', '.join(batch)}")
        images = list(batch["image"])
        prompts = [self.prompt if prompt is None else prompt for prompt in batch.get("prompt", [None] * len(images))]
        rows = [
            InputRow(str(number), None if image is None else [image], str(prompt))
            for number, (image, prompt) in enumerate(zip(images, prompts))
        ]
        asked = [self._seeded(row) for row, prompt in zip(rows, prompts) if prompt is not None]
        lines = {int(row.id): line for row, line in self.answer(asked)}
        for row, prompt in zip(rows, prompts):
            if prompt is None:
                lines[int(row.id)] = failed(row, "internal", "the row has no prompt, and Predictor was given none")
        columns: dict[str, np.ndarray] = {
            "text": _strings(lines[k]["text"] or "" for k in range(len(rows))),
            "score": np.array([_number(lines[k]["score"]) for k in range(len(rows))], np.float64),
            "finished": np.array([bool(lines[k]["finished"]) for k in range(len(rows))], bool),
        }
        for name in NESTED:
            columns[name] = _strings(json.dumps(lines[k][name] or []) for k in range(len(rows)))
        columns["error"] = _strings("" if (e := lines[k]["error"]) is None else json.dumps(e) for k in range(len(rows)))
        return {**{name: batch[name] for name in batch}, **columns}

    def _seeded(self, row: InputRow) -> InputRow:
        """Where answers are drawn with a seed, the row with a seed of its own, from what it asks. (Its place in the
        batch depends on how Ray cuts batches.)"""
        from paligemma.batch.answering import seed_of

        settings = self.answer.settings
        if settings.seed is None or {settings.temperature, settings.top_k, settings.top_p} == {None}:
            return row
        try:
            return replace(row, options={"seed": seed_of(settings.seed, self.answer.digest(row))})
        except Exception:  # a picture that cannot be read: that is said when the row is answered
            return row


def _strings(texts: Any) -> np.ndarray:
    """Text as a column that stays text: numpy would cut zeros off the end of its own strings."""
    import numpy as np

    return np.array([*texts, ""], object)[:-1]


def _number(score: float | None) -> float:
    return float("nan") if score is None else score
