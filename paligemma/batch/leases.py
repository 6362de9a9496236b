"""Which process works on a shard: leases, with which machines that share nothing but a disk keep out of each other's
way.

A lease is a file that is made with O_EXCL, so that of several processes one makes it. It says who holds it, and its
holder touches it every few seconds. It is abandoned

- if it is of this machine and its process is gone (at once), or
- if it is of another machine and was not touched for two minutes. The clocks of two machines differ, so its age is the
  difference to the time of a probe file that is written to the same disk, which takes both times from one clock.

An abandoned lease stays where it is, and the next holder makes a second file beside it:

    00007.lease       the first holder, which was killed
    00007.lease.1     the second one

Whoever removed the first file instead could remove that of a new holder, who had just done the same. The number also
counts how many workers were lost on this shard, which is how a row that kills its worker is found (`shards.py`).

A lease only saves work: were two processes to hold one shard, both would write the same part.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from paligemma.files import parse_json, this_host

HEARTBEAT = 10.0  # seconds between two touches of a lease
EXPIRY = 120.0  # seconds without a touch after which a lease of another machine is abandoned


@dataclass(frozen=True)
class Holder:
    """A process, as others can look for it. started: when, in the system's own words: a pid is used again."""

    host: str
    pid: int
    started: str

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from here."""
        if self.host != this_host():
            return None
        started = start_of(self.pid)
        return None if started is None else started != self.started


def me() -> Holder:
    pid = os.getpid()
    return Holder(this_host(), pid, start_of(pid) or "")


def start_of(pid: int) -> str | None:
    """When a process of this machine was started; "" if there is none, or it has ended and nobody has taken note of it
    yet. None where the system does not say."""
    if os.path.isdir("/proc/self"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    try:
        words = ["ps", "-o", "lstart=", "-p", str(pid)]
        one = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}  # every process must read the same words
        done = subprocess.run(words, capture_output=True, text=True, env=one)
    except OSError:
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Lease:
    """A lease that this process holds. losses: how many holders before were lost."""

    path: Path
    losses: int

    def check(self) -> bool:
        """Whether it still counts. Not if another process took it for abandoned (while this machine slept, say)."""
        return self.path.exists() and not _numbered(self.path, self.losses + 1).exists()

    def release(self) -> None:
        """Gives it back. A lease that was taken over stays, since the later ones build on it."""
        if not _numbered(self.path, self.losses + 1).exists():
            self.path.unlink(missing_ok=True)


def take(path: Path, holder: Holder | None = None) -> Lease | None:
    """The lease `path` (or the first free one beside it, see above); None if another process holds it."""
    for losses in count():
        numbered = _numbered(path, losses)
        if _make(numbered, holder or me()):
            return Lease(numbered, losses)
        if not is_abandoned(numbered):
            return None
    raise AssertionError


def clear(path: Path) -> None:
    """Removes all leases of a shard that is done."""
    for found in path.parent.glob(f"{path.name}*"):
        found.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a process holds the lease."""
    return any(found.exists() and not is_abandoned(found) for found in path.parent.glob(f"{path.name}*"))


def is_abandoned(path: Path) -> bool:
    """See the head of this file. False for a lease that is gone by now: whoever wants it tries again later."""
    try:
        gone = _read(path).is_gone()
        return gone if gone is not None else time_on_disk(path.parent) - path.stat().st_mtime > EXPIRY
    except FileNotFoundError:
        return False


def time_on_disk(folder: Path) -> float:
    """The time by the clock that stamps files in this folder, which is that of the file server on a shared disk."""
    probe = folder / f".probe-{socket.gethostname()[:64]}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.write_bytes(b"?")
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


class Heartbeat:
    """Touches a lease every few seconds while its holder works.

    with Heartbeat(lease): ...
    """

    def __init__(self, lease: Lease, touch: Callable[[Path], None] = os.utime) -> None:
        self.lease, self.touch, self.ended = lease, touch, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with suppress(OSError):  # a lease that was removed is noticed by its holder, see `Lease.check`
                self.touch(self.lease.path)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()


def _numbered(path: Path, losses: int) -> Path:
    base = path.name if path.suffix == ".lease" else path.stem
    return path.with_name(f"{base}.{losses}" if losses else base)


def _make(path: Path, holder: Holder) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(holder)))
    except BaseException:  # a full disk: a lease that names nobody would wait for two minutes
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> Holder:
    """Who holds a lease. One that names nobody (its maker was killed between two instructions) has another host."""
    try:
        about = parse_json(path.read_bytes())
        return Holder(str(about["host"]), int(about["pid"]), str(about["started"]))
    except (ValueError, KeyError, TypeError):
        return Holder("", 0, "")


def unique_name() -> str:
    """A part of a file's name that no other process on any machine uses."""
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname()[:40])
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
