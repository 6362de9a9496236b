"""OpenAI's batch format: requests in, answers out, a line of JSON each.

    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "x", "max_tokens": 64,
     "messages": [{"role": "user", "content": [{"type": "text", "text": "caption en"},
                                               {"type": "image_url", "image_url": {"url": "data:image/png;..."}}]}]}}
    -> {"id": "batch_req_...", "custom_id": "7", "response": {"status_code": 200, "request_id": "...",
        "body": {"object": "chat.completion", "created": 1,
        "choices": [{"message": {"content": "a dog", "paligemma": {...}}}]}}, "error": null}

The model sees one user message: its text parts are the prompt, its pictures the row. A field that would change the
answer and is not supported is an error that names it, never dropped. Without a temperature, or with 0, the likeliest
token is taken each time, and top_p, top_k and seed change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from paligemma.batch.rows import Line
from paligemma.data.openai_chat import NEUTRAL, is_one_of, read_message

URL = "/v1/chat/completions"
TAKEN = ("model", "messages", "user", "metadata", "store", "service_tier")
# The least and the most of each number. All are whole but the first two.
RANGES = {
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (-1, 1_000_000), "seed": (0, 2**63 - 1),
    "max_tokens": (1, 1_000_000), "max_completion_tokens": (1, 1_000_000),
}  # fmt: skip
# Besides the values that mean nothing anywhere: what asks for answers in another form, where it asks for this one.
NEUTRAL_HERE: dict[str, tuple[object, ...]] = {
    **NEUTRAL, "stream": (False,), "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
    "logprobs": (False,), "response_format": ({"type": "text"},),
}  # fmt: skip
STATUS = {"missing": 400, "unreadable": 400, "too_many_pixels": 413, "prompt_too_long": 400, "constraint": 400}


def is_request(record: Mapping[str, Any]) -> bool:
    return "custom_id" in record and isinstance(record.get("body"), Mapping)


def read_request(record: Mapping[str, Any], place: str) -> tuple[str, str, list[str], dict[str, Any]]:
    """id, prompt, pictures (data: URLs or paths) and options of a request. ValueError, naming the field and `place`."""
    body = record["body"]
    if record.get("url", URL) != URL or record.get("method", "POST") != "POST":
        raise ValueError(f"{place}: expected POST {URL}, got {record.get('method')} {record.get('url')}")
    options: dict[str, Any] = {}
    for name, value in body.items():
        if name in RANGES or name == "constrained":
            if value is not None:
                options["max_new_tokens" if name.startswith("max_") else name] = _option(value, name, place)
        elif name not in TAKEN and not (name in NEUTRAL_HERE and is_one_of(value, (None, *NEUTRAL_HERE[name]))):
            raise ValueError(f"{place}: body.{name} is {str(value)[:60]!r}, which is not supported: leave it out")
    budgets = {body.get(name) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(budgets) > 1:
        raise ValueError(f"{place}: body.max_tokens and max_completion_tokens differ: leave one of them out")
    name = record["custom_id"]
    if type(name) not in (str, int) or name == "":
        raise ValueError(f"{place}: custom_id is {repr(name)[:60]}, expected a string or a whole number")
    prompt, pictures = _message(body.get("messages"), place)
    return str(name), prompt, pictures, options


def _option(value: Any, name: str, place: str) -> Any:
    """The value of a field of generation. ValueError for one of another type or out of its range."""
    if name == "constrained":
        if not isinstance(value, bool):
            raise ValueError(f"{place}: body.constrained is {repr(value)[:60]}, expected true or false")
        return value
    least, most = RANGES[name]
    whole = name not in ("temperature", "top_p")
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value <= most or (name == "top_p" and value == 0):
        kind = "a whole number" if whole else "a number"
        span = f"above {least} and at most {most}" if name == "top_p" else f"from {least} to {most}"
        raise ValueError(f"{place}: body.{name} is {repr(value)[:60]}, expected {kind} {span}")
    return None if name == "top_k" and value < 1 else value  # 0 and -1 mean all tokens to the clients of vLLM


def _message(messages: Any, place: str) -> tuple[str, list[str]]:
    message = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
    if not isinstance(message, Mapping) or message.get("role") != "user":
        raise ValueError(
            f"{place}: expected one message with the role user: the model has no memory and no system prompt"
        )
    texts, pictures = read_message(
        message, "body.messages[0]", lambda field, said, code: ValueError(f"{place}: {said}")
    )
    return " ".join(text for text, _ in texts), [url for url, _ in pictures]


def response_line(line: Line, model: str, created: int) -> dict[str, Any]:
    """The line of a part as OpenAI's format has it. created: in seconds since 1970."""
    name = hashlib.sha256(line["id"].encode()).hexdigest()[:24]
    answer: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": line["id"], "response": None, "error": None}
    error = line["error"]
    if error is not None:
        about = {"message": error["message"], "type": "invalid_request_error", "param": None, "code": error["kind"]}
        status = STATUS.get(error["kind"], 500)
        body: dict[str, Any] = {"error": {**about, "type": "server_error" if status == 500 else about["type"]}}
    else:
        status = 200
        more = ("image_size", "score", "finished", "invalid", "segments", "detections")
        message = {"role": "assistant", "content": line["text"], "paligemma": {key: line[key] for key in more}}
        reason = "stop" if line["finished"] else "length"
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, "message": message}
        about = {"id": f"chatcmpl-{name}", "object": "chat.completion", "created": created, "model": model}
        body = {**about, "choices": [choice]}
    return {**answer, "response": {"status_code": status, "request_id": name, "body": body}}
