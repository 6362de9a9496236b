"""The body of `/v1/chat/completions`: OpenAI's fields, as far as they mean something for one row of PaliGemma.

PaliGemma holds no conversation: one user message is one row, its text the prompt, its pictures what the row sees.
Fields that clients send with a neutral value are taken; anything else is refused by name, never silently dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paligemma.data.openai_chat import NEUTRAL, read_message
from paligemma.serve.errors import ApiError, invalid, shown
from paligemma.serve.fields import Fields, checked_text, kind_of
from paligemma.serve.pictures import Source
from paligemma.serve.rows import Ask, Sampling, budget_for
from paligemma.serve.settings import Settings
from paligemma.tasks import asks_for_items

MOST_CHOICES = 1_000
MOST_TOP_K = 1_000_000


@dataclass(frozen=True)
class Chat:
    """A chat request, checked. ignored: what was left out of the conversation, with --ignore-history."""

    ask: Ask
    stream: bool
    include_usage: bool
    logprobs: bool
    as_json: bool
    ignored: tuple[str, ...]


def parse_chat(body: Any, settings: Settings) -> Chat:
    """ApiError that names the field for whatever is not offered."""
    fields = Fields(body)
    check_model(fields, settings)
    prompt, sources, ignored = _message(fields.take("messages"), settings)
    sampling = take_sampling(fields)
    wanted = _budget(fields, settings)
    stream = fields.flag("stream", False)
    options = fields.take("stream_options")
    include_usage = False
    if options is not None:
        inner = Fields(options, "stream_options")
        include_usage = inner.flag("include_usage", False)
        inner.neutral("include_obfuscation", (False,))
        inner.end()
        if not stream:
            raise invalid("stream_options", "stream_options is for stream: true alone")
    logprobs = fields.flag("logprobs", False)
    as_json = _as_json(fields.take("response_format"), prompt)
    choices = _choices(fields.take("structured_outputs"))
    constrained = fields.flag("constrained", True)
    fields.text("user")
    for name, values in NEUTRAL.items():
        fields.neutral(name, values)
    fields.end()
    if as_json and choices is not None:
        raise invalid("response_format", "response_format and structured_outputs exclude each other")
    if as_json and logprobs:
        raise invalid("logprobs", "logprobs are of the answer's own text, which response_format replaces: choose one")
    ask = Ask(
        prompt, sources, budget_for(prompt, wanted, settings.max_new_tokens), sampling, constrained, choices,
        params={"prompt": "messages", "labels": "messages", "choices": "structured_outputs.choice"},
    )  # fmt: skip
    return Chat(ask, stream, include_usage, logprobs, as_json, ignored)


def check_model(fields: Fields, settings: Settings) -> None:
    name = fields.text("model")
    if name is not None and name != settings.name:
        raise ApiError(404, "model_not_found", f"there is no model {shown(name)} here, only {settings.name!r}", "model")


def take_sampling(fields: Fields) -> Sampling:
    """Without a temperature, or with 0: greedy, and the other three have no effect, as in OpenAI's API."""
    temperature = fields.number("temperature", 0, 100) or 0.0
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:
        raise invalid("top_p", "top_p is 0, expected a number above 0 and at most 1 (1 keeps every token)")
    top_k = fields.whole("top_k", -1, MOST_TOP_K)  # -1 and 0 mean all tokens to the clients of vLLM
    return Sampling(temperature, top_p, top_k if top_k and top_k > 0 else None, fields.whole("seed", 0, 2**63 - 1))


def _budget(fields: Fields, settings: Settings) -> int | None:
    most = settings.max_new_tokens
    old, new = fields.whole("max_tokens", 1, most), fields.whole("max_completion_tokens", 1, most)
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens are both given, and differ")
    return old if new is None else new


def _as_json(value: Any, prompt: str) -> bool:
    if value is None:
        return False
    fields = Fields(value, "response_format")
    kind = fields.one_of("type", ("text", "json_object"), "text")
    fields.end()
    if kind == "json_object" and not asks_for_items(prompt):
        raise invalid(
            "response_format", "json_object is for detect and segment: other answers of the model are plain text"
        )
    return kind == "json_object"


def _choices(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    fields = Fields(value, "structured_outputs")
    choices = fields.texts("choice", MOST_CHOICES)
    fields.end()
    if choices is None:
        raise invalid("structured_outputs", 'structured_outputs is empty, expected {"choice": [...]}')
    return tuple(choices)


# ------------------------------------------------------------------------------------------------ messages


def _message(messages: Any, settings: Settings) -> tuple[str, tuple[Source, ...], tuple[str, ...]]:
    """(prompt, pictures, what was ignored) of the one user message."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", f"messages is {_count(messages)}, expected a list with one user message")
    ignored: tuple[str, ...] = ()
    if len(messages) > 1:
        if not settings.ignore_history:
            raise invalid(
                "messages", f"messages has {len(messages):,} messages: PaliGemma holds no conversation, so send one "
                "user message (the server's option --ignore-history drops the others)", "unsupported_messages",
            )  # fmt: skip
        ignored = tuple(f"messages[{i}]" for i in range(min(len(messages) - 1, 100)))
    texts, pictures = read_message(messages[-1], f"messages[{len(messages) - 1}]", invalid)
    prompt = " ".join(checked_text(text, place) for text, place in texts)
    if not pictures:
        raise invalid(
            "messages", "the message has no picture: add a part of the type image_url with a data: URL", "no_image"
        )
    check_count(len(pictures), settings, "messages")
    return prompt, tuple(Source(url, place) for url, place in pictures), ignored


def _count(value: object) -> str:
    return "an empty list" if value == [] else kind_of(value)


def check_count(pictures: int, settings: Settings, param: str) -> None:
    if pictures > settings.max_images:
        raise invalid(param, f"more than {settings.max_images} pictures in one request", "too_many_images")
