"""Reading JSON that somebody else wrote, writing whole, and the lock of a folder that is being written."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from paligemma import files
from paligemma.files import (
    locked,
    made_folder,
    new_folder_written_whole,
    read_json,
    read_json_value,
    staging_folder,
    write_json,
    write_texts,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="locks files as Linux does")


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe{", "can't decode"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has 5,000 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1, 2]", "holds list, expected an object"),
        (b"null", "holds NoneType, expected an object"),
    ],
)
def test_what_is_no_json_object_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 300


def test_a_json_file_larger_than_expected_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "b" * 100})
    assert read_json(path) == {"a": "b" * 100}
    with pytest.raises(ValueError, match=r"a\.json is not JSON: it has more than 50 bytes"):
        read_json(path, largest=50)


@linux
def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(ValueError, match=rf"{name} is not JSON: it is no ordinary file"):
            read_json_value(tmp_path / name)


def test_what_is_written_is_read(tmp_path):
    content = {"text": "grün\u2028", "numbers": [1, -2.5, 10**200], "nothing": None}
    write_json(tmp_path / "deep" / "a.json", content)
    assert read_json(tmp_path / "deep" / "a.json") == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


# ------------------------------------------------------------------------------------------------ libraries


class PanicException(BaseException):
    """What a panic in Rust becomes: no Exception."""


@pytest.mark.parametrize("error", [Exception("bare"), PanicException("bare"), EOFError("bare"), ValueError("bare")])
def test_whatever_a_library_raises_names_the_file(tmp_path, error):
    (tmp_path / "a.bin").write_bytes(b"")
    with (
        pytest.raises(ValueError, match=r"a\.bin is truncated or damaged \(bare\): download it again"),
        files.untrusted(tmp_path / "a.bin"),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, FileNotFoundError(2, "No such file")])
def test_what_is_not_the_files_fault_is_passed_on(tmp_path, error):
    with pytest.raises(error if isinstance(error, type) else type(error)), files.untrusted(tmp_path / "a.bin"):
        raise error


# ------------------------------------------------------------------------------------------------ whole


def test_files_that_belong_together_take_their_places_together(tmp_path):
    write_texts(tmp_path, {"a.txt": "old", "b.txt": "old"})
    with pytest.raises(TypeError):
        write_texts(tmp_path, {"a.txt": "new", "b.txt": None})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old", "b.txt": "old"}


def test_a_folder_that_is_made_and_not_used_is_removed_again(tmp_path):
    (tmp_path / "old").mkdir()
    with made_folder(tmp_path / "new" / "inner"):
        assert (tmp_path / "new" / "inner").is_dir()
    with made_folder(tmp_path / "old"):  # was there before
        pass
    with pytest.raises(KeyError), made_folder(tmp_path / "used" / "inner"):
        (tmp_path / "used" / "a.txt").write_text("a")
        raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "old", "used"]
    with (
        pytest.raises(FileExistsError, match=r"a\.txt is a file, expected a folder"),
        made_folder(tmp_path / "used" / "a.txt"),
    ):
        pass
    with pytest.raises(NotADirectoryError), made_folder(tmp_path / "used" / "a.txt" / "inner"):
        pass
    assert (tmp_path / "used" / "a.txt").read_text() == "a"


def test_a_staging_folder_leaves_nothing(tmp_path):
    with pytest.raises(OSError), staging_folder(tmp_path / "new") as staging:
        (staging / "half").write_text("half")
        raise OSError("full")
    assert not (tmp_path / "new").exists()


def test_two_threads_write_to_one_folder_one_after_the_other(tmp_path):
    def save():
        with staging_folder(tmp_path / "out") as staging:
            (staging / "second").write_text("")
            (staging / "second").rename(tmp_path / "out" / "second")

    second = threading.Thread(target=save)
    with staging_folder(tmp_path / "out") as staging:
        (staging / "first").write_text("")
        second.start()
        second.join(0.2)  # it waits, and removes nothing meanwhile
        (staging / "first").rename(tmp_path / "out" / "first")
        assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["first"]
    second.join()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "second"]


@linux
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = """
    import os, signal, sys
    from pathlib import Path
    from paligemma.files import staging_folder
    with staging_folder(Path(sys.argv[1])) as staging:
        (staging / "model.safetensors").write_text("x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "out"])
    assert done.returncode == -9 and len(list((tmp_path / "out").iterdir())) == 2  # the folder and the lock
    with staging_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("")
        assert len(list((tmp_path / "out").glob(".saving-*"))) == 1
    assert list((tmp_path / "out").iterdir()) == []


@linux
def test_of_killed_processes_nothing_is_left_for_long(tmp_path, monkeypatch):
    """What another machine writes is left alone: its process numbers mean nothing here."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here, elsewhere = files._mark(int(dead.stdout)), "paligemma-0123456789ab-1"
    for name in (
        f".a.{here}-x.json",
        f".b.{elsewhere}-x.json",
        f".c.{elsewhere}-x.json",
        f".d.{files._mark(1)}-x.json",
    ):
        (tmp_path / name).write_text("half")
    (tmp_path / f".out-{here}-x").mkdir()
    os.utime(tmp_path / f".c.{elsewhere}-x.json", (0, 0))
    (tmp_path / ".f-202411241230-1").mkdir()  # somebody's own: 12 digits are a time as well
    os.utime(tmp_path / ".f-202411241230-1", (0, 0))
    files.write_text(tmp_path / "new.txt", "whole")
    assert [path.name[:3] for path in sorted(tmp_path.iterdir())] == [".b.", ".d.", ".f-", "new"]


@linux
def test_what_may_not_be_removed_does_not_matter(tmp_path, monkeypatch):
    """In a folder that is shared, as /tmp is."""

    def forbidden(path, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    (tmp_path / ".a.paligemma-0123456789ab-1-x.json").write_text("half")
    os.utime(tmp_path / ".a.paligemma-0123456789ab-1-x.json", (0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", forbidden)
        files._remove_left_behind(tmp_path)
    files.write_text(tmp_path / "new.txt", "whole")
    assert (tmp_path / "new.txt").read_text() == "whole"


# ------------------------------------------------------------------------------------------------ new folders


def test_an_empty_folder_is_filled_and_stays(tmp_path, monkeypatch):
    """It may be the current one, a disk of its own, or what a link leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    before = (tmp_path / "real").stat().st_ino
    (tmp_path / "real" / ".new-paligemma-0123456789ab-1-x").mkdir()  # left by a killed process of another machine
    monkeypatch.chdir(tmp_path / "real")
    for name, written in ((".", "a"), (tmp_path / "link", "b")):
        with new_folder_written_whole(Path(name)) as beside:
            (beside / written).mkdir()
            assert not (tmp_path / "real" / written).exists()
        (tmp_path / "real" / written).rmdir()
    assert (tmp_path / "real").stat().st_ino == before and (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_filled_whole_or_not_at_all(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    (out / "lost+found").mkdir(parents=True)  # of a disk

    def full(source, target):
        if Path(target).name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        with pytest.raises(OSError, match="No space left"), new_folder_written_whole(out) as inside:
            for name in "abc":
                (inside / name).write_text("")
    assert [path.name for path in out.iterdir()] == ["lost+found"]
    with new_folder_written_whole(out) as inside:
        (inside / "a").write_text("")
        assert holder_of(out) == "writing it anew"  # nobody else fills it meanwhile
    assert sorted(path.name for path in out.iterdir()) == ["a", "lost+found"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".mine-202411241230-1").mkdir()
    there = pytest.raises(FileExistsError, match="full exists and is not an empty folder")
    with there, new_folder_written_whole(tmp_path / "full"):
        pass
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".mine-202411241230-1"]


def holder_of(folder):
    return json.loads((folder / files.LOCK).read_text())["doing"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), new_folder_written_whole(tmp_path / "a" / "out") as beside:
        (beside / "half").write_text("")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_folder_written_whole(tmp_path / "a" / "out") as beside:
        (beside / "file").write_text("")
    assert [path.name for path in (tmp_path / "a" / "out").iterdir()] == ["file"]
    there = pytest.raises(FileExistsError, match="out exists and is not an empty folder")
    with there, new_folder_written_whole(tmp_path / "a" / "out"):
        pass


# ------------------------------------------------------------------------------------------------ locks

HOLD = """
import sys
from pathlib import Path
from paligemma import files
files.HEARTBEAT = 0.01
if sys.argv[2] == "without flock":
    files._flock = lambda descriptor: None
with files.locked(Path(sys.argv[1]), "paligemma train"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(folder, flock="with flock"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, flock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@linux
@pytest.mark.parametrize("flock", ["with flock", "without flock"])
def test_a_folder_that_another_process_writes(tmp_path, flock, monkeypatch):
    """Also where files cannot be locked: there the holder's signs of life are seen."""
    if flock == "without flock":
        monkeypatch.setattr(files, "_flock", lambda descriptor: None)
    process = holder(tmp_path, flock)
    with pytest.raises(BlockingIOError) as error, locked(tmp_path, "paligemma train"):
        pass
    assert f"{tmp_path} is being written by another process (paligemma train, process {process.pid} on" in str(
        error.value
    )
    process.communicate("\n")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, "paligemma train"):
        pass


@linux
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / files.LOCK).exists()
    with locked(tmp_path, "paligemma train"):
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_holds_while_it_shows_life(tmp_path, monkeypatch):
    """There `flock` may tell nothing, as on a disk that is shared without it."""
    (tmp_path / files.LOCK).write_text(
        '{"doing": "paligemma train", "pid": 7, "host": "node-3", "machine": "x", "since": "noon"}'
    )
    life = iter(range(100))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: os.utime(tmp_path / files.LOCK, (9, next(life))))
    with (
        pytest.raises(BlockingIOError, match=r"paligemma train, process 7 on node-3, since noon"),
        locked(tmp_path, "paligemma evaluate"),
    ):
        pass
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)  # no sign of life any more
    with locked(tmp_path, "paligemma evaluate"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_stops_waiting_for_a_lock_leaves_it(tmp_path, monkeypatch):
    """Ctrl-C, while it is watched for signs of life of its holder."""
    about = '{"doing": "paligemma train", "pid": 7, "host": "node-3", "machine": "x", "since": "noon"}'
    (tmp_path / files.LOCK).write_text(about)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, "paligemma evaluate"):
        pass
    assert (tmp_path / files.LOCK).read_text() == about


def test_a_lock_that_cannot_be_written_is_removed(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OSError, match="No space left on device"), locked(tmp_path, "paligemma evaluate"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_may_be_taken_again_by_its_process(tmp_path):
    with locked(tmp_path, "paligemma train"):
        with locked(tmp_path, "saving"):
            pass
        assert (tmp_path / files.LOCK).exists()
    assert not (tmp_path / files.LOCK).exists()


@linux
def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / files.LOCK).symlink_to("mine.txt")
    with pytest.raises(OSError), locked(tmp_path, "paligemma train"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_two_writers_of_one_file_never_share_their_temporary_name(tmp_path):
    """Not even on a shared disk, where processes of two machines may have the same number."""
    with files.written_whole(tmp_path / "a.json") as one, files.written_whole(tmp_path / "a.json") as two:
        assert one != two and one.suffix == two.suffix == ".json"
        one.write_text("1")
        two.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
