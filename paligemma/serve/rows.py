"""What is asked, whatever its endpoint (`Ask`), and the row that the engine runs for it.

`lay_out` runs in a worker, since tokenizing and building a grammar may each take tens of milliseconds. It checks the
length of the prompt before it builds anything; the pictures come later (`service.py`).

Letters: S length of the prompt, P image patches, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paligemma.answers.constraints import Constraint
from paligemma.answers.grammar import ChoiceGrammar, DetectionGrammar
from paligemma.generation import TooLong, check_length
from paligemma.inference import PaliGemma
from paligemma.serve.errors import ApiError, invalid, shown
from paligemma.serve.pictures import Picture, Source
from paligemma.tasks import asks_for_items, budget_of

LONGEST_TOKEN = 16  # characters: a prompt with more for each position of the model is too long without being tokenized


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, from the fields of a request. Without a temperature: greedy."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        if not self.temperature:
            return {}
        return {
            "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "seed": self.seed,
        }  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """What a valid request asks of the model.

    constrained: detect and segment follow their grammar. choices: the answer is one of these. any_label: the prompt is
    a bare expression, and segments with any label are its answer. params: the names of the fields that errors blame:
    {"prompt": "messages", ...}.
    """

    prompt: str
    sources: tuple[Source, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    constrained: bool = True
    choices: tuple[str, ...] | None = None
    any_label: bool = False
    params: dict[str, str] = field(default_factory=dict)

    def param(self, what: str) -> str:
        return self.params.get(what, what)


def budget_for(prompt: str, wanted: int | None, most: int) -> int:
    """The tokens that an answer may have: as asked, else the default of the task, at most the server's limit."""
    return wanted or min(most, budget_of(prompt))


@dataclass(frozen=True)
class Row:
    """A row that is ready to run. ids: int64 [S], with the places of the pictures' patches."""

    ids: Tensor
    pictures: tuple[Picture, ...]
    max_new_tokens: int
    sampling: Sampling
    constraint: Constraint | None

    @property
    def image_size(self) -> tuple[int, int]:
        """(W, H) of the first picture, to which boxes refer."""
        return self.pictures[0].size


def check_prompt(prompt: str, param: str) -> None:
    """What no prompt may hold, on any endpoint."""
    if "<image>" in prompt:
        raise invalid(
            param, "the prompt contains <image>, which stands for a picture: leave it out, it is added here",
            "invalid_prompt",
        )  # fmt: skip


def lay_out(pg: PaliGemma, ask: Ask, room: int | None = None) -> Row:
    """The row without its pictures. ApiError where prompt, labels or choices do not do.

    room: tokens of a row at most, prompt and answer together, where that is less than the model's positions.
    """
    check_prompt(ask.prompt, ask.param("prompt"))
    limit = pg.model.config.text_config.max_position_embeddings
    if len(ask.prompt) > LONGEST_TOKEN * limit:
        raise invalid(
            ask.param("prompt"),
            f"the prompt has {len(ask.prompt):,} characters, far more than the model's {limit:,} positions can hold",
            "prompt_too_long",
        )
    inputs = pg.processor.lay_out([ask.prompt], [len(ask.sources)])
    try:
        check_length(pg.model.config, inputs["attention_mask"], ask.max_new_tokens)
    except TooLong as error:
        raise invalid(ask.param("prompt"), str(error), "prompt_too_long") from None
    length = int(inputs["attention_mask"].sum())
    if room is not None and length + ask.max_new_tokens > room:
        raise invalid(
            ask.param("prompt"),
            f"the prompt has {length:,} tokens (pictures included) and the answer may have {ask.max_new_tokens:,}, "
            f"and this server has room for {room:,} in a row: shorten the prompt, send fewer pictures, or ask for a "
            "shorter answer",
            "prompt_too_long",
        )
    return Row(inputs["input_ids"][0], (), ask.max_new_tokens, ask.sampling, _constraint(pg, ask))


def _constraint(pg: PaliGemma, ask: Ask) -> Constraint | None:
    tokenizer = pg.processor.tokenizer
    try:
        if ask.choices is not None:
            choices = ChoiceGrammar(tokenizer, ask.choices)
            choices.check_budget(ask.max_new_tokens)
            return choices
        if ask.any_label:
            return DetectionGrammar(tokenizer, labels=None, segments=True) if ask.constrained else None
        if not ask.constrained or not asks_for_items(ask.prompt):
            return None
        return pg.grammar(ask.prompt)
    except ValueError as error:
        if ask.choices is not None:
            raise invalid(ask.param("choices"), str(error)) from None
        raise invalid(ask.param("labels"), str(error), "invalid_prompt") from None


@torch.inference_mode()
def encode(pg: PaliGemma, pixels: Tensor) -> Tensor:
    """Pixels [3, side, side] of a picture -> its features [P, D]. On the engine's thread."""
    return pg.model.encode_image(pixels[None].to(pg.model.device))[0]


def row_failed(error: BaseException) -> ApiError:
    """A 500 for a row that failed by itself: a dead end of its constraint, logits that are NaN or infinite."""
    if isinstance(error, ApiError):
        return error
    return ApiError(500, "row_failed", f"the answer could not be finished: {shown(str(error))}")
