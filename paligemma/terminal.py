"""What may be sent to a terminal: text without control characters, and an error as one line."""

from __future__ import annotations

import errno
import importlib.metadata
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # not tab and line break


def printable(text: str) -> str:
    """Text that any terminal may be sent. Control characters, with which the name of a file or an answer could steer
    the terminal, and halves of characters, which cannot be encoded, are spelled out: "\\x1b", "\\ud83d"."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if text.isprintable() else _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def error_line(error: BaseException, doing: str = "") -> str:
    """The message of an error, without the numbers and names of Python.

    doing: what was asked for, to be named where the error itself does not say at what it happened: a full disk, too
    little memory.
    """
    text = str(error)
    vague = False
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        amount = re.search(r"[Tt]ried to allocate [\d.,]+ \w+|Unable to allocate [\d.,]+ \w+", text)
        text, vague = "not enough memory" + (f" ({amount[0]})" if amount else f": {text}" if text else ""), True
    elif isinstance(error, ModuleNotFoundError) and error.name and text.startswith("No module named"):
        text = missing_package(error.name.partition(".")[0])
    elif isinstance(error, OSError) and error.strerror and text.startswith("[Errno"):
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        vague = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
    text = text or type(error).__name__
    return printable(f"{text} ({doing})" if vague and doing else text)


def missing_package(module: str) -> str:
    """What to install where a module is missing: the extra of this package that brings it, or the package itself."""
    try:
        requirements = importlib.metadata.requires("paligemma") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        requirements = []
    for requirement in requirements:  # 'faster-coco-eval>=1.6; extra == "evaluate"'
        package = re.split(r"[^\w.-]", requirement)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if package.replace("-", "_").lower() == module.lower() and extra and extra[1] not in ("test", "dev", "docs"):
            return f"the package {module} is not installed: pip install 'paligemma[{extra[1]}]'"
    return f"the package {module} is not installed: pip install {module}"
