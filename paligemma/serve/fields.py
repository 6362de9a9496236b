"""The fields of a JSON object, taken one by one. What is not taken is unknown, and an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paligemma.data.openai_chat import is_one_of
from paligemma.serve.errors import invalid, shown

KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}


LONGEST_TEXTS = 100_000


def kind_of(value: object) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


class Fields:
    """null counts as absent, as in OpenAI's API. name: what errors call the object; "" for the body itself."""

    def __init__(self, values: object, name: str = "") -> None:
        self.name = name
        if not isinstance(values, dict):
            raise invalid(name or None, f"{name or 'the body'} is {kind_of(values)}, expected an object")
        self._left: dict[str, Any] = dict(values)

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def take(self, field: str) -> Any:
        return self._left.pop(field, None)

    def text(self, field: str, code: str = "invalid_value") -> str | None:
        value = self.take(field)
        return None if value is None else checked_text(value, self.path(field), code)

    def flag(self, field: str, default: bool) -> bool:
        value = self.take(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(self.path(field), f"{self.path(field)} is {shown(value)}, expected true or false")
        return value

    def whole(self, field: str, low: int, high: int) -> int | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise invalid(
                self.path(field), f"{self.path(field)} is {shown(value)}, expected a whole number from {low} to {high}"
            )
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise invalid(
                self.path(field), f"{self.path(field)} is {shown(value)}, expected a number from {low:g} to {high:g}"
            )
        return float(value)

    def one_of(self, field: str, values: Sequence[str], default: str) -> str:
        value = self.take(field)
        if value is None:
            return default
        if value not in values:
            raise invalid(self.path(field), f"{self.path(field)} is {shown(value)}, expected {', '.join(values)}")
        return str(value)

    def texts(self, field: str, most: int) -> list[str] | None:
        """A list of 1 to `most` strings that say something, which together are not longer than any prompt may be."""
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            got = f"a list of {len(value):,}" if isinstance(value, list) else kind_of(value)
            raise invalid(self.path(field), f"{self.path(field)} is {got}, expected a list of 1 to {most:,} strings")
        texts = [checked_text(text, f"{self.path(field)}[{i}]") for i, text in enumerate(value)]
        for i, text in enumerate(texts):
            if not text.strip():
                raise invalid(f"{self.path(field)}[{i}]", f"{self.path(field)}[{i}] is empty: it must say something")
        if sum(map(len, texts)) > LONGEST_TEXTS:
            raise invalid(self.path(field), f"{self.path(field)} has more than {LONGEST_TEXTS:,} characters together")
        return texts

    def neutral(self, field: str, values: Sequence[object]) -> None:
        """A field that is taken only where it changes nothing."""
        value = self.take(field)
        if value is not None and not is_one_of(value, values):
            raise invalid(
                self.path(field),
                f"{self.path(field)} is {shown(value)}, which is not offered here: leave it out",
            )

    def end(self) -> None:
        if self._left:
            first = next(iter(self._left))
            raise invalid(self.path(first)[:200], f"unknown field {shown(self.path(first))}", "unknown_field")


def checked_text(value: object, name: str, code: str = "invalid_value") -> str:
    """A string that can be encoded. JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise invalid(name, f"{name} is {kind_of(value)}, expected a string", code)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            name, f"{name} has half of a surrogate pair at position {error.start}, which is no character", code
        ) from None
    return value
