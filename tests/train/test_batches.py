"""Batches that are loaded ahead, and pictures that cannot be read."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import SMALL, losses, make_model, make_processor, make_rows

from paligemma.train.batches import MOST_SKIPPED, Prefetched, RowBatches
from paligemma.train.loop import TrainConfig, train


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


class Rows:
    """Twelve rows with pictures of their own, but for those that are `gone`; `read` says which were asked for."""

    def __init__(self, gone=()):
        self.gone, self.read, self.changed = gone, [], threading.Condition()

    def __len__(self):
        return 12

    def __getitem__(self, i):
        with self.changed:
            self.read.append(i)
            self.changed.notify_all()
        image = "gone.png" if i in self.gone else np.full((28, 28, 3), 20 * i, np.uint8)
        return {"image": image, "prefix": f"caption en {i}", "suffix": "red", "source": f"rows:{i}"}

    def wait_for(self, count):
        """True once so many rows were read."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.read) >= count, timeout=60)


def in_order(processor, gone=(), **more):
    """Four rows a step, as they stand."""
    return RowBatches(Rows(gone), processor, 4, shuffle=False, **more)


def same(one, other):
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


# ------------------------------------------------------------------------------------------------------------ ahead


@pytest.mark.parametrize("world, accumulate", [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_batches_that_are_loaded_ahead_are_the_same(processor, world, accumulate):
    """In every process, for every part of a step, from the first step on or from where a run goes on."""
    plain, parts = RowBatches(Rows(), processor, 4, seed=3), world * accumulate
    for rank in range(world):
        for begin in (0, 3):
            rows = Rows()
            with Prefetched(RowBatches(rows, processor, 4, seed=3), steps=7, world=world) as ahead:
                for step in range(begin, 7):
                    for part in range(rank, parts, world):
                        assert same(ahead(step, part, parts), plain(step, part, parts))
            mine = sum(len(range(4)[part::parts]) for part in range(rank, parts, world))
            assert len(rows.read) == (7 - begin) * mine, "each row once, and none beyond the last step"


def test_the_next_step_is_loaded_while_the_caller_works(processor):
    batches = in_order(processor)
    with Prefetched(batches, steps=3) as ahead:
        ahead(0)
        assert batches.rows.wait_for(8)
        before = list(batches.rows.read)
        ahead(1)
        assert before == list(range(8)), "of step 1, before it was asked for"


def test_out_of_order_it_is_loaded_when_it_is_asked_for(processor):
    plain = in_order(processor)
    with Prefetched(in_order(processor), steps=3) as ahead:
        for step in (0, 2, 1, 1, 0):
            assert same(ahead(step), plain(step))


def test_skipped_rows_are_told_in_their_step(processor):
    """By the thread of the caller, and not before the step is asked for: a run that ends there has not skipped them."""
    told = []

    def skip(step, source, error):
        told.append((now, step, source, threading.current_thread() is threading.main_thread()))

    batches = in_order(processor, gone=(2, 4, 5, 6, 7, 9), on_skip=skip)
    with Prefetched(batches, steps=3) as ahead:
        now = 0
        assert len(ahead(0)["input_ids"]) == 3
        assert batches.rows.wait_for(8)
        assert told == [(0, 0, "rows:2", True)]
        now = 1
        assert ahead(1) is None
        now = 2
        assert len(ahead(2)["input_ids"]) == 3
    assert told[1:] == [(1, 1, f"rows:{i}", True) for i in (4, 5, 6, 7)] + [(2, 2, "rows:9", True)]


def test_a_disk_that_went_away_is_noticed_too(processor):
    told = []
    batches = in_order(processor, gone=range(12), on_skip=lambda *skipped: told.append(skipped))
    lost = pytest.raises(OSError, match=f"{MOST_SKIPPED} rows one after the other .* the last: rows:3: gone.png")
    with lost, Prefetched(batches, steps=1000) as ahead:
        for step in range(1000):
            assert ahead(step) is None
    assert len(told) == MOST_SKIPPED and not threads()


def test_an_error_shows_in_its_step(processor):
    """And the thread ends with the run, however that ends."""
    batches = in_order(processor, gone=(6,))
    missing = pytest.raises(FileNotFoundError, match=r"^step 2, rows:6: gone.png: no such file$")
    with missing, Prefetched(batches, steps=3) as ahead:
        assert len(ahead(0)["input_ids"]) == 4
        assert batches.rows.wait_for(7) and threads()
        ahead(1)
    assert not threads()


def test_who_stops_waits_for_a_picture_and_not_for_a_step(processor):
    batches, go_on = in_order(processor), threading.Event()

    class Slow(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row if i < 5 or go_on.wait(timeout=60) else None

    batches.rows = Slow()
    with Prefetched(batches, steps=3) as ahead:
        ahead(0)
        assert batches.rows.wait_for(6)
        threading.Timer(0.2, go_on.set).start()  # after the end has begun
    assert batches.rows.read == [0, 1, 2, 3, 4, 5] and not threads()


def test_training_is_the_same_with_batches_loaded_ahead(processor, tmp_path):
    """Also when it goes on after a stop."""

    def run(name, stop=None, ahead=True):
        batches = RowBatches(make_rows(), processor, batch_size=4)
        with Prefetched(batches, SMALL["steps"]) as loaded:

            def until(step, part, parts):
                if step == stop:
                    raise KeyboardInterrupt
                return (loaded if ahead else batches)(step, part, parts)

            train(make_model(processor), until, TrainConfig(**SMALL, accumulate=2, save_every=0.0), tmp_path / name)

    run("plain", ahead=False)
    run("ahead")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=3)
    run("cut")
    assert losses(tmp_path / "ahead") == losses(tmp_path / "cut") == losses(tmp_path / "plain")


# ----------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("content, kind, reason", [
    (None, FileNotFoundError, "no such file"),
    (b"", ValueError, "is not a picture in any format that Pillow reads"),
    ("cut", OSError, "is damaged or truncated"),
])  # fmt: skip
def test_a_picture_that_cannot_be_read_is_named(processor, tmp_path, content, kind, reason):
    """Its step, as the log counts them, and its row: a picture that is stored as bytes has no name of its own."""
    path = tmp_path / "a.png"
    if content == "cut":
        Image.effect_noise((40, 40), 50).save(path)
        content = path.read_bytes()[:500]
    image = str(path) if content is None else content
    rows = [{"image": image, "prefix": "a", "suffix": "b", "source": "x.parquet row 7"}]
    with pytest.raises(kind, match=f"^step 5, x.parquet row 7: .*{reason}"):
        RowBatches(rows, processor, 1)(step=4)
    del rows[0]["source"]
    with pytest.raises(kind, match=r"^step 1, row 0: "):
        RowBatches(rows, processor, 1)(step=0)
