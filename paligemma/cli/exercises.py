"""The exercises of the course (docs/course): is an answer right, and why?

    paligemma explore --check 2 19

No answer is written down here. Each one is computed from the model, on the scene of `tiny/course.py`, so it stays true
when the model is trained anew. A right answer is explained; a wrong one is told what it would be the answer to.

Layers, heads, patches and columns count from 0, as they do in Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from paligemma import explore
from paligemma.attention_mask import prefix_lm_mask
from paligemma.images import load_image, preprocess
from paligemma.inference import PaliGemma
from paligemma.tiny import course
from paligemma.weights.published import published_config


@dataclass(frozen=True)
class Truth:
    """answers: the right one, in every form that is accepted. why: the reason. why_not: what is wrong with another."""

    answers: frozenset[Any]
    why: str
    why_not: Callable[[Any], str]


@dataclass(frozen=True)
class Exercise:
    """read: a text → an answer; ValueError where the text is none. solve: computes the truth from a model."""

    question: str
    read: Callable[[str], Any]
    solve: Callable[[PaliGemma], Truth]


def read(number: int, answer: str) -> Any:
    """What a text answers to exercise `number`.

    Raises ValueError for a number that no exercise has, and for a text that cannot be an answer to it.
    """
    if number not in EXERCISES:
        raise ValueError(f"there is no exercise {number}: the chapters are numbered from 1 to {len(EXERCISES)}")
    try:
        return EXERCISES[number].read(answer)
    except ValueError as error:
        raise ValueError(f"exercise {number}, {EXERCISES[number].question} {error}") from None


def judge(truth: Truth, given: Any) -> tuple[bool, str]:
    """Whether an answer that `read` returned is right, and the sentence that says why."""
    if given in truth.answers:
        return True, f"right: {truth.why}"
    return False, f"wrong: {truth.why_not(given)}"


# ---------------------------------------------------------------------------------------------- reading an answer


def a_number(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,9}", text.strip()):
        raise ValueError(f"the answer is {text[:60]!r}, expected a whole number, such as 12")
    return int(text)


def five_numbers(text: str) -> tuple[int, ...]:
    words = text.replace(",", " ").split()
    if len(words) != 5 or not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise ValueError(f"the answer is {text[:60]!r}, expected five whole numbers, such as '12 34 56 78 90'")
    return tuple(int(word) for word in words)


def one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        found = text.strip().strip("'\"").strip().replace(" ", "")
        if found not in words:
            raise ValueError(f"the answer is {text[:60]!r}, expected one of: {', '.join(words)}")
        return found

    return read


def a_parameter(text: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*", text.strip()):
        raise ValueError(f"the answer is {text[:60]!r}, expected the name of a parameter, such as model.norm.weight")
    return text.strip()


# ---------------------------------------------------------------------------------------------- what several need


def caption_of(pg: PaliGemma) -> explore.Look:
    return explore.look(pg, course.scene().image, "caption en")


def predicting(look: explore.Look, word: str) -> int:
    """The number of an answer's token. Raises ValueError if the model does not write this word."""
    words = [token.strip() for token in look.tokens[look.first_answer :]]
    if word not in words:
        raise ValueError(f"this model does not write {word!r} ({look.answer!r}): the exercise is about one that does")
    return words.index(word)


def counted(patch: int, patches: int) -> str:
    return f"there are {patches} patches, from 0 to {patches - 1}; {patch} is none of them"


# ---------------------------------------------------------------------------------------------- the exercises

PIXEL = (440, 283)  # row and column in the scene: the dog's nose


def patch_of_a_pixel(pg: PaliGemma) -> Truth:
    """Found by experiment: the pixels around it are changed, and one row of the patch embedding changes most."""
    image, (row, column) = course.scene().image, PIXEL
    changed = image.copy()
    changed[row - 4 : row + 5, column - 4 : column + 5] = 255 - changed[row - 4 : row + 5, column - 4 : column + 5]
    pixels = torch.stack([preprocess(load_image(one), pg.processor.image_size) for one in (image, changed)])
    patch_embedding = pg.model.vision_tower.vision_model.embeddings
    before, after = patch_embedding(pixels.to(pg.model.device, pg.model.dtype))  # [P, D] each
    truth, P = int((after - before).norm(dim=-1).argmax()), len(before)
    g, side = round(P**0.5), image.shape[0] // round(P**0.5)

    def why_not(given: int) -> str:
        if not 0 <= given < P:
            return counted(given, P)
        if given == truth % g * g + truth // g:
            return f"patch {given} has row and column exchanged: patches are counted row by row, row * {g} + column"
        top, left = given // g * side, given % g * side
        return (
            f"patch {given} holds rows {top} to {top + side - 1} and columns {left} to {left + side - 1} of the scene, "
            f"not the pixel in row {row}, column {column}"
        )

    why = (
        f"one patch covers {side} x {side} pixels of the scene, so the pixel is in row {row} // {side} = {row // side} "
        f"and column {column} // {side} = {column // side} of the patches: {row // side} * {g} + {column // side}"
    )
    return Truth(frozenset({truth}), why, why_not)


