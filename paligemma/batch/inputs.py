"""INPUT arguments -> rows, one at a time: a million files take no more memory than the largest folder among them.

    photos/            a folder: every picture below it; id: its path relative to the folder
    a.jpg  '*.jpg'     pictures, and patterns; id: the path as it stands there
    list.txt  -        a text file with a path in each line, or stdin; id: the line
    x.tar              a tar archive (webdataset): its pictures; id: x.tar/NAME
    x.mp4              a video, with --every SECONDS: its frames; id: x.mp4/0007.500 (the second)

A list names its files relative to the folder in which the command is run, as `find` writes them. Rows keep absolute
paths, so that a run can go on from anywhere.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from paligemma.batch.rows import InputRow, Where, plain
from paligemma.files import is_junk, picture_names

TARS = (".tar",)
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
LISTS = (".txt", ".lst")


def list_inputs(
    inputs: Sequence[str],
    prompt: str,
    every: float | None = None,
    note: Callable[[str], object] = lambda text: None,
    stdin: Iterator[bytes] | None = None,
) -> Iterator[InputRow]:
    """The rows of all inputs. every: seconds between two frames of a video. note: is told what is left out. stdin:
    lines, by default those of this process.

    FileNotFoundError or ValueError, with the way out, for an input of which nothing can be read at all. A picture that
    is named and cannot be read is a row: its line will say what is wrong.
    """
    for name in inputs:
        for id, where in _places(name, every, note, stdin):
            yield InputRow(plain(id), where, prompt)


def _places(
    name: str, every: float | None, note: Callable[[str], object], stdin: Iterator[bytes] | None
) -> Iterator[tuple[str, Where]]:
    refuse_url(name)
    if name == "-":
        yield from _of_list(sys.stdin.buffer if stdin is None else stdin, "stdin", every, note)
    elif os.path.isdir(name):
        yield from _of_folder(name, every, note)
    elif glob.has_magic(name) and not os.path.lexists(name):
        found = sorted(glob.iglob(name, recursive=True))
        files = [path for path in found if not os.path.isdir(path)]
        if not files:
            way_out = ", only folders: name a folder itself, or end the pattern with /*" if found else ""
            raise FileNotFoundError(f"{name}: no file matches this pattern{way_out}")
        for path in files:
            yield from _of_file(path, every, note)
    elif name.lower().endswith(LISTS):
        with open(name, "rb") as file:
            yield from _of_list(file, name, every, note)
    else:
        yield from _of_file(name, every, note)


def _of_file(name: str, every: float | None, note: Callable[[str], object]) -> Iterator[tuple[str, Where]]:
    """One file: an archive, a video or a picture."""
    small = name.lower()
    if small.endswith(TARS):
        yield from pictures_of_tar(name, note)
    elif small.endswith(PACKED_TARS):
        raise ValueError(f"{name} is compressed, and pictures in it cannot be reached one by one: unpack it to a .tar")
    elif small.endswith(VIDEOS):
        if every is None:
            raise ValueError(f"{name} is a video: --every SECONDS says which frames are asked about")
        from paligemma.batch.videos import times_of

        path = os.path.abspath(name)
        for time in times_of(path, every):
            frame = f"{name}/{time:08.3f}"
            yield frame, {"video": path, "time": time, "name": f"{path}/{time:08.3f}"}
    else:
        yield name, os.path.abspath(name)


def _of_list(
    lines: Iterator[bytes], source: str, every: float | None, note: Callable[[str], object]
) -> Iterator[tuple[str, Where]]:
    """A path a line. Names that are no UTF-8 stay what they are."""
    for number, line in enumerate(lines, 1):
        name = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip("\r\n")
        if name.strip():
            refuse_url(name, f"{source}:{number}: ")
            yield from _of_file(name, every, note)


def _of_folder(folder: str, every: float | None, note: Callable[[str], object]) -> Iterator[tuple[str, Where]]:
    """Pictures below a folder (with `every` videos too), in the order of their paths. What is neither by its name is
    counted and told."""
    wanted, others, found = picture_names(), 0, 0
    inside, root = os.path.join(folder, ""), os.path.abspath(folder)
    for path in files_below(folder):
        small, name = path.lower(), path.removeprefix(inside)
        if small.endswith(VIDEOS) and every is not None:
            places = _of_file(path, every, note)
        elif os.path.splitext(small)[1] in wanted:
            places = iter([(path, os.path.join(root, name))])  # abspath(path), without its cost for every file
        else:
            others += 1
            continue
        found += 1
        for id, where in places:
            yield id.removeprefix(inside).replace(os.sep, "/"), where
    if not found:
        raise ValueError(f"{folder}: there is no picture in this folder")
    if others:
        note(f"note: {folder}: {others:,} files are no pictures by their names and are left out")


def files_below(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files below a folder, in order, without hidden files and folders. Links to folders are followed, but
    not in a circle. above: the folders on the way, by device and number."""
    entries = []
    with os.scandir(folder) as scan:
        for entry in scan:
            if is_junk(entry.name):
                continue
            try:
                entries.append((entry.name, entry.is_dir()))
            except OSError:  # a link that leads to itself
                entries.append((entry.name, False))
    entries.sort()
    here = os.stat(folder)
    way = above | {(here.st_dev, here.st_ino)}
    for name, is_folder in entries:
        path = os.path.join(folder, name)
        if not is_folder:
            yield path
        else:
            inner = os.stat(path)
            if (inner.st_dev, inner.st_ino) not in way:
                yield from files_below(path, way)


