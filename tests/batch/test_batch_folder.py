"""The folder of a run: whatever is killed at whatever moment, every id has one line in the end."""

import errno
import json
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins import MARKS, in_batches, line_of, lines_of, quick, rows_of, run_of

from paligemma.batch import leases, shards, worker
from paligemma.batch.folder import AnotherRun, RunFolder, check_ids, open_run
from paligemma.batch.leases import Holder
from paligemma.batch.rows import InputRow, failed
from paligemma.batch.settings import Settings
from paligemma.batch.shards import reopen, reopen_failed, work_on
from paligemma.batch.status import rows_begun

answer = quick(Settings(batch_size=4))


class Killed(BaseException):
    pass


@pytest.fixture
def gone(monkeypatch):
    """Processes of a machine in the imagination: the pids in this set are gone."""
    pids = set()
    monkeypatch.setattr(Holder, "is_gone", lambda holder: holder.pid in pids)
    return pids


def ids(count):
    return [f"row {number}" for number in range(count)]


# ---------------------------------------------------------------------------------------------- the undisturbed run


def test_every_row_has_one_line_in_order(tmp_path):
    folder = run_of(tmp_path / "run", 25)
    assert [work_on(folder, shard, answer) for shard in range(3)] == [True] * 3
    assert [line["id"] for line in lines_of(folder)] == ids(25)
    assert not list(folder.work.iterdir())  # nothing is left but the parts
    assert sorted(path.name for path in folder.path.iterdir()) == ["parts", "rows.jsonl", "run.json", "work"]


def test_a_finished_part_is_the_truth(tmp_path):
    folder = run_of(tmp_path / "run", 10)
    work_on(folder, 0, answer)
    before = folder.part(0).read_bytes()
    assert work_on(folder, 0, lambda rows, stop: pytest.fail("it is answered again"))
    assert folder.part(0).read_bytes() == before


def test_the_list_is_frozen(tmp_path):
    run_of(tmp_path / "run", 3)
    again = open_run(
        tmp_path / "run",
        Settings("caption en", rows="none.jsonl", shard_size=10, batch_size=4),
        MARKS,
        lambda: pytest.fail("the rows are listed again"),
    )
    assert [row.id for row in again.rows(0)] == ids(3)


