"""Arguments of public functions: one of a wrong type is named at once, with what was expected.

Without these checks Python would complain too, later, about whatever line happened to use the value first.
"""

from __future__ import annotations

import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def check_path(name: str, value: Any, expected: str = "the path of a folder or file") -> Path:
    """The value as a path. TypeError for anything but a string or path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {_shown(value)}, expected {expected}")
    return Path(value)


def check_number(name: str, value: Any) -> None:
    """TypeError for anything but a number; numbers of NumPy are numbers, True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {_shown(value)}, expected a number")


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether it is a whole number, of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least)


def check_whole_numbers(name: str, values: Any, expected: str = "a list of whole numbers") -> None:
    """TypeError for anything but a list, tuple, array, ... of whole numbers."""
    try:
        fine = not isinstance(values, (str, bytes)) and all(is_whole(value) for value in values)
    except TypeError:  # not to be iterated over
        fine = False
    if not fine:
        raise TypeError(f"{name} is {_shown(values)}, expected {expected}")


def check_model(model: Any) -> None:
    """TypeError for anything but a module of PyTorch; of the object that `paligemma.load` returns, the model is meant.

    Not only for PaliGemma's own class: a model may be wrapped, by peft or by FSDP.
    """
    if not hasattr(model, "state_dict"):
        hint = ": pass its `.model`" if hasattr(model, "model") else ""
        raise TypeError(f"model is {_shown(model)}, expected a PaliGemmaForConditionalGeneration{hint}")


def _shown(value: Any) -> str:
    """The value where it is short, else its type."""
    text = repr(value) if value is None or isinstance(value, (str, int, float, bool, list, tuple)) else ""
    return text if 0 < len(text) <= 60 else type(value).__name__
