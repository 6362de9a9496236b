"""Answers -> JSON: OpenAI's form for chat, ours for the native endpoints, and the chunks of a stream.

Boxes are `[x0, y0, x1, y1]` in pixels of the picture as it was sent (upright), not rounded. Masks are made one at a
time: 22 of them at 40 million pixels would take 900 MB together.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from paligemma.answers.formats import outline, rle_encode, to_dicts
from paligemma.answers.mask_codec import paste
from paligemma.answers.results import Answer, Detection, Segment
from paligemma.inference import PaliGemma
from paligemma.serve.chat import Chat
from paligemma.serve.engine_thread import Job
from paligemma.serve.errors import json_bytes
from paligemma.serve.native import Native
from paligemma.tokenizer import Tokenizer, start_of_last_character


def answer_of(pg: PaliGemma, job: Job) -> Answer:
    """The answer of a job that has ended, its segments without masks (see the head of this file)."""
    assert job.result is not None
    return pg.to_answer(job.result, job.row.image_size)


def usage(job: Job) -> dict[str, int]:
    """The prompt counts the places of pictures, the answer its eos."""
    assert job.result is not None
    prompt, completion = len(job.row.ids), len(job.result.token_ids) + job.result.finished
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# ------------------------------------------------------------------------------------------------ boxes and masks


def items(
    pg: PaliGemma,
    found: Sequence[Detection | Segment],
    size: tuple[int, int],
    masks: str = "rle",
    edges: bool = False,
) -> list[dict[str, Any]]:
    """The dicts of `to_dicts`; of segments `mask` in the form asked for. edges: mean and spread of each edge."""
    rows = to_dicts(found)
    for row, item in zip(rows, found):
        if isinstance(item, Segment):
            row["mask"] = None if masks == "none" else _mask(pg, item, size, masks)
        if edges:
            row["edges"] = None if item.edges is None else item.edges.tolist()
    return rows


def _mask(pg: PaliGemma, item: Segment, size: tuple[int, int], form: str) -> Any:
    """Run lengths, a PNG as a data: URL, or the outline of the largest part; None where there is no codec for it."""
    codec = pg.loaded_codec
    if codec is None or item.codes is None or max(item.codes) >= codec.num_codes:
        return None
    with torch.inference_mode():
        (decoded,) = codec.decode(torch.tensor([item.codes])).float().cpu().numpy()  # [64, 64]
    mask = paste(decoded, item.box, size)  # bool [H, W]
    if form == "rle":
        return rle_encode(mask)
    if form == "polygon":
        return outline(mask).tolist()
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def invalid_parts(answer: Answer) -> list[dict[str, Any]]:
    return [{"span": list(span), "reason": reason} for span, reason in answer.invalid]


# ------------------------------------------------------------------------------------------------ chat


def details(pg: PaliGemma, job: Job, chat: Chat) -> tuple[dict[str, Any], Answer]:
    """`message.paligemma`: what the text means."""
    answer, size = answer_of(pg, job), job.row.image_size
    about: dict[str, Any] = {
        "image_size": list(size),
        "score": answer.score,
        "finished": answer.finished,
        "invalid": invalid_parts(answer),
        "segments": items(pg, answer.segments, size),
        "detections": items(pg, answer.detections, size),
    }
    if chat.ignored:
        about["ignored"] = list(chat.ignored)
    return about, answer


def items_as_text(about: dict[str, Any]) -> str:
    """The content of an answer with `response_format: json_object`."""
    return json_bytes({"detections": about["detections"], "segments": about["segments"]}).decode()


def logprobs(tokenizer: Tokenizer, ids: list[int], values: list[float]) -> dict[str, Any]:
    tokens = [tokenizer.decode([id]) for id in ids]
    return {
        "content": [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(tokens, values)
        ],
        "refusal": None,
    }


def completion(pg: PaliGemma, name: str, id: str, job: Job, chat: Chat) -> bytes:
    """The whole reply to a chat request. Runs in a worker: masks take time."""
    about, answer = details(pg, job, chat)
    content = items_as_text(about) if chat.as_json else answer.text
    logs = logprobs(pg.processor.tokenizer, answer.token_ids, answer.token_logprobs) if chat.logprobs else None
    choice = {
        "index": 0,
        "finish_reason": finish_reason(answer),
        "logprobs": logs,
        "message": {"role": "assistant", "content": content, "paligemma": about},
    }
    return json_bytes({**head("chat.completion", id, name), "choices": [choice], "usage": usage(job)})


def finish_reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def head(object: str, id: str, name: str) -> dict[str, Any]:
    return {"id": id, "object": object, "created": int(time.time()), "model": name}


class Chunks:
    """The events of a stream: first the role, then text, then what it means, then usage, then [DONE].

    A piece of text never ends inside a character: the last one is held back until the next one begins.
    """

    def __init__(self, pg: PaliGemma, name: str, id: str, chat: Chat) -> None:
        self.pg, self.chat = pg, chat
        self.tokenizer = pg.processor.tokenizer
        self.head = head("chat.completion.chunk", id, name)
        self.shown = 0  # characters that were sent
        self.logged = 0  # tokens whose log-probabilities were sent

    def first(self) -> bytes:
        return self._event({"role": "assistant", "content": ""})

    def text(self, job: Job) -> bytes | None:
        """What has come since, or None."""
        if self.chat.as_json:
            return None
        if job.result is None:
            text = self.tokenizer.decode_stable(job.ids)
            end = start_of_last_character(text)
        else:
            text = self.tokenizer.decode(job.result.token_ids)
            end = len(text)
        if end <= self.shown:
            return None
        piece, self.shown = text[self.shown : end], end
        return self._event({"content": piece}, logs=self._logs(job))

    def last(self, job: Job) -> list[bytes]:
        """The final events. Runs in a worker: masks take time."""
        about, answer = details(self.pg, job, self.chat)
        delta: dict[str, Any] = {"paligemma": about}
        if self.chat.as_json:
            delta["content"] = items_as_text(about)
        events = [self._event(delta, finish_reason(answer), self._logs(job))]
        if self.chat.include_usage:
            events.append(event({**self.head, "choices": [], "usage": usage(job)}))
        return [*events, b"data: [DONE]\n\n"]

    def _logs(self, job: Job) -> dict[str, Any] | None:
        if not self.chat.logprobs or self.logged == len(job.ids):
            return None
        start, self.logged = self.logged, len(job.ids)
        return logprobs(self.tokenizer, job.ids[start:], job.logprobs[start:])

    def _event(self, delta: dict[str, Any], finish: str | None = None, logs: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logs, "finish_reason": finish}
        content: dict[str, Any] = {**self.head, "choices": [choice]}
        if self.chat.include_usage:
            content["usage"] = None  # as OpenAI: null in every chunk but the last
        return event(content)


def event(content: Any) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


# ------------------------------------------------------------------------------------------------ native


def native(pg: PaliGemma, name: str, id: str, job: Job, request: Native) -> bytes:
    """The reply of a native endpoint: the keys of `paligemma run --json`, and what a program needs beside them."""
    answer, size = answer_of(pg, job), job.row.image_size
    detections = [d for d in answer.detections if d.score is None or d.score >= request.min_score]
    segments = [s for s in answer.segments if s.score is None or s.score >= request.min_score]
    return json_bytes({
        "id": id,
        "model": name,
        "image": request.image,
        "image_size": list(size),
        "prompt": request.ask.prompt,
        "text": answer.text,
        "score": answer.score,
        "finished": answer.finished,
        "box_format": "xyxy_pixels",
        "detections": items(pg, detections, size, edges=True),
        "segments": items(pg, segments, size, request.masks, edges=True),
        "invalid": invalid_parts(answer),
        "usage": usage(job),
        "timing_ms": job.times.in_ms(),
    })  # fmt: skip
