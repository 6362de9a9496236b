"""The compiled library of kernels: found in the cache or compiled for this CPU, checked, loaded.

Nobody has to have a compiler. Without one, without a CPU of the right kind, or if anything else goes wrong, `library()`
is None, one note on stderr says why, and the layers use PyTorch's operators. PALIGEMMA_KERNEL=0 asks for just that,
PALIGEMMA_KERNEL=avx2 for the kernels of older CPUs.

PyTorch's own extension loader would do as well, but it needs ninja and setuptools at run time and half a minute for
PyTorch's headers. The library speaks plain C and includes none of them: it takes about four seconds, once per machine.

Loading a library runs its code, and a home folder may be shared by machines and people. So the file is named after what
it was compiled from (sources, flags, compiler, CPU) and after a hash of its own content. A file is loaded only if it
belongs to this user, nobody else can write it, and its content has that hash. A damaged file is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from paligemma import devices

FOLDER = Path(__file__).parent
SOURCES = {"AVX-512": FOLDER / "kernels_avx512.cpp", "AVX2": FOLDER / "kernels_avx2.cpp"}
HEADERS = [FOLDER / "kernels.h", FOLDER / "decoder_layer.h"]  # of both
REQUESTED = os.environ.get("PALIGEMMA_KERNEL") or "1"  # read once: every layer asks, and the environment is slow
# No contraction: a product and a sum are rounded each, as PyTorch does, so that results can be compared bit by bit.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fPIC", "-w"]

# The functions and what they take: pointers, floats, and whole numbers (sizes, and last the number of threads).
FUNCTIONS = {
    "linear_bf16": "pppp iiii",
    "linear_int8_bf16": "ppppp iiii",
    "linear_int8_f32": "ppppp iiii",
    "linear_int4_bf16": "pppppp iiii",
    "linear_int4_f32": "pppppp iiii",
    "look_up_bf16": "pppp iii",
    "rms_norm_bf16": "ppp f iii",
    "rotary_bf16": "ppppp iiiii",
    "attention_bf16": "pppppp ff iiiiiii",
    "decoder_layer": "pppppppppp iiii",
}
TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "i": ctypes.c_int}


def library() -> ctypes.CDLL | None:
    """The library for this CPU; None where there is none. The first call may compile it and says so on stderr."""
    return None if REQUESTED == "0" else _library(instructions())


def instructions() -> str | None:
    """Which kernels are used here, "AVX-512" or "AVX2"; None for neither."""
    best = devices.vector_instructions()
    return "AVX2" if best is not None and REQUESTED == "avx2" else best


def missing_for_kernel() -> str | None:
    """What keeps this machine from having the kernels, None if nothing does."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "they are written for Linux on x86-64"
    if instructions() is None:
        return "this CPU has neither AVX-512 with 8-bit dot products (VNNI) nor AVX2"
    if compiler() is None:
        given = os.environ.get("CXX")
        if given:
            return f"CXX is {given!r}, and there is no such command: set it to a C++ compiler, or unset it to use g++"
        return "there is no C++ compiler: install g++, or set CXX to another one"
    return None


def compiler() -> list[str] | None:
    """The command of the C++ compiler: what CXX says, with its arguments, or else the usual names. None without one."""
    given = shlex.split(os.environ.get("CXX", ""))
    for name, *arguments in [given] if given else [["g++"], ["c++"]]:
        if path := shutil.which(name):
            return [path, *arguments]
    return None


def conditions() -> str:
    """What a compiled library depends on beside its sources: flags, compiler, CPU."""
    return " ".join([*FLAGS, *(compiler() or []), *devices.cpu_flags()])


