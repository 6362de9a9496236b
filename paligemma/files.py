"""Files that somebody else wrote, and that other processes may read: damage, JSON, whole files, locks.

- *Files of somebody else*: whatever stands in one, the result is a value or one ValueError that names the file, in
  `untrusted` for what a library reads and in `read_json` for JSON.
- *Writing whole*: a file or folder is written beside its place and renamed at the end, so that nobody ever sees half
  of one, and an error (a full disk, Ctrl-C) leaves what was there before.
- *Locking a folder* while it is written, with a message that says who writes it.
- Beside these, what files of pictures are called, and how large they may be (`images.py` opens them).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# The most pixels that a picture may have by its header, where no other limit is given. Decoding them takes .85 GB; a
# file of 12 KB can hold as many. See `images.load_image`.
MAX_PIXELS = 100_000_000


def is_data_url(name: str) -> bool:
    """Whether the name of a picture is the picture itself: "data:image/png;base64,..."."""
    return name[:5].lower() == "data:"


def picture_names() -> set[str]:
    """Endings of names that pictures have, in lower case: what Pillow opens, without documents and videos, and HEIC,
    which `images.load_image` reads with pillow-heif."""
    from PIL import Image

    return {*Image.registered_extensions(), ".heic", ".heif"} - {".mpg", ".mpeg", ".pdf", ".eps", ".ps"}


def is_junk(name: str) -> bool:
    """Whether a file or folder is one that programs leave behind unasked: `.ipynb_checkpoints`, macOS's `._1.jpg`."""
    return name.startswith(".") or name == "__MACOSX"


# ------------------------------------------------------------------------------------------------ damage


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """One ValueError, `what: reason`, in place of whatever a library raises at data that are broken or hostile.

    Libraries have errors of their own, bare Exceptions and, where their code in Rust panics, a PanicException that is
    no Exception at all. A ValueError, what the system says (OSError), MemoryError and Ctrl-C are passed on.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # without a number it is bz2's word for a damaged stream
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C and the like
        raise ValueError(f"{what}: {str(error)[:300] or type(error).__name__}") from None


@contextmanager
def untrusted(path: Path) -> Iterator[None]:
    """Around a library that reads `path`: whatever is wrong with the file is one ValueError that names it."""
    try:
        with library_errors("damaged"):
            yield
    except ValueError as error:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
                ) from None
        reason = str(error).removeprefix("damaged: ")
        raise ValueError(f"{path} is truncated or damaged ({reason}): download it again") from None


# ------------------------------------------------------------------------------------------------ reading JSON

# Larger than any settings file or index; the tokenizer of Gemma, the largest JSON file of a checkpoint, has 35 MB.
LARGEST_JSON = 2**26


def read_json(path: Path, largest: int = LARGEST_JSON, any_number: bool = False) -> dict[str, Any]:
    """The object in a JSON file. See `read_json_value`; ValueError also for any other value."""
    value = read_json_value(path, largest, any_number)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def read_json_value(path: Path, largest: int = LARGEST_JSON, any_number: bool = False) -> Any:
    """The value in a JSON file of at most `largest` bytes.

    Raises ValueError, naming the file, for all that `parse_json` refuses and for what is no ordinary file (a pipe or
    a device could be read for ever); OSError where it cannot be opened.
    """
    try:
        return parse_json(read_bytes(path, largest), any_number)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of an ordinary file. ValueError for a pipe, a device, or more than `largest` bytes."""
    if path.exists() and not path.is_dir() and not path.is_file():  # before opening it: a pipe waits for its writer
        raise ValueError("it is no ordinary file")
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no ordinary file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content


