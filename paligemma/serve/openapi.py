"""The description of the endpoints that other programs read: `/openapi.json`."""

from __future__ import annotations

from typing import Any

from paligemma import __version__
from paligemma.data.openai_chat import NEUTRAL
from paligemma.serve.native import MASKS, MOST_LABELS
from paligemma.serve.settings import Settings

Json = dict[str, Any]


def document(settings: Settings) -> Json:
    """OpenAPI 3.1 for a server with these settings."""
    secured: Json = {} if settings.api_key is None else {"security": [{"key": []}]}
    schemes: Json = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "PaliGemma", "version": __version__},
        **secured,
        "paths": paths(settings),
        "components": {"schemas": schemas(settings), **({"securitySchemes": schemes} if secured else {})},
    }


def paths(settings: Settings) -> Json:
    chat = post("Answers one user message with pictures.", "Chat", "ChatCompletion", forms=False)
    chat["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "/health": {"get": {"summary": "Whether the server can answer.", "security": [], "responses": {
            "200": reply("It can.", "Health"), "503": reply("Loading, stuck, failed or stopping.", "Health"),
        }}},
        "/metrics": {"get": {"summary": "Figures for Prometheus.", "responses": {
            "200": {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}},
        }}},
        "/v1/models": {"get": {"summary": "The one model.", "responses": {"200": reply("A list.", "Models")}}},
        "/v1/chat/completions": {"post": chat},
        "/v1/answer": {"post": post("The answer to any prompt.", "Answer", "Answered")},
        "/v1/detect": {"post": post("Boxes of what bears one of the labels.", "Detect", "Answered")},
        "/v1/segment": {"post": post("Boxes and masks.", "Detect", "Answered")},
        "/v1/explore": {"post": post("A page that looks inside the model.", "Explore", "Explored")},
    }  # fmt: skip


def post(summary: str, body: str, answer: str, forms: bool = True) -> Json:
    content = {"application/json": {"schema": ref(body)}}
    if forms:
        content["multipart/form-data"] = {"schema": ref(body)}
    errors = {
        "400": "A field is wrong.", "401": "No key.", "403": "Host or Origin.", "408": "The body came too slowly.",
        "413": "Too large.", "415": "Not the media type.", "422": "The URL gave no picture.",
        "429": "All places are taken.", "500": "The row failed.", "503": "Not now.", "504": "It took too long.",
    }  # fmt: skip
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": reply("Done.", answer), **{code: reply(why, "Error") for code, why in errors.items()}},
    }


def reply(about: str, schema: str) -> Json:
    return {"description": about, "content": {"application/json": {"schema": ref(schema)}}}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
NUMBER: Json = {"type": "number"}
WHOLE: Json = {"type": "integer"}


def record(required: list[str], **properties: Json) -> Json:
    """An object without other keys."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def listed(item: Json, **more: Any) -> Json:
    return {"type": "array", "items": item, **more}


def schemas(settings: Settings) -> Json:
    tokens = {"type": "integer", "minimum": 1, "maximum": settings.max_new_tokens}
    sampling: Json = {
        "temperature": {"type": "number", "minimum": 0, "description": "Absent or 0: the likeliest token each time."},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": WHOLE,
        "seed": {"type": "integer", "minimum": 0},
    }
    picture = {"oneOf": [TEXT, listed(TEXT)], "description": "A data: URL; in a form, the file."}
    common: Json = {"model": TEXT, "image": picture, "max_tokens": tokens, "constrained": FLAG, **sampling}
    boxes: Json = {"min_score": {"type": "number", "minimum": 0, "maximum": 1}, "masks": {"enum": list(MASKS)}}
    url = {"oneOf": [TEXT, record(["url"], url=TEXT, detail=TEXT)]}
    part = {"oneOf": [
        record(["type", "text"], type={"const": "text"}, text=TEXT),
        record(["type", "image_url"], type={"const": "image_url"}, image_url=url),
    ]}  # fmt: skip
    stream = record([], include_usage=FLAG, include_obfuscation={"enum": [False, None]})
    message = record(["role", "content"], role={"const": "user"}, content=listed(part), name=TEXT)
    # With --ignore-history only the last message is looked at, and no schema can say "the last": so it only shows what
    # that one looks like, and allows all.
    one = {"anyOf": [message, {}]} if settings.ignore_history else message
    labels = {"oneOf": [TEXT, listed(TEXT, minItems=1, maxItems=MOST_LABELS)]}
    return {
        "Chat": record(
            ["messages"], model=TEXT, messages=listed(one, minItems=1), max_tokens=tokens,
            max_completion_tokens=tokens, stream=FLAG, stream_options=stream, logprobs=FLAG,
            response_format=record(["type"], type={"enum": ["text", "json_object"]}),
            structured_outputs=record(["choice"], choice=listed(TEXT, minItems=1)), constrained=FLAG, user=TEXT,
            **sampling, **{name: {"enum": [*values, None]} for name, values in NEUTRAL.items()},
        ),
        "Answer": record(["prompt", "image"], prompt=TEXT, choices=listed(TEXT), **common, **boxes),
        "Detect": record(["image"], prompt=TEXT, labels=labels, **common, **boxes),
        "Explore": record(["prompt", "image"], prompt=TEXT, model=TEXT, image=picture),
        **answers(),
    }  # fmt: skip


def answers() -> Json:
    box = listed(NUMBER, minItems=4, maxItems=4, description="x0, y0, x1, y1 in pixels of the picture, upright")
    edges = {"type": ["array", "null"], "description": "Mean and spread in pixels of x0, y0, x1, y1."}
    item: Json = {"label": TEXT, "box": box, "score": {"type": ["number", "null"]}, "edges": edges}
    detection, segment = record(["label", "box"], **item), record(["label", "box", "mask"], **item, mask={})
    invalid = listed(record(["span", "reason"], span=listed(WHOLE), reason=TEXT))
    size = listed(WHOLE, minItems=2, maxItems=2, description="width, height")
    usage = record([], prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
    meaning: Json = {
        "image_size": size, "score": NUMBER, "finished": FLAG, "invalid": invalid, "segments": listed(segment),
        "detections": listed(detection),
    }  # fmt: skip
    timing = record([], queue=NUMBER, vision=NUMBER, prefill=NUMBER, decode=NUMBER)
    written = record(
        ["role", "content"], role=TEXT, content=TEXT, paligemma=record([], **meaning, ignored=listed(TEXT))
    )
    choice = record([], index=WHOLE, finish_reason={"enum": ["stop", "length"]}, logprobs={}, message=written)
    return {
        "ChatCompletion": record(
            [], id=TEXT, object=TEXT, created=WHOLE, model=TEXT, choices=listed(choice), usage=usage
        ),
        "Answered": record(
            [], id=TEXT, model=TEXT, image={"type": ["string", "null"]}, prompt=TEXT, text=TEXT,
            box_format={"const": "xyxy_pixels"}, usage=usage, timing_ms=timing, **meaning,
        ),
        "Explored": record(["url"], url=TEXT),
        "Health": record(["status"], status={"enum": ["ok", "loading", "stuck", "failed", "stopping"]}),
        "Models": record([], object=TEXT, data=listed({"type": "object"})),
        "Error": record(["error"], error=record(
            ["message", "type", "param", "code"], message=TEXT, type=TEXT, code=TEXT,
            param={"type": ["string", "null"]},
        )),
    }  # fmt: skip
