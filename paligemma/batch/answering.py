"""Answers rows with a model: each becomes a line, whatever is wrong with it, and no row harms its neighbours.

Pictures are opened in a thread while the model answers the batch before. A batch that fails as a whole is halved (out
of memory) or answered row by row (anything else), so that the error meets the row it belongs to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.batch.pictures import open_picture
from paligemma.batch.rows import InputRow, Line, RowFailure, answered, failed
from paligemma.batch.settings import Settings, budget_of

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.inference import PaliGemma

Pictures = tuple["Image.Image", ...] | RowFailure  # those of a row, or why they cannot be opened


def load_answer(settings: Settings, device: str | None = None, draw: Path | None = None) -> AnswerRows:
    """Loads the model of a run. device: in place of the settings' own. draw: see `AnswerRows`."""
    from paligemma.inference import load

    pg = load(
        settings.model, device=device or settings.device, dtype=settings.dtype, quantize=settings.quantize,
        revision=settings.revision, image_size=settings.image_size, loc_scale=settings.loc_scale,
        device_map=settings.device_map,
    )  # fmt: skip
    return AnswerRows(pg, settings, draw)


class AnswerRows:
    """A model that answers rows in the way that the settings say. draw: a folder for pictures with boxes over them."""

    def __init__(self, pg: PaliGemma, settings: Settings, draw: Path | None = None) -> None:
        self.pg, self.settings, self.draw = pg, settings, draw

    def __call__(
        self, rows: Sequence[InputRow], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[InputRow, Line]]:
        """Each row with its line, a batch at a time. stop: asked before each batch."""
        size = self.settings.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(self._open, batches[0]) if batches else None
            for number, batch in enumerate(batches):
                if stop() or opened is None:
                    break
                pictures = opened.result()
                if number + 1 < len(batches):
                    opened = pool.submit(self._open, batches[number + 1])
                yield from zip(batch, self._lines(batch, pictures))

    def _open(self, rows: Sequence[InputRow]) -> list[Pictures]:
        return [pictures_of(row, self.settings.max_pixels) for row in rows]

    def _lines(self, rows: Sequence[InputRow], pictures: Sequence[Pictures]) -> list[Line]:
        """The lines of some rows, in order."""
        lines: dict[int, Line] = {}
        groups: dict[str, list[int]] = {}  # rows that are generated with the same options
        for k, (row, opened) in enumerate(zip(rows, pictures)):
            if isinstance(opened, RowFailure):
                lines[k] = failed(row, opened.kind, opened.message)
            else:
                groups.setdefault(repr(sorted(self._options(row).items())), []).append(k)
        for numbers in groups.values():
            some = [(rows[k], pictures[k]) for k in numbers]
            lines.update(zip(numbers, self._answer(some)))
        return [lines[k] for k in range(len(rows))]

    def _answer(self, rows: list[tuple[InputRow, Any]]) -> list[Line]:
        started = time.perf_counter()
        try:
            images = [opened if len(opened) > 1 else opened[0] if opened else None for _, opened in rows]
            options = self._options(rows[0][0])
            answers = self.pg.generate(images, [row.prompt for row, _ in rows], **options)
        except Exception as error:
            if len(rows) == 1:
                return [failed(rows[0][0], kind_of(error), str(error) or type(error).__name__)]
            half = (len(rows) + 1) // 2 if kind_of(error) == "out_of_memory" else 1
            return [line for at in range(0, len(rows), half) for line in self._answer(rows[at : at + half])]
        ms = (time.perf_counter() - started) * 1000 / len(rows)
        lines = []
        for (row, opened), answer in zip(rows, answers):
            lines.append(answered(row, answer, opened[0].size if opened else None, self.settings.masks, ms))
            if self.draw is not None:
                draw_answer(self.draw, row, opened, answer)
        return lines

    def _options(self, row: InputRow) -> dict[str, Any]:
        """Arguments of `PaliGemma.generate`."""
        settings, own = self.settings, row.options
        boxes = row.prompt.strip().partition(" ")[0] in ("detect", "segment")
        options: dict[str, Any] = {
            "max_new_tokens": own.get("max_new_tokens") or settings.max_new_tokens or budget_of(row.prompt),
            "constrained": own.get("constrained", not settings.free),
            "forbid_repeats": settings.forbid_repeats and boxes,
            "num_beams": settings.beams,
        }
        sampling = {name: own.get(name, getattr(settings, name)) for name in ("temperature", "top_k", "top_p", "seed")}
        if (
            any(sampling[name] is not None for name in ("temperature", "top_k", "top_p"))
            and own.get("temperature") != 0
        ):
            options.update(sampling, do_sample=True, temperature=sampling["temperature"] or 1.0)
        return options


def pictures_of(row: InputRow, max_pixels: float | None) -> Pictures:
    """The pictures of a row, or why one of them cannot be opened."""
    places = row.image
    if places is None:
        return ()
    if isinstance(places, (str, Mapping)):
        places = [places]
    try:
        return tuple(open_picture(place, max_pixels) for place in places)
    except RowFailure as error:
        return error


def kind_of(error: BaseException) -> str:
    """Which of `rows.KINDS` an error is that came while a row was answered."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out_of_memory"
    if isinstance(error, RowFailure):
        return error.kind
    if isinstance(error, ValueError) and "positions" in text:
        return "prompt_too_long"
    return "constraint" if isinstance(error, ValueError) else "internal"


def draw_answer(folder: Path, row: InputRow, pictures: Sequence[Image.Image], answer: Any) -> None:
    """FOLDER/ID.png: the picture with the boxes and masks of its answer. Nothing where it has none."""
    from paligemma.answers.drawing import draw
    from paligemma.files import written_whole

    items = [*answer.detections, *answer.segments]
    if not items or not pictures:
        return
    with written_whole(drawing_path(folder, row.id)) as beside:
        draw(pictures[0], items, scale=max(1, -(-512 // max(pictures[0].size)))).save(beside)


def drawing_path(folder: Path, name: str) -> Path:
    """Where the drawing of a row goes: below `folder`, whatever its id is. Folders of the id are kept, so that equal
    names in two folders do not meet."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return folder.joinpath(*("_" if part == ".." else part[:200] for part in parts or ["picture"])).with_name(
        f"{(parts or ['picture'])[-1][:200]}.png"
    )