def pictures_of_tar(name: str, note: Callable[[str], object] = lambda text: None) -> Iterator[tuple[str, Where]]:
    """The pictures in a tar archive, by where they stand in it. Nothing is unpacked."""
    path, wanted, others = os.path.abspath(name), picture_names(), 0
    try:
        with tarfile.open(path, "r:") as archive:
            assert archive.fileobj is not None
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps what it knows of every member
                junk = any(is_junk(part) for part in PurePosixPath(member.name).parts if part != "..")
                if member.isfile() and not junk and os.path.splitext(member.name.lower())[1] in wanted:
                    inside = plain(member.name).removeprefix("./")
                    header = header_digest(archive.fileobj, member.offset_data)
                    place = {"file": path, "start": member.offset_data, "size": member.size, "header": header}
                    yield f"{name}/{inside}", {**place, "name": f"{path}/{inside}"}
                else:
                    others += not member.isdir()
            _check_end(archive, name, note)
    except tarfile.TarError as error:
        raise ValueError(f"{name} is no tar archive that can be read ({error})") from None
    if others:
        note(f"note: {name}: {others:,} files in it are no pictures by their names and are left out")


def header_digest(file: Any, start: int) -> str:
    """By what a member of a tar archive, whose bytes begin at `start`, is known again: a hash of the block before them,
    which holds its name, size and time."""
    file.seek(start - tarfile.BLOCKSIZE)
    return hashlib.blake2b(file.read(tarfile.BLOCKSIZE), digest_size=8).hexdigest()


def _check_end(archive: tarfile.TarFile, name: str, note: Callable[[str], object]) -> None:
    """TarError where the list of members ended at a damaged header, which tarfile takes for the end of the archive. The
    true end is a block of zeros."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        begin = f"at byte {archive.offset:,} it has {block[:16]!r}"
        raise tarfile.ReadError(f"{begin}..., expected the header of the next file, or zeros at the end")
    if len(block) < tarfile.BLOCKSIZE:
        note(f"note: {name} ends without the block of zeros that closes an archive: pictures may have been cut off")


def refuse_url(name: str, where: str = "") -> None:
    """ValueError for a URL, which is never fetched. (data: URLs hold their picture themselves.)"""
    if re.match(r"[A-Za-z][\w+.-]+://", name):
        raise ValueError(f"{where}{name[:200]} is a URL, and pictures are read from files: download it first")


def absolute(name: str) -> str:
    """An input as `run.json` keeps it, to know it again."""
    return name if name == "-" or "://" in name else os.path.abspath(name)


def digest_of_lists(inputs: Sequence[str], rows: str | None) -> str | None:
    """A hash of the files that list rows, and of what tar archives say is in them: they must not change while a run
    goes on. Folders may, and stdin is read once. (So of the archives in a folder or list each picture alone is checked,
    when it is opened.) None where there is no such file. ValueError for an archive that cannot be read."""
    from paligemma.batch.settings import digest_of_file

    found = []
    for name in (*inputs, *([rows] if rows else [])):
        if not os.path.isfile(name):
            continue
        if name.lower().endswith(LISTS) or name == rows:
            found.append(digest_of_file(Path(name)))
        elif name.lower().endswith(TARS):
            digest = hashlib.sha256()
            for _, where in pictures_of_tar(name):
                digest.update(repr(where).encode())
            found.append(digest.hexdigest())
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16] if found else None
