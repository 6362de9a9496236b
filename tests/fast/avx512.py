"""The kernels for AVX-512 on a CPU that has none: `kernels_avx512.cpp`, with every instruction spelled in others.

It is slow, and computes the same numbers: so the file is tested wherever SIMDe's headers are (`apt-get install
libsimde-dev`), and not only on the CPUs that it is for.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from paligemma import devices
from paligemma.fast import library
from paligemma.files import written_whole

HEADER = Path(__file__).parent / "avx512.h"
# A constraint on registers that the CPU does not have; it only keeps vectors in them.
KEEP = 'asm("" : "+v"(vector))'


@cache
def can_emulate() -> bool:
    """Whether there is a compiler, a CPU with AVX2 and SIMDe's headers."""
    if library.missing_for_kernel() is not None:
        return False
    command = [*library.compiler(), "-E", "-x", "c++", "-include", "simde/x86/avx512.h", "/dev/null"]
    return subprocess.run(command, capture_output=True).returncode == 0


def emulate(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Makes `library.py` take this CPU for one with AVX-512. set_attribute: setattr, or monkeypatch's."""
    real = library.compiled
    of_avx512 = library.SOURCES["AVX-512"]
    set_attribute(devices, "vector_instructions", lambda: "AVX-512")
    set_attribute(library, "compiled", lambda source: (emulation if source == of_avx512 else real)(source))


def emulation(_: Path) -> int:
    """The compiled library, opened; it is kept like the real ones."""
    files = [library.SOURCES["AVX-512"], *library.HEADERS]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    source, header = files[0].name, library.HEADERS[0].name
    assert KEEP in texts[source] and "#include <immintrin.h>" in texts[header]
    texts[source] = texts[source].replace(KEEP, "")
    texts[header] = texts[header].replace("#include <immintrin.h>", f'#include "{HEADER}"')
    flags = [*library.FLAGS, "-O2"]
    whole = "".join([*texts.values(), HEADER.read_text(encoding="utf-8"), library.conditions(), *flags])
    path = library.cache_folder() / f"emulated-{hashlib.sha256(whole.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        command = library.compiler()
        with written_whole(path) as beside, tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            subprocess.run([*command, *flags, "-c", f"{folder}/{source}", "-o", f"{folder}/all.o"], check=True)
            subprocess.run([*command, "-shared", f"{folder}/all.o", "-o", str(beside)], check=True)
    return os.open(path, os.O_RDONLY)