def parse_json(text: str | bytes, any_number: bool = False) -> Any:
    """The value that JSON text stands for. ValueError for anything else, whatever it is.

    Stricter than Python's own reader, which takes NaN, Infinity and numbers that no float can hold, and which answers
    text that is nested too deeply by RecursionError. any_number: numbers are as Python's reader takes them, for a
    caller that checks them and can name the setting.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if any_number:
            return json.loads(text)
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError(f"{error}: it is nested too deeply") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _whole(digits: str) -> int:
    if len(digits) > 300:  # a float holds 308 digits, and a whole number may become one
        raise ValueError(f"the number {digits[:20]}... has {len(digits):,} digits")
    return int(digits)


# ------------------------------------------------------------------------------------------------ writing whole


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file that lies there at the end takes the place of `path`.

    After an error nothing is left of it, and an old file is as it was; what a killed process left in the folder is
    removed. Parent folders are made. A full disk is named with `path`. The temporary name has the suffix of `path`,
    since some writers choose their format by it, and is random, since a disk may be shared by several machines.

        with written_whole(path) as beside:
            beside.write_text(text)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path.parent)
    beside = path.with_name(f".{path.stem[:40]}.{_mark(os.getpid())}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with named_in_errors(path):
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Python names the file that cannot be opened, and not the one that cannot be written to, on a full disk: this
    does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def append_text(path: Path, text: str) -> None:
    """Adds lines to a text file in UTF-8. Killed in the middle, it may leave a part of them."""
    with named_in_errors(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _mark(pid: int | str) -> str:
    """What temporary names have in them, so that others see whose they are."""
    return f"paligemma-{hashlib.sha256(this_host().encode()).hexdigest()[:12]}-{pid}"


@cache
def this_host() -> str:
    """A name for this machine since it was started, and for its process numbers: containers count their own."""
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


_tidied: set[Path] = set()


_TEMPORARY = re.compile(r"\..+[.-](paligemma-[0-9a-f]{12}-)(\d+)([.-].*)?")  # a name with a mark
_DAY = 86_400  # seconds


def _remove_left_behind(folder: Path) -> None:
    """Removes what killed processes left in a folder. Once is enough, since it may be a large one.

    Of another machine, and of this one before it was started anew, nobody knows what still runs: such a file is
    removed a day after it was written to.
    """
    if folder in _tidied:
        return
    _tidied.add(folder)
    for path in folder.iterdir():
        if not (found := _TEMPORARY.fullmatch(path.name)):
            continue
        with suppress(OSError):  # it may be somebody else's
            is_known = found[1] == _mark("") and os.name != "nt"  # on Windows signal 0 is Ctrl-C
            if not (_runs(int(found[2])) if is_known else time.time() - path.stat().st_mtime < _DAY):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Writes text files by their names. Old ones are replaced only when all of the new ones are complete."""
    with ExitStack() as stack:
        for name, text in files.items():
            stack.enter_context(written_whole(folder / name)).write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file for people and machines, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents, if need be, and removes again those of them in which nothing came to lie.
    FileExistsError for a file."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to write to")
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in new:
            with suppress(OSError):  # it is not empty
                one.rmdir()


