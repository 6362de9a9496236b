"""Runs in processes that are killed, stopped and started again. What answers is a stand-in (standins.py)."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import standins
from standins import MARKS, broken, deadly, lines_of, one_healthy, opening, quick, run_of, slow

from paligemma.batch import leases, run, worker
from paligemma.batch.folder import RunFolder, open_run
from paligemma.batch.rows import InputRow
from paligemma.batch.run import run_batch
from paligemma.batch.settings import Settings
from paligemma.batch.status import status_of, write_summary
from paligemma.batch.worker import How, finish_shards

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run, "LOOK", 0.05)
    monkeypatch.setattr(worker, "PAUSE", 0.05)


def ids(count):
    return [f"row {number}" for number in range(count)]


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in ("ms", "attempts")} for line in lines]


def test_workers_finish_a_run(tmp_path):
    folder = run_of(tmp_path / "run", 95)
    seen = []
    ended = run_batch(folder, 2, How(load=slow), on_progress=seen.append)
    assert ended.complete and (ended.answered, ended.errors) == (95, {})
    assert [line["id"] for line in lines_of(folder)] == ids(95)
    assert seen[-1].rows <= 95 == seen[-1].total
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["rows"], summary["answered"], summary["complete"], summary["workers_lost"]) == (95, 95, True, 0)


def test_parts_of_a_job_array(tmp_path):
    """--part 1/3, 2/3, 3/3: each finishes its shards, and together they are the run."""
    folder = run_of(tmp_path / "run", 50)
    first = run_batch(folder, 1, How(load=quick, part=(1, 3)))
    assert first.complete and not first.summary["complete"] and folder.done() == {0, 3}
    for number in (2, 3):
        ended = run_batch(folder, 1, How(load=quick, part=(number, 3)))
    assert ended.summary["complete"] and [line["id"] for line in lines_of(folder)] == ids(50)


def test_a_model_that_cannot_be_loaded_ends_the_run(tmp_path, capfd):
    folder = run_of(tmp_path / "run", 10)
    ended = run_batch(folder, 1, How(load=broken))
    assert ended.failure and not ended.complete
    assert capfd.readouterr().err == "error: this model cannot be loaded\n"
    assert run_batch(folder, 1, How(load=quick)).complete


def test_a_row_that_kills_its_worker_is_found(tmp_path):
    """Two workers die over a shard, two more over the row alone. All other rows are answered."""
    folder = run_of(tmp_path / "run", 30)
    notes = []
    ended = run_batch(folder, 1, How(load=deadly), note=notes.append)
    assert ended.complete and ended.errors == {"internal": 1} and ended.summary["workers_lost"] == 4
    lines = lines_of(folder)
    assert [line["id"] for line in lines] == ids(30)
    assert [line["id"] for line in lines if line["error"]] == ["row 13"]
    assert "SIGKILL" in notes[0]


def test_one_broken_gpu_does_not_end_the_run(tmp_path, monkeypatch):
    """In its place one worker after the other dies; the worker beside it goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "GIVE_UP", 2)
    folder, notes = run_of(tmp_path / "run", 50), []
    ended = run_batch(folder, 2, How(load=one_healthy), note=notes.append)
    assert ended.complete and ended.answered == 50 and ended.summary["workers_lost"] == 2
    assert (
        notes[-1]
        == "2 workers died before they had answered a row (SIGKILL, perhaps for want of memory); the others go on"
    )
    ended = run_batch(run_of(tmp_path / "all die", 30), 2, How(load=one_healthy))
    assert (
        ended.failure == "2 workers died before they had answered a row (SIGKILL, perhaps for want of memory)"
        and not ended.complete
    )


def test_a_worker_that_somebody_else_ends_is_replaced(tmp_path):
    folder = run_of(tmp_path / "run", 60)
    ended = []

    def end_one(progress):
        if not ended and progress.rows > 5:
            for lease in folder.work.glob("*.lease"):
                ended.append(json.loads(lease.read_text())["pid"])
                os.kill(ended[0], signal.SIGTERM)
                break

    done = run_batch(folder, 1, How(load=slow), on_progress=end_one)
    assert ended and done.complete and [line["id"] for line in lines_of(folder)] == ids(60)


@pytest.mark.parametrize("answers", [True, False])
def test_a_signal_to_all_processes_is_no_loss_of_a_worker(tmp_path, monkeypatch, answers):
    """As scancel and systemd send it: the workers may have ended before the parent looks at its own signal, and while a
    worker is still importing nothing handles it."""
    wait = run.wait

    def wait_until_gone(sentinels, timeout):
        wait(sentinels, timeout=30)
        time.sleep(0.2)  # a process closes its files a moment before its exit code can be read

    monkeypatch.setattr(run, "wait", wait_until_gone)
    folder = run_of(tmp_path / "run", 200)

    def signal_all():
        if answers:
            wait_for(lambda: answered_so_far(folder.path) > 4)
        else:
            wait_for(lambda: multiprocessing.active_children())
        for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            os.kill(pid, signal.SIGTERM)

    sender = threading.Thread(target=signal_all)
    sender.start()
    notes = []
    ended = run_batch(folder, 1, How(load=slow), note=notes.append)
    sender.join()
    assert (ended.signal, ended.complete, ended.summary["workers_lost"], notes) == (signal.SIGTERM, False, 0, [])


