"""Which task a prompt asks for, and how long its answer may be. Every command and the library go by these rules.

"caption en"         task caption     text: 128 new tokens
"detect dog ; cat"   task detect      items, here boxes: 512, under a grammar
"""

from __future__ import annotations

TEXT_BUDGET = 128  # new tokens for a sentence
BOX_BUDGET = 512  # for boxes (about 7 tokens each) and masks (about 23)


def task_of(prompt: str) -> str:
    """The first word of the prompt; spaces in front of it do not count."""
    return prompt.strip().partition(" ")[0]


def asks_for_items(prompt: str) -> bool:
    """Whether the answer lists boxes or masks: it then follows a grammar, and has a larger budget."""
    return task_of(prompt) in ("detect", "segment")


def split_labels(prompt: str) -> list[str]:
    """What stands between the semicolons behind the task: "detect dog ; cat" -> ["dog", "cat"]. Empty ones stay."""
    return [label.strip() for label in prompt.strip().partition(" ")[2].split(";")]


def budget_of(prompt: str) -> int:
    """New tokens that the answer may have, where nothing else is said."""
    return BOX_BUDGET if asks_for_items(prompt) else TEXT_BUDGET