@contextmanager
def new_folder_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end. FileExistsError if that exists and is not empty.

    An empty one stays, locked meanwhile, and what was written is moved into it at the end: it may be the current
    folder, or a disk of its own.
    """
    if folder.is_dir():
        with locked(folder, "writing it anew"), _filled(folder) as beside:
            yield beside
        return
    if folder.exists():
        raise FileExistsError(f"{folder} is a file, expected a new folder: choose another")
    with made_folder(folder.parent):
        _remove_left_behind(folder.parent)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-{_mark(os.getpid())}-", dir=folder.parent))
        try:
            yield beside
            beside.chmod(0o755)  # mkdtemp makes it private
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A folder inside an empty one, from which all is moved up at the end."""
    # A disk of its own has a folder "lost+found".
    if any(path.name not in (LOCK, "lost+found") and not _TEMPORARY.fullmatch(path.name) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    _remove_left_behind(folder)
    inside = Path(tempfile.mkdtemp(prefix=f".new-{_mark(os.getpid())}-", dir=folder))
    moved: list[str] = []
    try:
        yield inside
        for name in sorted(path.name for path in inside.iterdir()):
            moved.append(name)
            os.rename(inside / name, folder / name)
    except BaseException:
        for name in moved:
            with suppress(OSError):
                os.rename(folder / name, inside / name)
        raise
    finally:
        shutil.rmtree(inside, ignore_errors=True)


_writing: dict[str, threading.RLock] = {}  # by folder: `locked` holds other processes off, and no threads of this one


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder`, on the same disk: write there, then move the files up. It is removed at the end.

    `folder` is made if need be, and removed again if nothing came to lie in it. It is locked meanwhile, so what is
    left there of a process that was killed belongs to nobody, and is removed first. Another thread of this process
    that writes there is waited for.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to write to")
    one_thread = _writing.setdefault(str(folder.resolve()), threading.RLock())
    with one_thread, made_folder(folder), locked(folder, "saving a model"):
        for left in folder.glob(".saving-*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ locking a folder

LOCK = ".paligemma-lock"
HEARTBEAT = 5.0  # seconds between two signs of life of the process that holds a lock


@dataclass
class _Held:
    """A lock of this process: its open file, and how many times it was taken."""

    descriptor: int
    count: int = 1
    released: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Holds `folder` for this process alone. BlockingIOError, saying who holds it, if another process does.

    doing: what that message calls the holder, such as "paligemma train". A process may take a lock again that it
    holds. The lock of a process that is killed is free.

    The lock is `flock` on a file in the folder, which also says who holds it. Some shared disks have no `flock`, or
    have it within one machine only. So the holder also touches the file every few seconds, and whoever finds a lock
    that `flock` says nothing about watches it for three of these intervals, to see whether its holder is alive.
    """
    place = folder.resolve() / LOCK
    if place in _held:
        _held[place].count += 1
    else:
        _held[place] = _take(place, doing)
    held = _held[place]
    try:
        yield
    finally:
        held.count -= 1
        if not held.count:
            del _held[place]
            held.released.set()
            _release(held.descriptor, place)


def _release(descriptor: int, place: Path) -> None:
    if os.name == "nt":  # an open file cannot be removed
        os.close(descriptor)
        with suppress(OSError):
            place.unlink()
        return
    place.unlink(missing_ok=True)  # before it is released: nobody else may hold a file that is removed
    os.close(descriptor)


def _take(place: Path, doing: str) -> _Held:
    while True:
        descriptor, is_new = _open_lock(place)
        ours = False
        try:
            free = _flock(descriptor)
            holder = _holder(descriptor)
            surely_dead = free and (is_new or not holder or holder.get("machine") == _machine())
            if free is False or (not is_new and not surely_dead and _is_alive(place)):
                raise BlockingIOError(
                    f"{place.parent} is being written by another process ({_in_words(holder)}): wait until it has "
                    "ended, or choose another folder"
                )
            if not _is_still(descriptor, place):  # its holder removed it after we had opened it
                os.close(descriptor)
                continue
            ours = True
            about = {"doing": doing, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
            about["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
            with named_in_errors(place.parent):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(about).encode())
        except BaseException:
            with suppress(OSError):
                if ours:  # a full disk, say, keeps us from writing that it is ours
                    _release(descriptor, place)
                else:
                    os.close(descriptor)
            raise
        held = _Held(descriptor)
        threading.Thread(target=_show_life, args=(held, place), daemon=True).start()
        return held


def _open_lock(place: Path) -> tuple[int, bool]:
    """The open file of a lock, and whether it was made here and now. A link in its place is not followed."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    with suppress(FileExistsError):
        return os.open(place, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    return os.open(place, flags | os.O_CREAT, 0o666), False


def _flock(descriptor: int) -> bool | None:
    """True if the lock is ours now, False if another process has it, None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        about = parse_json(os.read(descriptor, 4096))
    except ValueError:
        about = None
    os.lseek(descriptor, 0, os.SEEK_SET)
    return about if isinstance(about, dict) else {}


def _in_words(holder: dict[str, Any]) -> str:
    doing, pid, host, since = (
        "".join(letter for letter in str(holder.get(key, "?"))[:80] if letter.isprintable())
        for key in ("doing", "pid", "host", "since")
    )
    return f"{doing}, process {pid} on {host}, since {since}"


def _is_alive(place: Path) -> bool:
    """Whether the holder of a lock touches it. No clocks are compared: those of two machines may differ."""
    with suppress(FileNotFoundError):
        before = place.stat().st_mtime_ns
        for _ in range(30):
            time.sleep(HEARTBEAT / 10)
            if place.stat().st_mtime_ns != before:
                return True
    return False


def _show_life(held: _Held, place: Path) -> None:
    while not held.released.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(place)


def _is_still(descriptor: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _machine() -> str:
    """A name for this machine since it was started; containers on it share the name, as they share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{sys.platform}-{socket.gethostname()}"