@pytest.mark.parametrize(
    ("settings", "marks", "said"),
    [
        (Settings("caption de", rows="none.jsonl", shard_size=10, batch_size=4), MARKS, "the prompt is 'caption en'"),
        (Settings("caption en", rows="none.jsonl", shard_size=9, batch_size=4), MARKS, "--shard-size is 10 there, 9"),
        (Settings("caption en", rows="none.jsonl", shard_size=10, batch_size=4), {**MARKS, "weights": "x"}, "weights"),
        (Settings("caption en", rows="none.jsonl", shard_size=10, batch_size=4), {**MARKS, "list": "x"}, "changed"),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(tmp_path, settings, marks, said):
    run_of(tmp_path / "run", 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(AnotherRun, match=said):
        open_run(tmp_path / "run", settings, marks, lambda: [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_the_name_of_the_model_does_not_count_where_its_weights_are_the_same(tmp_path):
    run_of(tmp_path / "run", 3, model="here")
    moved = Settings("caption en", rows="none.jsonl", shard_size=10, batch_size=4, model="there")
    assert open_run(tmp_path / "run", moved, MARKS, lambda: []).num_rows == 3


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """It had fewer options, and did what is now the default."""
    run_of(tmp_path / "run", 3)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    del about["options"]["dedupe"], about["options"]["loc_scale"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    same = {"rows": "none.jsonl", "shard_size": 10, "batch_size": 4}
    assert open_run(tmp_path / "run", Settings("caption en", **same), MARKS, lambda: []).num_rows == 3
    with pytest.raises(AnotherRun, match="--dedupe is off there, on here"):
        open_run(tmp_path / "run", Settings("caption en", **same, dedupe=True), MARKS, lambda: [])


def test_other_files_between_the_parts_are_none(tmp_path):
    """What somebody exported there, and copies that programs make when two machines have written."""
    folder = run_of(tmp_path / "run", 25)
    work_on(folder, 0, answer)
    for name in ("all.jsonl", "00001 (conflict).jsonl", "00001.jsonl.bak"):
        (folder.path / "parts" / name).write_text("")
    for name in ("notes.jsonl", "00001 (conflict).host.jsonl"):
        (folder.work / name).write_text("")
    assert folder.done() == {0} and rows_begun(folder) == {} and reopen_failed(folder, range(3)) == 0


def test_ids_that_are_there_twice_are_refused_before_anything_is_written(tmp_path):
    rows = [InputRow(name, None, "ocr") for name in ("a", "b", "a")]
    with pytest.raises(ValueError, match=r"one id is there more than once \(a\): .* name the folder above both"):
        open_run(tmp_path / "run", Settings(), MARKS, lambda: rows)
    assert not (tmp_path / "run").exists()


def test_hashes_of_ids_may_meet(tmp_path, monkeypatch):
    """64 bits of every id are compared first; where they agree, the ids are."""
    import hashlib

    monkeypatch.setattr(hashlib, "blake2b", lambda data, digest_size: SimpleNamespace(digest=lambda: bytes(8)))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row.to_json().encode() + b"\n" for row in rows_of(5)))
    check_ids(path)


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to answer"):
        open_run(tmp_path / "run", Settings(), MARKS, lambda: [])
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_no_place_for_a_run(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"holiday\.jpg is in it"):
        open_run(tmp_path, Settings(), MARKS, lambda: rows_of(3))
    with pytest.raises(FileExistsError, match="is a file"):
        open_run(tmp_path / "holiday.jpg", Settings(), MARKS, lambda: rows_of(3))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_two_starters_list_once(tmp_path):
    """The second one waits until the first has frozen the list."""
    begun, waits, listings, notes = threading.Event(), threading.Event(), [], []

    def listed():
        listings.append(1)
        begun.set()
        assert waits.wait(30)
        return rows_of(5)

    def note(text):
        notes.append(text)
        waits.set()

    settings = Settings("caption en")
    first = threading.Thread(target=open_run, args=(tmp_path / "run", settings, MARKS, listed))
    first.start()
    begun.wait()
    folder = open_run(tmp_path / "run", settings, MARKS, listed, note)
    first.join()
    assert folder.num_rows == 5 and len(listings) == 1 and "waiting" in notes[0]


@pytest.mark.parametrize("left", [".rows.jsonl.half", ".run.elsewhere-99-0123456789ab.json"])
def test_a_starter_that_was_killed_is_followed_by_another(left, tmp_path, gone):
    """While it listed, or while it wrote run.json. A waiter that looks at this moment does not call the folder
    another's."""
    folder = tmp_path / "run"
    folder.mkdir()
    leases.take(folder / "setup.lease", Holder("here", 99, ""))
    (folder / left).write_bytes(b'{"id": "ro')
    gone.add(99)
    assert open_run(folder, Settings("caption en"), MARKS, lambda: rows_of(5)).num_rows == 5
    assert sorted(path.name for path in folder.iterdir()) == ["parts", "rows.jsonl", "run.json", "work"]


# ---------------------------------------------------------------------------------------------- crashes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_of_crashes_gives_every_id_once(tmp_path_factory, gone, data):
    """Workers take steps in any order; each may be killed after any row, while its last line is half written, or
    between the part and the removal of its work files. Those that follow finish the run."""
    gone.clear()
    count, batch = data.draw(st.integers(1, 30)), 3
    folder = run_of(tmp_path_factory.mktemp("crash") / "run", count, shard_size=7, batch_size=batch)

    deaths = Counter()  # by the row at which a worker died

    def worker_that_dies(pid):
        """One worker that goes through all shards until it dies."""
        left = data.draw(st.integers(0, count), label="rows until death")

        def answer_row(row):
            nonlocal left
            if left == 0:
                deaths[row.id] += 1
                raise Killed
            left -= 1
            return line_of(row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "me", lambda: Holder("here", pid, ""))
            patch.setattr(leases.Lease, "release", lambda lease: None)  # the dead release nothing
            if data.draw(st.booleans(), label="dies before it tidies up"):
                patch.setattr(leases, "clear", dies)
            try:
                for shard in range(folder.num_shards):
                    if not folder.is_done(shard):
                        work_on(folder, shard, in_batches(answer_row, batch))
            except Killed:
                pass
        gone.add(pid)

    def dies(path):
        raise Killed

    for pid in range(data.draw(st.integers(0, 6), label="crashes")):
        worker_that_dies(pid)
        for path in sorted(folder.work.glob("*.jsonl"), key=lambda path: path.read_bytes()):
            if data.draw(st.booleans(), label="torn") and (content := path.read_bytes()):
                path.write_bytes(content[: -data.draw(st.integers(1, min(40, len(content))), label="bytes lost")])
    for shard in range(folder.num_shards):
        assert work_on(folder, shard, in_batches(line_of, batch))
    lines = lines_of(folder)
    assert [line["id"] for line in lines] == ids(count)
    # A row over which two workers died alone (after two others) is taken for the culprit.
    assert all(line["error"] is None or deaths[line["id"]] >= 2 for line in lines)
    assert not list(folder.work.iterdir())


def test_what_a_work_file_has_is_not_computed_again(tmp_path, gone):
    """At most one batch of a lost worker is done twice."""
    folder = run_of(tmp_path / "run", 10)
    lease = leases.take(folder.lease(0), Holder("here", 7, ""))
    with shards._work_file(folder, 0) as append:
        for row in folder.rows(0)[:4]:
            append(line_of(row))
    with next(folder.work.glob("*.jsonl")).open("ab") as file:
        file.write(b'{"id": "row 4", "text": "torn')
    gone.add(7)
    asked = []

    def answer_row(row):
        asked.append(row.id)
        return line_of(row)

    assert work_on(folder, 0, in_batches(answer_row, 4)) and lease
    assert asked == ids(10)[4:]
    assert [line["id"] for line in lines_of(folder)] == ids(10)


def test_a_line_without_its_end_is_torn_even_where_its_json_is_whole(tmp_path):
    """It would run into the next line of the part."""
    folder = run_of(tmp_path / "run", 10)
    (folder.work / "00000.lost.jsonl").write_text(json.dumps(line_of(folder.rows(0)[0])))
    assert work_on(folder, 0, answer)
    assert folder.part(0).read_bytes().count(b"\n") == 10 and [line["id"] for line in lines_of(folder)] == ids(10)


def test_a_worker_that_is_asked_to_stop_keeps_what_it_has(tmp_path):
    folder = run_of(tmp_path / "run", 10)
    seen = []
    assert not work_on(folder, 0, answer, lambda: len(seen) >= 4, seen.append)
    assert len(seen) == 4 and not list(folder.work.glob("*.lease*"))
    assert work_on(folder, 0, answer, on_line=seen.append)
    assert len(seen) == 10 and [line["id"] for line in lines_of(folder)] == ids(10)


# ---------------------------------------------------------------------------------------------- leases


def test_a_lease_of_a_living_process_keeps_others_out(tmp_path):
    folder = run_of(tmp_path / "run", 10)
    lease = leases.take(folder.lease(0))
    assert not work_on(folder, 0, answer)
    lease.release()
    assert work_on(folder, 0, answer)


def test_no_model_is_loaded_while_others_hold_all_shards(tmp_path, monkeypatch):
    folder, asked, loaded = run_of(tmp_path / "run", 20), [], []
    held = [leases.take(folder.lease(shard)) for shard in (0, 1)]

    def stop():
        asked.append(1)
        if len(asked) == 5:  # in the second round
            assert not loaded
            held[1].release()
        return len(asked) > 8

    def load():
        loaded.append(1)
        return quick(folder.settings)

    monkeypatch.setattr(worker, "PAUSE", 0)
    worker.finish_shards(folder, [0, 1], load, stop, lambda line: None)
    assert loaded == [1] and folder.done() == {1}


def test_a_lease_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path):
    here = leases.me()
    path = tmp_path / "00000.lease"
    leases.take(path, Holder(here.host, here.pid, "another time"))  # its number is used again, by this process
    assert leases.take(path).losses == 1
    assert leases.take(path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.lease", "00000.lease.1"]


def test_of_several_that_take_over_one_succeeds(tmp_path, gone):
    path = tmp_path / "00000.lease"
    leases.take(path, Holder("here", 1, ""))
    gone.add(1)
    taken = []
    threads = [
        threading.Thread(target=lambda: taken.append(leases.take(path, Holder("here", 2, "")))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in taken) == 1


def test_a_lease_of_another_machine_is_taken_over_when_it_is_not_touched(tmp_path, monkeypatch):
    """Its age is measured by the clock of the disk, which may be hours from ours."""
    path = tmp_path / "00000.lease"
    leases.take(path, Holder("far away", 1, ""))
    now = path.stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the local clock is asked"))
    monkeypatch.setattr(leases, "time_on_disk", lambda folder: now + 119)
    assert leases.take(path) is None
    monkeypatch.setattr(leases, "time_on_disk", lambda folder: now + 121)
    assert leases.take(path).losses == 1


def test_the_time_of_the_disk_is_that_of_a_probe_file(tmp_path):
    (tmp_path / "new").touch()
    assert abs(leases.time_on_disk(tmp_path) - (tmp_path / "new").stat().st_mtime) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_lease_that_names_nobody_is_like_one_of_another_machine(tmp_path):
    path = tmp_path / "00000.lease"
    path.write_bytes(b"")
    assert leases.take(path) is None
    os.utime(path, (0, 0))
    assert leases.take(path).losses == 1


def test_a_holder_that_was_taken_for_dead_gives_way(tmp_path):
    """A machine slept, and another one took over: the first writes nothing more, and takes nothing away."""
    folder = run_of(tmp_path / "run", 10)
    seen = []

    def sleeping(rows, stop):
        for row in rows:
            if row.id == "row 4":
                leases.clear(folder.lease(0))
                assert work_on(folder, 0, answer)
            yield row, line_of(row)

    assert work_on(folder, 0, sleeping, on_line=seen.append)
    assert len(seen) == 4 and [line["id"] for line in lines_of(folder)] == ids(10)


def test_heartbeats_touch_the_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT", 0.001)
    lease = leases.take(tmp_path / "00000.lease")
    touched = threading.Event()
    with leases.Heartbeat(lease, lambda path: touched.set()):
        assert touched.wait(10)


# ---------------------------------------------------------------------------------------------- rows that kill


def test_after_two_losses_rows_are_answered_one_by_one(tmp_path, gone):
    folder = run_of(tmp_path / "run", 10)
    for pid in (1, 2):
        leases.take(folder.lease(0), Holder("here", pid, ""))
        gone.add(pid)
    groups = []

    def answer_rows(rows, stop):
        groups.append(len(rows))
        yield from ((row, line_of(row)) for row in rows)

    lost = []
    assert work_on(folder, 0, answer_rows, on_lost=lost.append)
    assert groups == [1] * 10 and lost == [2]


def test_a_row_that_kills_two_workers_alone_is_an_error(tmp_path, gone):
    folder = run_of(tmp_path / "run", 10)

    def answer_row(row):
        if row.id == "row 3":
            raise Killed
        return line_of(row)

    workers = 0
    while not folder.is_done(0):
        workers += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "me", lambda pid=workers: Holder("here", pid, ""))
            patch.setattr(leases.Lease, "release", lambda lease: None)
            try:
                work_on(folder, 0, in_batches(answer_row, 4))
            except Killed:
                gone.add(workers)
    lines = lines_of(folder)
    assert [line["id"] for line in lines] == ids(10)
    assert [line["id"] for line in lines if line["error"]] == ["row 3"]
    message = "2 workers were killed while they answered this row alone"
    assert lines[3]["error"] == {"kind": "internal", "message": message}
    assert lines[3]["attempts"] == 3 and workers == 5


# ---------------------------------------------------------------------------------------------- errors, tried again


def test_rows_that_failed_are_tried_again(tmp_path):
    folder = run_of(tmp_path / "run", 10)
    assert work_on(folder, 0, in_batches(lambda row: failed(row, "missing", "gone"), 4))
    assert reopen(folder, 0) == 10 and not folder.is_done(0)
    asked = []

    def answer_row(row):
        asked.append(row.id)
        return failed(row, "missing", "gone") if row.id == "row 7" else line_of(row)

    assert work_on(folder, 0, in_batches(answer_row, 4)) and len(asked) == 10
    assert reopen(folder, 0) == 1
    assert work_on(folder, 0, in_batches(answer_row, 4)) and asked[10:] == ["row 7"]
    assert [line["attempts"] for line in lines_of(folder)] == [2] * 7 + [3] + [2] * 2
    assert work_on(folder, 0, in_batches(line_of, 4)) and reopen(folder, 0) == 1


def test_rows_that_failed_in_an_unfinished_shard_are_tried_again(tmp_path):
    """What else is known of the shard is kept: answers, attempts, and how often a row was begun alone."""
    folder = run_of(tmp_path / "run", 20)
    with shards._work_file(folder, 1) as append:
        append(line_of(folder.rows(1)[0]))
        append(failed(folder.rows(1)[1], "missing", "gone"))
        append({"again": "row 12", "attempts": 3})
        append({"trying": "row 13"})
    assert reopen_failed(folder, [1]) == 1
    left = shards.read_work(folder, 1, folder.rows(1))
    assert (
        list(left.lines) == ["row 10"] and left.attempts == {"row 11": 1, "row 12": 3} and left.tried == {"row 13": 1}
    )
    assert reopen_failed(folder, range(2)) == 0
    assert work_on(folder, 1, answer) and [line["attempts"] for line in lines_of(folder)] == [1, 2, 4, *[1] * 7]


def test_a_worker_was_killed_before_it_tidied_up_and_its_errors_are_tried_again(tmp_path):
    folder = run_of(tmp_path / "run", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(folder.path), "unlink", lambda path, missing_ok=False: None)
        assert work_on(folder, 0, in_batches(lambda row: failed(row, "missing", "gone"), 4))
    leases.clear(folder.lease(0))
    assert folder.is_done(0) and list(folder.work.glob("*.jsonl"))
    assert reopen(folder, 0) == 10 and work_on(folder, 0, answer)
    assert [line["error"] for line in lines_of(folder)] == [None] * 10


@pytest.mark.parametrize("finishes", [False, True])
def test_two_processes_try_again_at_once(tmp_path, monkeypatch, finishes):
    """Another process opens the shard, and perhaps finishes it, just before we have the lease: its answers stay."""
    folder = run_of(tmp_path / "run", 10)
    assert work_on(folder, 0, in_batches(lambda row: failed(row, "missing", "gone"), 4))
    take = leases.take

    def other_first(path):
        monkeypatch.setattr(leases, "take", take)
        assert reopen(folder, 0) == 10
        if finishes:
            assert work_on(folder, 0, answer)
        return take(path)

    monkeypatch.setattr(leases, "take", other_first)
    assert reopen(folder, 0) == 0 and folder.is_done(0) == finishes
    assert work_on(folder, 0, answer)
    assert [(line["error"], line["attempts"]) for line in lines_of(folder)] == [(None, 2)] * 10


# ---------------------------------------------------------------------------------------------- disks


def test_a_full_disk_ends_the_shard_and_keeps_what_was_written(tmp_path, monkeypatch):
    folder = run_of(tmp_path / "run", 10)
    written, write = 0, os.write

    def full(descriptor, data):
        nonlocal written
        written += 1
        if written == 6:
            return write(descriptor, data[:10])  # a part of it fits
        if written > 6:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        work_on(folder, 0, answer)
    monkeypatch.setattr(os, "write", write)
    asked = []
    assert work_on(folder, 0, answer, on_line=asked.append)
    assert [line["id"] for line in lines_of(folder)] == ids(10) and len(asked) == 5


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_nobody_may_write_to(tmp_path, monkeypatch, number):
    """The error is the system's, with the name; what lies there stays as it is."""
    folder = run_of(tmp_path / "run", 10)
    before = sorted(path.name for path in folder.path.rglob("*"))

    def refuse(path, flags, *more):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), os.fspath(path))
        return os_open(path, flags, *more)

    os_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"00000\.lease"):
        work_on(folder, 0, answer)
    assert sorted(path.name for path in folder.path.rglob("*")) == before


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    import shutil

    folder = run_of(tmp_path / "run", 10)

    def answer_row(row):
        if row.id == "row 5":
            shutil.rmtree(folder.path)
        return line_of(row)

    with pytest.raises(FileNotFoundError, match="was removed while it was written to"):
        work_on(folder, 0, in_batches(answer_row, 4))
    assert not folder.path.exists()


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"step": 7}))
    with pytest.raises(ValueError, match="is not of `paligemma batch`"):
        RunFolder(tmp_path)
