"""What answers rows in the place of a model, and runs made of rows without pictures. Workers import it by its name."""

import os
import signal
import time

from paligemma.batch.folder import open_run
from paligemma.batch.rows import InputRow, RowFailure, failed
from paligemma.batch.settings import Settings

MARKS = {"weights": "of nobody", "list": None}


def line_of(row, attempts=1):
    """A line as `rows.answered` makes it, without a model."""
    size = None if row.image is None else [4, 3]
    nothing = {"finished": True, "detections": [], "segments": [], "invalid": [], "image_size": size}
    head = {"id": row.id, "image": row.image, "prompt": row.prompt, "text": f"{row.prompt} {row.id}", "score": 0.5}
    return {**head, **nothing, "error": None, "attempts": attempts, "ms": 1}


def run_of(path, count, shard_size=10, batch_size=4, **options):
    """A run of `count` rows without pictures, just begun."""
    settings = Settings("caption en", rows="none.jsonl", shard_size=shard_size, batch_size=batch_size, **options)
    return open_run(path, settings, MARKS, lambda: rows_of(count))


def rows_of(count):
    return (InputRow(f"row {number}", None, "caption en") for number in range(count))


def lines_of(folder):
    """All lines of all parts, in order."""
    return [line for shard in sorted(folder.done()) for line in folder.lines(shard)]


def in_batches(answer_row, size):
    """Answers rows one by one, and asks between two batches whether to stop."""

    def answer(rows, stop):
        for number, row in enumerate(rows):
            if number % size == 0 and stop():
                return
            yield row, answer_row(row)

    return answer


def quick(settings, device=None, draw=None):
    return in_batches(line_of, settings.batch_size)


def slow(settings, device=None, draw=None):
    """20 ms a row, so that there is time to be killed. STANDIN_LOG: a file that notes every row that is answered."""
    log = os.environ.get("STANDIN_LOG")

    def answer_row(row):
        time.sleep(0.02)
        if log:
            with open(log, "a") as file:
                file.write(f"{row.id}\n")
        return line_of(row)

    return in_batches(answer_row, settings.batch_size)


def opening(settings, device=None, draw=None):
    """Opens the pictures, and says nothing about them."""
    from paligemma.batch.pictures import open_picture, places_of  # imports torch, which the others need not wait for

    def answer_row(row):
        try:
            for place in places_of(row.image):
                open_picture(place, settings.max_pixels)
        except RowFailure as error:
            return failed(row, error.kind, error.message)
        return line_of(row)

    return in_batches(answer_row, settings.batch_size)


def failing(settings, device=None, draw=None):
    """Every row fails, after 50 ms."""

    def answer_row(row):
        time.sleep(0.05)
        return failed(row, "missing", "there is no such file")

    return in_batches(answer_row, settings.batch_size)


def deadly(settings, device=None, draw=None):
    """Row 13 kills the worker that answers it."""

    def answer_row(row):
        if row.id == "row 13":
            os.kill(os.getpid(), signal.SIGKILL)
        return line_of(row)

    return in_batches(answer_row, settings.batch_size)


def one_healthy(settings, device=None, draw=None):
    """The worker that makes the file `healthy` in the current folder answers, the first shard when two others are dead;
    all others die while they load."""
    try:
        open("healthy", "x").close()
    except FileExistsError:
        with open("deaths", "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def answer_row(row):
        deadline = time.monotonic() + 60
        while row.id == "row 5" and time.monotonic() < deadline:
            if os.path.exists("deaths") and os.path.getsize("deaths") >= 2:
                time.sleep(0.3)  # the watcher looks every 50 ms
                break
            time.sleep(0.01)
        return line_of(row)

    return in_batches(answer_row, settings.batch_size)


def broken(settings, device=None, draw=None):
    raise ValueError("this model cannot be loaded")
