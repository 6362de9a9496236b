"""Rows -> batches. A batch is a pure function of the step's number, so a run that resumes needs to remember nothing
else.

    batches = RowBatches(rows, processor, batch_size=32)
    batches(step=7, part=0, parts=4)       # the first quarter of step 7's 32 rows, as tensors for the model

`rows` is anything with `len` and `[i]` that gives `{"image": ..., "prefix": ..., "suffix": ...}` (or an object with
such attributes). `image` is what `load_image` takes, a tuple of them, or None. Of the `suffixes` of a row that has them
each epoch takes another. The parts of a step are shared out among processes and among the pieces of an accumulated
batch; together they are the same rows however many parts there are.

Several questions about one picture: a batch holds each of its pictures once, and `pictures` says which of them each row
sees, so that the vision tower need not look twice (`loss.py`). Shuffled row by row they would hardly ever come
into the same batch; `keep_together` shuffles pictures instead, with all of their rows that follow one another.

A picture that cannot be read (a disk that went away, a file that was moved) need not end a run of hours: with `on_skip`
its row is skipped and reported. After 100 skipped rows in succession the run stops: the disk is at fault then.

`Prefetched` decodes the pictures of the next step while this one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.images import load_image, preprocess
from paligemma.processing_paligemma import PaliGemmaProcessor

Batch = dict[str, Tensor]
MOST_SKIPPED = 100  # rows one after the other


@dataclass
class Loaded:
    """Rows of a step with their pictures: all of a batch that takes long."""

    rows: list[Any] = field(default_factory=list)  # that can be used
    suffixes: list[str] = field(default_factory=list)  # of each
    shown: list[list[int]] = field(default_factory=list)  # to each, numbers of pictures
    pixels: np.ndarray | None = None  # float32 [pictures, 3, image_size, image_size]
    skipped: list[tuple[str, Exception] | None] = field(default_factory=list)  # of every row: where and why, or not


class RowBatches:
    """Shuffles anew in every epoch; the last rows of an epoch are filled up with the first of the next.

    max_length cuts rows (images included) at the end of the suffix; padding is on the right, as in the reference's
    training. keep_together: neighbours with the same pictures stay neighbours; for this all rows (not their pictures)
    are read once, in the beginning. max_pixels: see `load_image`. on_skip is called with the step, where the row
    stands, and the error, for a row whose picture cannot be read; without it that is an error, which names step and
    row.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        processor: PaliGemmaProcessor,
        batch_size: int,
        seed: int = 0,
        max_length: int | None = None,
        shuffle: bool = True,
        keep_together: bool = False,
        max_pixels: int | None = None,
        on_skip: Callable[[int, str, Exception], None] | None = None,
    ):
        if not len(rows):
            raise ValueError("there are no rows to train on")
        self.rows, self.processor, self.batch_size = rows, processor, batch_size
        self.seed, self.max_length, self.shuffle = seed, max_length, shuffle
        self.max_pixels, self.on_skip, self._skipped = max_pixels, on_skip, 0
        self._epoch, self._order = -1, torch.empty(0)
        self._run = runs_of_pictures(rows) if keep_together else None

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> Batch | None:
        """None where nothing is left for a part: a step of more parts than rows, or all of its rows were skipped."""
        return self.lay_out(step, self.load(step, part, parts))

    def load(self, step: int, part: int = 0, parts: int = 1, stop: Event | None = None) -> Loaded:
        """The first half of a call, which takes long: rows are read and their pictures decoded. Nothing is told here.

        stop: once it is set nobody wants the rest.
        Without `on_skip` FileNotFoundError, OSError or ValueError for a picture, with the step and the row's place.
        """
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        loaded = Loaded()
        pixels: list[np.ndarray] = []  # of each picture
        seen: dict[Any, int] = {}  # which of them is it?
        each, more = divmod(len(places), parts)  # the first parts get one more; neighbours stay together
        first = part * each + min(part, more)
        for place in places[first : first + each + (part < more)]:
            if stop is not None and stop.is_set():
                break
            number = self._row(place)
            row = self.rows[number]
            try:
                pictures = {_identity(picture): picture for picture in _pictures(row)}
                new = {
                    identity: preprocess(load_image(picture, self.max_pixels), self.processor.image_size).numpy()
                    for identity, picture in pictures.items()
                    if identity not in seen
                }
            except (OSError, ValueError) as error:
                source = str(_get(row, "source", f"row {number}"))
                if self.on_skip is None:
                    kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
                    raise kind(f"step {step + 1}, {source}: {error}") from error
                loaded.skipped.append((source, error))
                continue
            loaded.skipped.append(None)
            loaded.rows.append(row)
            loaded.suffixes.append(_suffix(row, self.seed + number + place // len(self.rows)))
            seen |= {identity: len(pixels) + i for i, identity in enumerate(new)}
            pixels += new.values()
            loaded.shown.append([seen[_identity(picture)] for picture in _pictures(row)])
        if pixels:
            loaded.pixels = np.stack(pixels)
        return loaded

    def lay_out(self, step: int, loaded: Loaded) -> Batch | None:
        """The second half: `on_skip` is called, and the rest becomes tensors."""
        for skip in loaded.skipped:
            self._skipped = 0 if skip is None else self._skipped + 1
            if skip is None or self.on_skip is None:
                continue
            source, error = skip
            self.on_skip(step, source, error)
            if self._skipped >= MOST_SKIPPED:
                raise OSError(
                    f"the pictures of {MOST_SKIPPED} rows one after the other could not be read, the last: {source}: "
                    f"{error}"
                ) from error
        rows, shown = loaded.rows, loaded.shown
        if not rows:
            return None
        batch = self.processor.lay_out(
            [_get(row, "prefix") for row in rows],
            [len(pictures) for pictures in shown],
            loaded.suffixes,
            padding_side="right",
            max_length=self.max_length,
        )
        if loaded.pixels is not None:
            batch["pixel_values"] = torch.from_numpy(loaded.pixels)
            in_order = [picture for pictures in shown for picture in pictures]
            if len(in_order) > len(loaded.pixels):
                batch["pictures"] = torch.tensor(in_order)
        return batch

    def sources(self, step: int) -> list[str]:
        """Where the rows of a step stand."""
        numbers = [self._row(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]
        return [str(_get(self.rows[number], "source", f"row {number}")) for number in numbers]

    def _row(self, place: int) -> int:
        """Which row stands at a place of the endless shuffled stream."""
        epoch, place = divmod(place, len(self.rows))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch
            if self._run is None:
                self._order = torch.randperm(len(self.rows), generator=generator)
            else:
                places = torch.randperm(int(self._run[-1]) + 1, generator=generator)  # of the runs
                self._order = places[self._run].argsort(stable=True)
        return int(self._order[place])


class Prefetched:
    """`batches`, but the pictures of the next step are decoded in a thread while the caller works on this one.

        with Prefetched(batches, steps=1000) as prefetched:
            train(model, prefetched, TrainConfig(steps=1000), out)

    It gives what `batches` gives; errors and skipped rows show in the step that they belong to, since the thread only
    loads (`RowBatches.load`) and all else happens when a batch is asked for. One batch more lies in memory. Until the
    end of `with`, which is that of the thread too, nothing else may read `batches` or their rows.

    steps: of the whole run; beyond them nothing is loaded. world: how many processes there are, each of which takes
    every `world`-th part of a step. What is asked for out of this order is loaded when it is.
    """

    # The thread causes no warnings, whose filters all threads share, and computes next to nothing in torch, which would
    # start threads of its own beside those of the step. (Masks of COCO are the exception: the codec makes them tokens.)

    def __init__(self, batches: RowBatches, steps: int, world: int = 1) -> None:
        self.batches, self.steps, self.world = batches, steps, world
        self._thread, self._stop = ThreadPoolExecutor(1, "batches"), Event()
        self._coming: tuple[tuple[int, int, int], Future[Loaded]] | None = None  # what is loaded, and for which call

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> Batch | None:
        asked, coming = (step, part, parts), self._coming
        self._coming = None
        if coming is not None and coming[0] != asked:
            coming[1].cancel()
            coming = None
        future = self._load(*asked) if coming is None else coming[1]
        loaded = future.result()
        after = (step, part + self.world, parts) if part + self.world < parts else (step + 1, part % self.world, parts)
        if after[0] < self.steps:
            self._coming = after, self._load(*after)
        return self.batches.lay_out(step, loaded)

    def _load(self, step: int, part: int, parts: int) -> Future[Loaded]:
        return self._thread.submit(self.batches.load, step, part, parts, self._stop)

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # a picture is waited for, not the rest of a step
        self._thread.shutdown(cancel_futures=True)


def runs_of_pictures(rows: Sequence[Any]) -> Tensor:
    """[0, 0, 0, 1, 2, 2, ...]: which run of neighbours with the same pictures each row belongs to. A row without a
    picture is a run of its own."""
    runs = torch.zeros(len(rows), dtype=torch.int64)
    before: tuple[Any, ...] = ()
    for i in range(len(rows)):
        pictures = _pictures(rows[i])
        same = pictures and list(map(_identity, pictures)) == list(map(_identity, before))
        runs[i], before = not same, pictures
    return runs.cumsum(0) - 1


def _identity(picture: Any) -> Any:
    """Equal for pictures that are the same: the path, the bytes of a file, or the very object (while it lives)."""
    return picture if isinstance(picture, (str, bytes, PurePath)) else id(picture)


def _get(row: Any, name: str, default: Any = None) -> Any:
    return row.get(name, default) if isinstance(row, dict) else getattr(row, name, default)


def _suffix(row: Any, turn: int) -> str:
    """Each of several is taken as often as the others, whatever their number: no lot is drawn. (`turn` goes up by one
    from epoch to epoch, and begins elsewhere in each row, so that one epoch too has first, second and third captions.)
    """
    several = _get(row, "suffixes", ())
    return several[turn % len(several)] if several else _get(row, "suffix")


def _pictures(row: Any) -> tuple[Any, ...]:
    image = _get(row, "image")
    return tuple(image) if isinstance(image, (tuple, list)) else () if image is None else (image,)
