"""The bodies of `/v1/answer`, `/v1/detect`, `/v1/segment` and `/v1/explore`: JSON, or a form with the file `image`.

{"image": "data:image/png;base64,...", "labels": ["dog", "cat"], "min_score": 0.5, "masks": "png"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paligemma.files import is_data_url
from paligemma.serve.chat import MOST_CHOICES, check_count, check_model, take_sampling
from paligemma.serve.errors import invalid, shown
from paligemma.serve.fields import Fields, checked_text, kind_of
from paligemma.serve.pictures import Source
from paligemma.serve.rows import Ask, Sampling, budget_for, check_prompt
from paligemma.serve.settings import Settings
from paligemma.tasks import task_of

MASKS = ("rle", "png", "polygon", "none")
MOST_LABELS = 1_000


@dataclass(frozen=True)
class Native:
    """A native request, checked. image: what the reply calls the picture: the name of a file or a URL, else null."""

    ask: Ask
    image: str | None
    min_score: float
    masks: str


def parse_native(task: str, body: Any, files: list[Source], settings: Settings) -> Native:
    """task: "answer", "detect", "segment" or "explore"."""
    fields = Fields(body)
    check_model(fields, settings)
    sources = _pictures(fields.take("image"), files, settings)
    boxes = task in ("detect", "segment")
    prompt, field, any_label = _prompt_with_labels(task, fields) if boxes else (_prompt(fields), "prompt", False)
    explore = task == "explore"
    wanted = None if explore else fields.whole("max_tokens", 1, settings.max_new_tokens)
    choices = fields.texts("choices", MOST_CHOICES) if task == "answer" else None
    sampling = Sampling() if explore else take_sampling(fields)
    constrained = True if explore else fields.flag("constrained", True)
    min_score = 0.0 if explore else fields.number("min_score", 0, 1) or 0.0
    masks = "none" if explore else fields.one_of("masks", MASKS, "rle")
    fields.end()
    budget = budget_for("segment" if any_label else prompt, wanted, settings.max_new_tokens)
    ask = Ask(
        prompt, sources, budget, sampling, constrained, None if choices is None else tuple(choices), any_label,
        params={"prompt": field, "labels": field},
    )  # fmt: skip
    return Native(ask, sources[0].name, min_score, masks)


def _pictures(value: Any, files: list[Source], settings: Settings) -> tuple[Source, ...]:
    given = value if isinstance(value, list) else [] if value is None else [value]
    sources = list(files)
    for i, url in enumerate(given):
        place = f"image[{i}]" if isinstance(value, list) else "image"
        if not isinstance(url, str):
            raise invalid(place, f"{place} is {kind_of(url)}, expected a data: URL")
        name = None if is_data_url(url) else url[:2000]
        sources.append(Source(url, place, name))
    if not sources:
        raise invalid("image", "image is missing: a data: URL, or the file of a form", "no_image")
    check_count(len(sources), settings, "image")
    return tuple(sources)


def _prompt(fields: Fields) -> str:
    prompt = fields.text("prompt")
    if prompt is None:
        raise invalid("prompt", "prompt is missing, such as 'caption en' or 'answer en what is this ?'")
    return prompt


def _prompt_with_labels(task: str, fields: Fields) -> tuple[str, str, bool]:
    """(prompt, the field it is from, whether any label may follow): of labels, of a whole prompt, or the bare
    expression for segment."""
    prompt, labels = fields.text("prompt"), fields.take("labels")
    if (prompt is None) == (labels is None):
        raise invalid("labels", 'give labels, such as ["dog", "cat"], or a prompt, and not both')
    if prompt is not None:
        if task_of(prompt) == task:
            return prompt, "prompt", False
        if task == "segment":
            return prompt, "prompt", True
        raise invalid("prompt", f"the prompt begins with {shown(task_of(prompt))}, expected '{task} THIS ; THAT'")
    given = [labels] if isinstance(labels, str) else labels
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_LABELS:
        raise invalid("labels", f"labels is {shown(labels)}, expected 1 to {MOST_LABELS:,} strings")
    texts = [_label(label, f"labels[{i}]" if given is labels else "labels") for i, label in enumerate(given)]
    return f"{task} " + " ; ".join(dict.fromkeys(texts)), "labels", False


def _label(value: Any, place: str) -> str:
    label = checked_text(value, place).strip()
    if not label:
        raise invalid(place, f"{place} is empty: name a thing to look for")
    if ";" in label:
        raise invalid(place, f"{place} contains ';', which separates labels: send a list of labels instead")
    check_prompt(label, place)
    return label
