"""What becomes of memory that was freed: for training on a CPU, and for a server.

glibc, the C library of most Linux systems, keeps freed blocks of up to 32 MB for itself, until there are many at the
end of its memory. Where layers are large, it is better to give them back. Those of a training step come in so many
sizes that holes are left between them: a run whose tensors need 0.59 GB held 1.15 GB. Told to ask the system for every
block of a megabyte or more, it holds 0.63 GB, for no time that could be measured. A server whose threads decode
pictures of 40 million pixels one after another held 760 MB for them; told so for blocks of 8 MB, 330.

Where layers are small, it is better to keep all of them. By chance of their order in memory, glibc may give back
a hundred megabytes in every step, which the next step gets again and has to clear: 20,000 to 60,000 pages and 6 to 19%
of the time of a step of the embedded model, with the same peak of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h
DEFAULT_TRIM = 128 * 2**10  # bytes at the end of its memory from which on glibc gives them back
LARGEST_BLOCK = 32 * 2**20  # larger ones always come from the system and go back to it
MOST = 2**31 - 1  # bytes, the largest number that fits into an int


def give_back_freed_memory(least: int = 2**20) -> None:
    """From now on, of this process's freed blocks those of `least` bytes or more go back at once. Without glibc this
    does nothing."""
    _mallopt(M_MMAP_THRESHOLD, least)
    _mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM)


def keep_freed_memory() -> None:
    """From now on this process keeps up to 2 GB of freed blocks of up to 32 MB. Without glibc this does nothing."""
    _mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    _mallopt(M_TRIM_THRESHOLD, MOST)


def _mallopt(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).mallopt(parameter, value)
