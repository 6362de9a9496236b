"""One pass over picture, prompt and answer, with everything that it computes between the layers.

The answer is *teacher-forced*: its tokens are given, and each position predicts the one that follows. That is the same
computation as prefill and cached steps, in one piece, so every layer of every token can be seen at once.

    columns     0 ... P-1     P       P+1 ...      first_answer-1   first_answer ...
    tokens      <image> ...   <bos>   prompt ...   newline          answer ...
    predicts                                       answer token 0   answer token 1 ...

The commonest slip in looking at such a pass is to take the column of a token for the column that *predicts* it. The
query of answer token t stands one column to the left, at first_answer - 1 + t. (A prompt may place its <image>s itself.
Then some of it stands before and between them, and <bos> behind the last.)

Letters: S tokens, A answer tokens, n images, P patches of an image, D hidden, V vocabulary, L layers, R rows.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from paligemma.answers.results import Answer
from paligemma.images import ImageInput, Picture, load_image, preprocess
from paligemma.inference import PaliGemma
from paligemma.tasks import asks_for_items, budget_of

ROWS_AT_ONCE = 16  # of a batch in which the same picture is tried with many changes


@dataclass(repr=False)
class Look:
    """What `look` saw.

    picture: a PIL image, or a tuple of them. answer: its text, without eos.
    input_ids, token_type_ids: int64 [S]: images, bos, prompt, newline, answer. tokens: the text of each.
    images: n. grid: patches in a row of an image; P = grid * grid, row by row.
    first_text, first_answer: columns of bos and of the first answer token.
    features: [n, P, D], the image features after the projector.
    hidden_states: L + 1 of [S, D]: the input of every layer, and the output of the last one, before the final norm.
    logprobs: [A], of each answer token among the whole vocabulary.
    """

    pg: PaliGemma
    picture: Image.Image | tuple[Image.Image, ...]
    prompt: str
    answer: str
    input_ids: Tensor
    token_type_ids: Tensor
    tokens: list[str]
    images: int
    grid: int
    first_text: int
    first_answer: int
    features: Tensor
    hidden_states: list[Tensor] = field(default_factory=list)
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))

    def __repr__(self) -> str:
        return f"Look({self.prompt!r} -> {self.answer!r}, {len(self.input_ids)} tokens, {self.num_layers} layers)"

    @property
    def num_layers(self) -> int:
        return len(self.hidden_states) - 1

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The pictures of the row, one or several."""
        return self.picture if isinstance(self.picture, tuple) else (self.picture,)

    @property
    def answer_ids(self) -> Tensor:
        """int64 [A]"""
        return self.input_ids[self.first_answer :]

    @property
    def image_columns(self) -> Tensor:
        """int64 [n * P]: the column of each patch."""
        return (self.input_ids == self.pg.model.config.image_token_index).nonzero()[:, 0]

    @property
    def prompt_columns(self) -> Tensor:
        """int64: the columns of the prompt, on both sides of the images if it places them itself."""
        columns = torch.arange(self.first_answer - 1)  # the last one of the prefix is the newline
        of_image = self.input_ids[columns] == self.pg.model.config.image_token_index
        return columns[~of_image & (columns != self.first_text)]

    def query_of(self, token: int) -> int:
        """The column that predicts an answer token. Raises ValueError if there is no such token."""
        if not 0 <= token < len(self.answer_ids):
            raise ValueError(
                f"the answer has {len(self.answer_ids)} tokens, numbered from 0; there is no token {token}"
            )
        return self.first_answer - 1 + token

    def groups(self, token: int = 0) -> dict[str, list[int]]:
        """Columns by what stands there, as they are when answer token `token` is predicted; groups may be empty.

        image, bos, prompt, newline, answer so far, and last, the column that predicts. (For token 0, last is the
        newline.)
        """
        last = self.query_of(token)
        return {
            "image": self.image_columns.tolist(),
            "bos": [self.first_text],
            "prompt": self.prompt_columns.tolist(),
            "newline": [self.first_answer - 1],
            "answer so far": list(range(self.first_answer, last + 1)),
            "last": [last],
        }


@torch.no_grad()
def look(
    pg: PaliGemma, image: ImageInput, prompt: str, answer: str | None = None, *, max_new_tokens: int | None = None
) -> Look:
    """One teacher-forced pass.

    image: one picture, or a tuple that the row sees together. answer: None for what the model itself writes: greedy,
    under the grammar for detect and segment, as `paligemma run` does. max_new_tokens: of that answer; None: 128, or 512
    for detect and segment.
    Raises what `pg.generate` raises, and ValueError for an empty tuple.
    """
    if not hasattr(pg, "processor"):
        raise TypeError(f"pg is {type(pg).__name__}, expected what paligemma.load returns")
    given: tuple[Picture, ...] = image if isinstance(image, tuple) else (image,)
    if not given:
        raise ValueError("image is an empty tuple: give one picture or more")
    pictures = tuple(load_image(one) for one in given)
    model, processor = pg.model, pg.processor
    prefix = processor.lay_out([prompt], [len(pictures)])["input_ids"][0]  # [first_answer]
    if answer is None:
        with evaluating(model):
            written = own_answer(
                pg, pictures if len(pictures) > 1 else pictures[0], prompt, max_new_tokens=max_new_tokens
            )
        answer, answer_ids = written.text, written.token_ids
    else:
        answer_ids = processor.tokenizer.encode(answer)
    ids = torch.cat([prefix, torch.tensor(answer_ids, dtype=torch.int64)])  # [S]
    types = (torch.arange(len(ids)) >= len(prefix)).long()
    pixels = torch.stack([preprocess(one, processor.image_size) for one in pictures])
    with evaluating(model):
        features = model.encode_image(pixels.to(model.device))  # [n, P, D]
    seen = Look(
        pg=pg,
        picture=pictures if isinstance(image, tuple) else pictures[0],
        prompt=prompt,
        answer=answer,
        input_ids=ids,
        token_type_ids=types,
        tokens=[_text_of(pg, token) for token in ids.tolist()],
        images=len(pictures),
        grid=round(features.shape[1] ** 0.5),
        first_text=int((prefix == model.config.image_token_index).nonzero()[-1]) + 1,
        first_answer=len(prefix),
        features=features.float().cpu(),
    )
    states: list[Tensor] = []
    hidden = run(seen, before_final_norm=states.append, hidden_states=states)
    # `read` appends what the final norm returns; the lens wants what goes into it, which stands just before.
    seen.hidden_states = [state[0].float().cpu() for state in states[:-1]]
    seen.logprobs = logprobs_of_answer(seen, hidden)[0]
    return seen