def test_many_errors_end_the_run_if_asked_and_it_goes_on(tmp_path):
    rows = [InputRow(f"row {number}", "nowhere.png", "ocr") for number in range(40)]
    settings = Settings("ocr", shard_size=10, batch_size=2)
    folder = open_run(tmp_path / "run", settings, MARKS, lambda: rows)
    ended = run_batch(folder, 1, How(load=standins.failing), stop_after_errors=5)
    assert ended.stopped and not ended.complete
    ended = run_batch(folder, 1, How(load=standins.failing))
    assert ended.complete and ended.errors == {"missing": 40}
    ended = run_batch(folder, 1, How(load=quick), retry_errors=True)
    assert (ended.answered, ended.errors) == (40, {})
    assert [line["attempts"] for line in lines_of(folder)] == [2] * 40


@pytest.mark.parametrize("part", [(1, 1), (1, 3), (3, 3)])
def test_draw_says_how_many_rows_were_answered_before_it(tmp_path, part):
    """Those of finished shards, and those that an interrupted call left; shards of other parts are not counted."""
    folder, notes = run_of(tmp_path / "run", 30), []
    run.opened_tally(folder, How(part=part, draw=tmp_path), False, notes.append)
    assert not notes  # nothing was answered before
    finish_shards(folder, [0], lambda: quick(folder.settings), lambda: False, lambda line: None)
    (folder.work / "00001.x.jsonl").write_text('{"id": "row 10"}\n{"id": "row 11"}\n')
    run.opened_tally(folder, How(part=part), False, notes.append)
    assert not notes
    run.opened_tally(folder, How(part=part, draw=tmp_path), False, notes.append)
    said = "rows were answered before: they have drawings only if --draw was given then"
    assert notes == {(1, 1): [f"note: 12 {said}"], (1, 3): [f"note: 10 {said}"], (3, 3): []}[part]


def test_status_counts_what_lies_in_the_folder(tmp_path):
    folder = run_of(tmp_path / "run", 30)
    run_batch(folder, 1, How(load=quick, part=(1, 3)))
    lease = leases.take(folder.lease(1))
    (folder.work / "00001.x.jsonl").write_text('{"id": "row 10"}\n{"trying": "row 11"}\n{"id": "torn')
    state = status_of(folder)
    assert (state["rows"], state["answered"], state["shards_done"], state["complete"]) == (30, 10, 1, False)
    assert (state["shards_worked_on"], state["rows_in_open_shards"]) == (1, 1) and lease

    def only_readable(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:  # somebody who looks from another machine
        patch.setattr(leases.Holder, "is_gone", lambda holder: None)
        patch.setattr(leases, "time_on_disk", only_readable)
        assert status_of(folder)["shards_worked_on"] == 1
    assert write_summary(folder, 1.0, 0, 0)["rows_in_open_shards"] == 1


@pytest.mark.parametrize("before_it_is_read", [True, False])
def test_status_while_a_shard_is_finished(tmp_path, monkeypatch, before_it_is_read):
    """Its work file vanishes just before, or its part appears just after it was read: its rows are counted once."""
    folder = run_of(tmp_path / "run", 30)
    finish_shards(folder, [0], lambda: quick(folder.settings), lambda: False, lambda line: None)
    for name in ("00001.x.jsonl", "00002.x.jsonl"):
        (folder.work / name).write_text(json.dumps(standins.line_of(folder.rows(int(name[:5]))[0])) + "\n")
    read_bytes = Path.read_bytes

    def finish():
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        finish_shards(folder, [1], lambda: quick(folder.settings), lambda: False, lambda line: None)

    def read_beside_a_worker(path):
        if path.name != "00001.x.jsonl":
            return read_bytes(path)
        if before_it_is_read:
            finish()
            return read_bytes(path)
        content = read_bytes(path)
        finish()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_beside_a_worker)
    state = status_of(folder)
    assert (state["shards_done"], state["answered"], state["rows_in_open_shards"]) == (2, 20, 1)


# ---------------------------------------------------------------------------------------------- kills

# A run in a process group of its own, as a user would start it: the folder, the number of rows, of workers.
STARTER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standins import *
from paligemma.batch import run, worker
from paligemma.batch.run import run_batch
from paligemma.batch.worker import How, finish_shards
run.LOOK = worker.PAUSE = 0.05
if __name__ == "__main__":
    folder = run_of(Path(sys.argv[2]), int(sys.argv[3]))
    ended = run_batch(folder, int(sys.argv[4]), How(load=slow))
    sys.exit(0 if ended.complete else 128 + ended.signal if ended.signal else 1)