@cache
def _library(kind: str | None) -> ctypes.CDLL | None:
    if REQUESTED not in ("0", "1", "avx2"):
        print(
            f"note: PALIGEMMA_KERNEL is {REQUESTED!r}, which means nothing: 0 asks for plain PyTorch, avx2 for the "
            "kernels of older CPUs, 1 for the best there are, as without it",
            file=sys.stderr,
        )
    try:
        missing = missing_for_kernel()
        if missing is None and kind is not None:
            return load(compiled(SOURCES[kind]))
    except subprocess.CalledProcessError as error:
        missing = f"{error.cmd[0]} failed: {first_error(error.stderr)}"
    except Exception as error:  # whatever it is: PyTorch can do without, and must
        missing = str(error) or type(error).__name__
    print(f"note: linear layers run in plain PyTorch, not in compiled kernels: {missing}", file=sys.stderr)
    return None


def first_error(said: str) -> str:
    """The line of a compiler's messages that says what is wrong. Lines before it only say where."""
    lines = said.strip().splitlines() or ["no message"]
    # Of the linker's errors the first line is the one: collect2 and clang only say that there are some.
    return next((line for line in lines if "error:" in line and not line.startswith(("collect2", "clang"))), lines[0])


# ------------------------------------------------------------------------------------------------ compiling


def compiled(source: Path) -> int:
    """An open file (its descriptor) with the compiled library, from the cache if it is there.

    Raises OSError or CalledProcessError, or RuntimeError where there is no home folder.
    """
    folder = private_folder()
    sources = b"".join(file.read_bytes() for file in (*HEADERS, source))
    stem = f"{source.stem}-{_hash(sources + conditions().encode(errors='replace'))}"
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if (file := open_checked(path)) is not None:
            return file
    print("note: compiling the kernels for this CPU, once (some seconds)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        unlinked, new = Path(work) / "kernels.o", Path(work) / "kernels.so"
        command = compiler() or []
        _run(*command, *FLAGS, "-c", str(source), "-o", str(unlinked))
        # Linked without -fopenmp: the threads are then PyTorch's own. Two pools would wait for each other.
        _run(*command, "-shared", str(unlinked), "-o", str(new))
        new.chmod(0o700)
        path = folder / f"{stem}-{_hash(new.read_bytes())}.so"
        with new.open("rb") as written:
            os.fsync(written.fileno())  # before it gets its name: a power cut must not leave half of it
        new.replace(path)
    if (file := open_checked(path)) is None:
        raise OSError(f"{path} was compiled but cannot be read back: the disk may be full or broken")
    return file


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=300)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ the cache


def cache_folder() -> Path:
    """Where compiled libraries lie: beside those of PyTorch's own extensions. RuntimeError without a home folder."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given) / "paligemma"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise RuntimeError("there is no home folder to keep them in: set TORCH_EXTENSIONS_DIR to a folder") from None
    return home / "torch_extensions" / "paligemma"


def private_folder() -> Path:
    """The cache folder, made if necessary, where only this user can write. PermissionError if it is somebody else's."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise PermissionError(
            f"{folder} belongs to another user, whose code is not run: set TORCH_EXTENSIONS_DIR to a folder of yours"
        )
    if stat.S_IMODE(facts.st_mode) & 0o022:
        folder.chmod(0o700)
    return folder


def open_checked(path: Path) -> int | None:
    """The file, open for reading, if it is this user's alone and has the content that its name says; None otherwise."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    facts = os.fstat(file)
    private = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not stat.S_IMODE(facts.st_mode) & 0o022
    if private and _hash(os.pread(file, facts.st_size, 0)) == path.stem.rpartition("-")[2]:
        return file
    os.close(file)
    return None


def load(file: int) -> ctypes.CDLL:
    """The library in an open file. OSError or AttributeError if it is not one, or lacks a function.

    It is loaded through its descriptor, so that it is the very file that was checked, whatever its path means by now.
    The descriptor stays open. A trap: the system's loader recognises libraries by their path, and would take the next
    file with the same number for this one.
    """
    path = f"/proc/self/fd/{file}"
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        raise OSError(str(error).replace(path, os.readlink(path))) from None
    for name, given in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes = [TYPES[letter] for letter in given.replace(" ", "")]
        function.restype = None
    return loaded