def own_answer(
    pg: PaliGemma, picture: Image.Image | tuple[Image.Image, ...], prompt: str, *, max_new_tokens: int | None = None
) -> Answer:
    """What `paligemma run` would write: greedy, under the grammar for detect and segment."""
    budget = budget_of(prompt) if max_new_tokens is None else max_new_tokens
    return pg.generate(picture, prompt, budget, constrained=asks_for_items(prompt))


def _text_of(pg: PaliGemma, token: int) -> str:
    tokenizer = pg.processor.tokenizer
    if token == pg.model.config.image_token_index:
        return "<image>"
    return "<bos>" if token == tokenizer.bos_token_id else tokenizer.decode([token])


def numbers_of(given: Iterable[Any], end: int, name: str, what: str = "numbers") -> list[int]:
    """Columns, layers or patches as they were given. ValueError for what is not a whole number from 0 to end - 1, which
    begins with `name`, such as "layers has". (Tensors would cut 3.9 down to 3, and take -1 for the last.)"""
    numbers = []
    for number in given:
        try:
            numbers.append(operator.index(number))
        except TypeError:
            raise ValueError(f"{name} {number}, expected whole {what} from 0 to {end - 1}") from None
        if not 0 <= numbers[-1] < end:
            raise ValueError(f"{name} {number}, expected {what} from 0 to {end - 1}")
    return numbers


# ---------------------------------------------------------------------------------------------- running it again


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, or two passes would differ by chance. Afterwards the model trains again, if it did."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def run(
    look: Look,
    rows: int = 1,
    features: Tensor | None = None,
    layers: dict[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None,
    hidden_states: list[Tensor] | None = None,
    before_final_norm: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """The pass of a look again, for `rows` rows that may differ by changes: hidden states after the final norm
    [R, S, D], on the model's device.

    features: [R, n * P, D] in place of the look's own. layers: for some layers a function that gets the input
    [R, S, D] and the mask [R or 1, 1, S, S] of that layer and returns what it shall get instead.
    hidden_states: gets the input of every layer, and the output of the final norm. before_final_norm: is called with
    what goes into that norm.
    """
    model = look.pg.model
    ids = look.input_ids[None].expand(rows, -1).to(model.device)
    types = look.token_type_ids[None].expand(rows, -1).to(model.device)
    if features is None:
        features = look.features.flatten(0, 1)[None].expand(rows, -1, -1)
    x = model.embed(ids, features.to(model.device, model.dtype))
    decoder = model.language_model.model
    with ExitStack() as hooks:
        hooks.enter_context(evaluating(model))
        for layer, change in (layers or {}).items():
            hooks.enter_context(_hooked(decoder.layers[layer], _changing(change)))
        if before_final_norm is not None:
            watch = before_final_norm
            hooks.enter_context(_hooked(decoder.norm, lambda _, inputs: watch(inputs[0])))
        return model.read(inputs_embeds=x, token_type_ids=types, hidden_states=hidden_states)


@contextmanager
def _hooked(module: torch.nn.Module, hook: Callable[[Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    """A hook that acts in this thread alone: others may run the same model meanwhile."""
    own = threading.get_ident()
    handle = module.register_forward_pre_hook(
        lambda module, inputs: hook(module, inputs) if threading.get_ident() == own else None
    )
    try:
        yield
    finally:
        handle.remove()


def _changing(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Any, tuple[Any, ...]], Any]:
    return lambda _, inputs: (*change(inputs[0], inputs[1]), *inputs[2:])


@torch.no_grad()
def logprobs_of_answer(look: Look, hidden: Tensor) -> Tensor:
    """Log-probabilities of the answer's tokens, among the whole vocabulary: [R, S, D] -> float32 [R, A]."""
    predicting = hidden[:, look.first_answer - 1 : -1]  # [R, A, D]
    targets = look.answer_ids.to(hidden.device)[None, :, None].expand(len(hidden), -1, 1)
    rows = [look.pg.model.logits(row).float().log_softmax(-1) for row in predicting]  # row by row: V is large
    return torch.stack(rows).gather(-1, targets)[..., 0].cpu()