MOST_LIKE = 27


def position_most_alike(pg: PaliGemma) -> Truth:
    cosine = explore.position_similarity(pg.model).cosine
    row = cosine[MOST_LIKE].clone()
    row[MOST_LIKE] = -1  # itself
    P, truth = len(row), int(row.argmax())
    g = round(P**0.5)

    def why_not(given: int) -> str:
        if given == MOST_LIKE:
            return f"every position is most like itself, with a cosine of 1: leave {MOST_LIKE} out"
        if not 0 <= given < P:
            return counted(given, P)
        return f"the cosine of {MOST_LIKE} and {given} is {row[given]:.2f}, and another patch has {row[truth]:.2f}"

    beside = abs(truth // g - MOST_LIKE // g) + abs(truth % g - MOST_LIKE % g) == 1
    where = "is its neighbour in the picture, which nobody told the model" if beside else "is not even its neighbour"
    return Truth(frozenset({truth}), f"patch {truth} has the largest cosine, {row[truth]:.2f}, and {where}", why_not)


def smallest_window(pg: PaliGemma) -> Truth:
    """The smallest odd window around the umbrella's fullest patch without which the caption has no umbrella."""
    look, g = caption_of(pg), round(pg.processor.num_image_tokens**0.5)
    predicting(look, "umbrella")
    centre = course.fullest(course.scene(), "umbrella", g)

    def answer(window: int) -> str:
        return explore.without(look, course.around(centre, window, g), where="pixels").text

    truth = next(window for window in range(1, 2 * g, 2) if "umbrella" not in answer(window))

    def why_not(given: int) -> str:
        if given < 1 or given % 2 == 0:
            return f"a window around a patch has an odd number of patches in a row, and {given} is not one"
        if given > truth:
            return f"without {given} x {given} patches the umbrella is gone, but a smaller window is enough"
        return f"without {given} x {given} patches around {centre} the answer is still {answer(given)!r}"

    why = (
        f"without {truth} x {truth} patches around {centre} the answer is {answer(truth)!r}; fewer leave patches that "
        "show a part of the umbrella, and the vision layers tell them of the rest"
    )
    return Truth(frozenset({truth}), why, why_not)


def patches_that_say(pg: PaliGemma) -> Truth:
    """How many patches say "umbrella" after the last layer."""
    look = caption_of(pg)
    said = explore.lens(look, k=1, columns=look.image_columns.tolist()).ids[:, :, 0]  # [L + 1, P]
    words = [[pg.processor.tokenizer.decode([word]).strip() for word in row] for row in said.tolist()]
    counts = [row.count("umbrella") for row in words]
    truth, last = counts[-1], len(counts) - 1
    shown = course.patches(course.scene(), "umbrella", look.grid)
    covered, near = len(shown), {patch for one in shown for patch in course.around(one, 3, look.grid)}
    far = sum(word == "umbrella" and patch not in near for patch, word in enumerate(words[-1]))

    def why_not(given: int) -> str:
        if given == covered:
            return f"{given} patches show a part of the umbrella, which is not the same as saying its name"
        if given in counts:
            return f"{given} patches say it in hidden state {counts.index(given)}; asked is the last one, {last}"
        return f"{given} is not the number of patches whose likeliest word in hidden state {last} is 'umbrella'"

    why = (
        f"{truth} patches say it after the last layer and {counts[0]} straight from the projector, while {covered} "
        f"show a part of it: the layers have carried the word to other patches, {far} of them not beside the umbrella"
    )
    return Truth(frozenset({truth}), why, why_not)


def allowed_edges(pg: PaliGemma) -> Truth:
    look = explore.look(pg, course.scene().image, "caption en", "a dog")
    types = look.token_type_ids[None]
    truth = int(prefix_lm_mask(types, torch.ones_like(types, dtype=torch.bool)).sum())
    S, prefix = len(look.input_ids), look.first_answer
    answer = S - prefix

    def why_not(given: int) -> str:
        slips = {
            S * S: "that is every pair: but the prefix does not see the answer, nor the answer what comes after",
            S * (S + 1) // 2: "that is a causal mask: here the prefix sees itself in both directions",
            prefix * prefix: "that is the prefix alone: the rows of the answer are missing",
            truth - answer: "every token of the answer sees itself as well",
            truth - answer * prefix: "every token of the answer sees the whole prefix as well",
        }
        return slips.get(given, f"the prefix has {prefix} columns, the answer {answer}: count row by row")

    rows = " + ".join(str(prefix + 1 + row) for row in range(answer))
    why = f"{prefix} rows of the prefix see {prefix} columns each, and the {answer} rows of the answer see {rows}"
    return Truth(frozenset({truth}), why, why_not)


LAYER = 4


def head_that_does_not_look(pg: PaliGemma) -> Truth:
    look = caption_of(pg)
    book = torch.tensor(course.patches(course.scene(), "book", look.grid))
    on_book = explore.attention(look).of(predicting(look, "book"))[LAYER][:, book].sum(-1)  # [H]
    truth, heads = int(on_book.argmin()), len(on_book)

    def why_not(given: int) -> str:
        if not 0 <= given < heads:
            return f"a layer has {heads} heads, from 0 to {heads - 1}"
        return f"head {given} of layer {LAYER} has {on_book[given]:.0%} of its attention on the patches of the book"

    others = ", ".join(f"{float(value):.0%}" for head, value in enumerate(on_book) if head != truth)
    why = f"head {truth} has {on_book[truth]:.0%} of its attention on the patches of the book, the others {others}"
    return Truth(frozenset({truth}), why, why_not)


def column_that_is_needed(pg: PaliGemma) -> Truth:
    """Which of <bos>, "caption", "en" and the newline costs the answer most, when nobody may look at it."""
    look = caption_of(pg)
    names = ("bos", "caption", "en", "newline")
    S, layers = len(look.input_ids), range(look.num_layers)
    columns = dict(zip(names, range(look.first_text, look.first_answer)))
    costs = {
        name: float(explore.cut(look, [query for query in range(S) if query != column], [column], layers).drop.sum())
        for name, column in columns.items()
    }
    truth = max(costs, key=lambda name: costs[name])
    weights = explore.attention(look).weights[0].mean((0, 1))  # [S], of layer 0
    share = {name: float(weights[column]) for name, column in columns.items()}

    def why_not(given: str) -> str:
        return (
            f"{given} gets {share[given]:.0%} of the attention of layer 0, but without it the answer loses "
            f"{costs[given]:.2f} nats, and without another {costs[truth]:.2f}"
        )

    why = (
        f"without {truth} the answer loses {costs[truth]:.2f} nats, without bos {costs['bos']:.2f}; yet {truth} gets "
        f"{share[truth]:.0%} of the attention of layer 0, and bos {share['bos']:.0%}"
    )
    return Truth(frozenset({truth}), why, why_not)


def table_used_twice(pg: PaliGemma) -> Truth:
    """The parameter that turns hidden states into logits, found by trying all that have the right shape."""
    model, text = pg.model, pg.model.config.text_config
    hidden = torch.linspace(-1, 1, text.hidden_size, device=model.device, dtype=model.dtype)
    logits = model.logits(hidden)
    parameters = dict(model.named_parameters())
    cap = text.final_logit_softcapping

    def is_head(weight: torch.Tensor) -> bool:
        if weight.shape != (text.vocab_size, text.hidden_size):
            return False
        found = F.linear(hidden, weight)
        return torch.allclose(found if cap is None else torch.tanh(found / cap) * cap, logits, atol=1e-3)

    heads = [name for name, weight in parameters.items() if is_head(weight)]
    if not heads:  # rounded weights are no parameters
        raise ValueError("the output head of this model is no parameter: take a model whose weights are not rounded")
    truth = heads[0]

    def why_not(given: str) -> str:
        named = [name for name in parameters if given in ends_of(name)]
        if not named:
            return f"the model has no parameter {given!r}: its output head uses one that has another use too"
        shape = list(parameters[named[0]].shape)
        return f"{named[0]} has the shape {shape}; the output head makes a number for each of {text.vocab_size} tokens"

    why = (
        f"{truth} embeds the tokens and is the output head too: a state that is still a token's own row of it has "
        "the largest product with that row"
    )
    return Truth(ends_of(truth), why, why_not)


def ends_of(name: str) -> frozenset[str]:
    """a.b.weight -> a.b.weight, b.weight, a.b, b: what a person may call a parameter."""
    parts = name.split(".")
    whole = {".".join(parts[start:]) for start in range(len(parts))} - {"weight"}
    return frozenset(whole | {end.removesuffix(".weight") for end in whole})


ROUTES = ("image->bos", "image->prompt", "image->last")


def route_of_yes(pg: PaliGemma) -> Truth:
    look = explore.look(pg, course.scene().image, "answer en is there a book ?")
    found = explore.routes(look, 0)
    change = {name: float(found.change[found.names.index(name), 1]) for name in ROUTES}
    truth = max(change, key=lambda name: change[name])
    token = look.tokens[look.first_answer]

    def why_not(given: str) -> str:
        return (
            f"cutting {given} around layer 1 takes {change[given]:.0%} of {token!r}, another route {change[truth]:.0%}"
        )

    why = (
        f"cutting {truth} around layer 1 takes {change[truth]:.0%} of {token!r}: the prompt asks the picture in the "
        "first layers, and the column that answers needs only the prompt"
    )
    return Truth(frozenset({truth}), why, why_not)


def patch_that_carries_red(pg: PaliGemma) -> Truth:
    question = "answer en what color is the umbrella ?"
    red, blue = (explore.look(pg, course.scene(tint).image, question, tint) for tint in ("red", "blue"))
    restored = explore.patch(red, blue, token=0, patches=True).per_patch
    assert restored is not None
    of_patch = restored[0]  # [P], put in before layer 0
    truth, P = int(of_patch.argmax()), len(of_patch)

    def why_not(given: int) -> str:
        if not 0 <= given < P:
            return counted(given, P)
        return f"patch {given} brings {of_patch[given]:.0%} of 'red' back, another one {of_patch[truth]:.0%}"

    why = f"patch {truth} alone brings {of_patch[truth]:.0%} of the difference between 'red' and 'blue' back"
    return Truth(frozenset({truth}), why, why_not)


def widest_edge(pg: PaliGemma) -> Truth:
    look = explore.look(pg, course.scene().image, "detect house")
    edges = explore.locations(look)[:4]
    if len(edges) < 4:
        raise ValueError(f"this model finds no house ({look.answer!r}): the exercise is about one that does")
    spread = {edge.name: edge.pixel_spread for edge in edges}
    truth = max(spread, key=lambda name: spread[name])

    def why_not(given: str) -> str:
        return f"the spread of {given} is {spread[given]:.1f} pixels, that of another edge {spread[truth]:.1f}"

    meaning = {"y0": "upper", "x0": "left", "y1": "lower", "x1": "right"}[truth]
    why = f"the {meaning} edge has the widest distribution: its spread is {spread[truth]:.1f} pixels"
    return Truth(frozenset({truth}), why, why_not)


def five_shapes(pg: PaliGemma) -> Truth:
    """What the tensors of the official model will be like, before anybody has downloaded it."""
    config = published_config("paligemma2-3b", 448)
    text, vision = config.text_config, config.vision_config
    P = vision.num_patches
    names = (
        "image tokens", "numbers in a patch of pixels", "numbers in an image feature",
        "rows of the mask with 4 text tokens", "hidden states of a pass",
    )  # fmt: skip
    truth = (P, 3 * vision.patch_size**2, text.hidden_size, P + 4, text.num_hidden_layers + 1)
    how = (
        f"(448 / {vision.patch_size}) squared", f"3 colours x {vision.patch_size} x {vision.patch_size} pixels",
        "the projector makes vectors as wide as the language model's hidden states",
        "image and text tokens stand in one row, and each has a row of the mask",
        "the input of every layer, and the output of the last",
    )  # fmt: skip

    def why_not(given: tuple[int, ...]) -> str:
        first = next(index for index in range(5) if given[index] != truth[index])
        return f"{given[first]} is not the number of {names[first]}: {how[first]}"

    listed = ", ".join(f"{number} {name}" for number, name in zip(truth, names))
    return Truth(frozenset({truth}), f"{listed}; on the official model you will find these shapes", why_not)


EXERCISES = {
    1: Exercise(f"which patch holds the pixel in row {PIXEL[0]}, column {PIXEL[1]}?", a_number, patch_of_a_pixel),
    2: Exercise(f"which position is most like that of patch {MOST_LIKE}?", a_number, position_most_alike),
    3: Exercise("how wide must a window be for the umbrella to go?", a_number, smallest_window),
    4: Exercise("how many patches say 'umbrella' after the last layer?", a_number, patches_that_say),
    5: Exercise("how many pairs does the mask allow for the answer 'a dog'?", a_number, allowed_edges),
    6: Exercise(f"which head of layer {LAYER} does not look at the book?", a_number, head_that_does_not_look),
    7: Exercise(
        "which column does the answer need most?", one_of("bos", "caption", "en", "newline"), column_that_is_needed
    ),
    8: Exercise("which parameter is used at both ends of the language model?", a_parameter, table_used_twice),
    9: Exercise("which route from the picture does 'yes' take?", one_of(*ROUTES), route_of_yes),
    10: Exercise("which patch brings most of 'red' back?", a_number, patch_that_carries_red),
    11: Exercise("which edge of the house is the least sure?", one_of("y0", "x0", "y1", "x1"), widest_edge),
    12: Exercise("which shapes has paligemma2-3b at 448 pixels?", five_numbers, five_shapes),
}
