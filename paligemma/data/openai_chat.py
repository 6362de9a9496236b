"""OpenAI's body of a chat request, as far as the server and batch files read it alike: the values that mean nothing for
one row of PaliGemma, and the one message that is its prompt and its pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

# Makes the error for a field: its place ("messages[0].content"), what is wrong with it, a code.
Refuse: TypeAlias = Callable[[str, str, str], Exception]
Placed: TypeAlias = tuple[str, str]  # a text and its place

# What clients send without meaning anything by it, besides null, which counts as absent.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "stop": ("", []),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "metadata": ({},),
    "store": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_logprobs": (0,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}


def is_one_of(value: object, values: Sequence[object]) -> bool:
    """For Python true is 1 and false is 0; in JSON they are not."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def read_message(message: Any, place: str, refuse: Refuse) -> tuple[list[Placed], list[Placed]]:
    """The texts of a user message, and the URLs (or paths) of its pictures. Raises what `refuse` makes."""
    _check_object(message, place, refuse)
    role, content, at = message.get("role"), message.get("content"), f"{place}.content"
    if role != "user":
        said = f"is {_shown(role)}: PaliGemma answers one message of the role user"
        raise refuse(f"{place}.role", f"{place}.role {said}", "unsupported_messages")
    _check_keys(message, place, ("role", "content", "name"), refuse)
    if message.get("name") is not None:
        _text(message["name"], f"{place}.name", refuse)
    if isinstance(content, str):
        return [(content, at)], []
    if not isinstance(content, list):
        said = f"{at} is {_shown(content)}, expected a string or a list of parts"
        raise refuse(at, said, "invalid_value")
    texts, pictures = [], []
    for i, part in enumerate(content):
        here = f"{at}[{i}]"
        _check_object(part, here, refuse)
        kind = part.get("type")
        if kind not in ("text", "image_url"):
            said = f"{here}.type is {_shown(kind)}, expected text or image_url"
            raise refuse(f"{here}.type", said, "invalid_value")
        _check_keys(part, here, ("type", kind), refuse)
        if kind == "text":
            texts.append(_text(part.get("text"), f"{here}.text", refuse))
        else:
            pictures.append(_picture(part.get("image_url"), f"{here}.image_url", refuse))
    return texts, pictures


def _picture(value: Any, place: str, refuse: Refuse) -> Placed:
    if isinstance(value, str):  # as some clients write it
        return value, place
    _check_object(value, place, refuse)
    _check_keys(value, place, ("url", "detail"), refuse)
    if not is_one_of(value.get("detail"), (None, "auto", "low", "high")):  # the model has one resolution
        said = f"{place}.detail is {_shown(value['detail'])}, expected auto, low or high"
        raise refuse(f"{place}.detail", said, "invalid_value")
    return _text(value.get("url"), f"{place}.url", refuse)


def _text(value: Any, place: str, refuse: Refuse) -> Placed:
    if not isinstance(value, str):
        raise refuse(place, f"{place} is {_shown(value)}, expected a string", "invalid_value")
    return value, place


def _check_object(value: Any, place: str, refuse: Refuse) -> None:
    if not isinstance(value, Mapping):
        raise refuse(place, f"{place} is {_shown(value)}, expected an object", "invalid_value")


def _check_keys(value: Mapping[str, Any], place: str, known: Sequence[str], refuse: Refuse) -> None:
    for name in value:
        if name not in known:
            raise refuse(f"{place}.{name}"[:200], f"unknown field {f'{place}.{name}'[:200]!r}", "unknown_field")


def _shown(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