"""


@pytest.fixture
def starter(tmp_path):
    """Starts a run: `process = starter(folder, rows, workers)`."""
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    started = []

    def start(folder, rows, workers):
        command = [sys.executable, str(script), str(HERE), str(folder), str(rows), str(workers)]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        started.append(process)
        return process

    yield start
    for process in started:
        kill_group(process)


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def answered_so_far(folder):
    """Lines of answers, in parts or work files. (A file may go while they are counted.)"""
    count = 0
    for path in Path(folder).glob("*/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b'{"id"')
    return count


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_batch_end(starter, tmp_path, number):
    folder = tmp_path / "run"
    process = starter(folder, 200, 2)
    wait_for(lambda: answered_so_far(folder) > 20 or process.poll() is not None)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not list((folder / "work").glob("*.lease*"))
    done = answered_so_far(folder)
    assert starter(folder, 200, 2).wait(120) == 0
    lines = lines_of(RunFolder(folder))
    assert [line["id"] for line in lines] == ids(200) and done < 200


@pytest.mark.slow
def test_two_starters_on_one_folder_both_finish(starter, tmp_path):
    folder = tmp_path / "run"
    processes = [starter(folder, 100, 1) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [line["id"] for line in lines_of(RunFolder(folder))] == ids(100)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(starter, tmp_path):
    """20 times kill -9, of a worker, of the parent, or of all. In the end every id has one line, equal to that of the
    undisturbed run, and every lost worker cost one batch at most.

    Two kills may hit one row alone by chance, which then counts as the row that kills: it has an error until it is
    tried again."""
    dice = random.Random(7)
    count, batch = 300, 4
    whole = run_of(tmp_path / "whole", count)
    run_batch(whole, 1, How(load=quick))
    folder, computed = tmp_path / "run", tmp_path / "computed"
    os.environ["STANDIN_LOG"] = str(computed)
    try:
        lost, process = 0, None
        for _ in range(20):
            if process is None or process.poll() is not None:
                process = starter(folder, count, 2)
            before = answered_so_far(folder)
            wait_for(lambda p=process, b=before: p.poll() is not None or answered_so_far(folder) > b)
            time.sleep(dice.random() * 0.2)
            workers = children(process)
            who = dice.choice(["worker", "parent", "all"])
            if who == "worker" and workers:
                os.kill(dice.choice(workers), signal.SIGKILL)
                lost += 1
            elif who == "parent":
                process.kill()
                process.wait()
            else:
                lost += len(workers)
                kill_group(process)
        wait_for(lambda: starter(folder, count, 2).wait(120) == 0)
    finally:
        del os.environ["STANDIN_LOG"]
    lines = lines_of(RunFolder(folder))
    assert [line["id"] for line in lines] == ids(count)
    blamed = [line for line in lines if line["error"]]
    assert len(blamed) <= 2 and all("workers were killed" in line["error"]["message"] for line in blamed)
    run_batch(RunFolder(folder), 1, How(load=quick), retry_errors=True)
    assert without_times(lines_of(RunFolder(folder))) == without_times(lines_of(whole))
    assert not list((folder / "work").iterdir())
    twice = len(computed.read_text().split("\n")) - 1 - count
    assert twice <= batch * lost


# ---------------------------------------------------------------------------------------------- ten thousand rows


def picture_rows(folder, count, bad_every):
    """`count` rows about a good picture, but for every bad_every-th one. {id: kind} of the bad ones."""
    from PIL import Image
    from test_batch_answers import bad_pictures

    scene = Image.new("RGB", (8, 6), "red")
    scene.save(folder / "good.png")
    bad = list(bad_pictures(folder, scene).items())
    rows, kinds = [], {}
    for number in range(count):
        name = "good.png"
        if number % bad_every == bad_every - 1:
            name, kinds[f"row {number}"] = bad[number // bad_every % len(bad)]
        rows.append(InputRow(f"row {number}", str(folder / name), "caption en"))
    return rows, kinds


def test_one_row_of_a_hundred_is_bad(tmp_path):
    """10,000 rows: as many lines, 100 errors of the right kinds."""
    rows, kinds = picture_rows(tmp_path, 10_000, 100)
    folder = open_run(tmp_path / "run", Settings("caption en"), MARKS, lambda: rows)
    finish_shards(folder, range(folder.num_shards), lambda: opening(folder.settings), lambda: False, lambda line: None)
    lines = lines_of(folder)
    assert [line["id"] for line in lines] == [row.id for row in rows]
    assert {line["id"]: line["error"]["kind"] for line in lines if line["error"]} == kinds
    assert len(kinds) == 100 and set(kinds.values()) == {"missing", "unreadable", "too_many_pixels"}
