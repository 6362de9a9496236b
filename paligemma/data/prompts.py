"""What a prompt asks for, as the model was trained on it: small letters, no full stop, labels parted by " ; ".

detect dog ; cat      segment dog      caption en      answer en what is it?      ocr
"""

from __future__ import annotations

import re

from paligemma.tasks import split_labels

_PROMPT = re.compile(
    r"(?:detect|segment) \S.*|(?:answer|question) [a-z]{2,3} \S.*|(?:caption|cap|describe) [a-z]{2,3}|ocr", re.S
)


def asks_for_boxes(prompt: str) -> bool:
    """Whether the answer is read as boxes or masks."""
    return prompt.startswith(("detect ", "segment "))


def labels_of(prompt: str) -> list[str]:
    """The labels that a detect or segment prompt asks for."""
    return [label for label in split_labels(prompt) if label]


def is_prompt(question: str, answer: object) -> bool:
    """Whether a question already is a prompt, so that no "answer en" belongs in front of it: "detect nucleus". One with
    a capital or a full stop counts as well; the check names it. "Detect" and "segment" also begin plain questions,
    whose answers have no boxes."""
    plain = plain_form(question)
    if not _PROMPT.fullmatch(plain):
        return False
    return not asks_for_boxes(plain) or (isinstance(answer, str) and (answer == "" or "<loc" in answer))


def plain_form(prompt: str) -> str:
    """The prompt as the model knows it: "Detect license plate." -> "detect license plate". One that is no variant of a
    known prompt is returned as it is. ("Describe it." is more likely a sentence than a prompt in Italian.)"""
    first, space, rest = prompt.strip().partition(" ")
    if first == "Describe":
        return prompt
    plain = first.lower() + space + rest
    if not plain.startswith(("answer ", "question ")):  # a question may well end in a full stop
        plain = plain.rstrip(".! ")
    if plain.startswith(("caption ", "cap ", "ocr")):
        plain = plain.lower()
    return plain if _PROMPT.fullmatch(plain) else prompt
