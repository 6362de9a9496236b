"""Turns a scene into prompts and right answers, in the syntax of the official checkpoints.

    rows(scene, rng)                     # one row of every task that the scene allows
    sample_row(scene, "count", rng)      # one row of this task, or None

`rng` decides what is asked about (which class, in which order). With `canonical=True` the wording does not vary; this
form is for evaluation. No question has a debatable answer: left or right needs a clear gap, the largest a clear margin.
Answers are balanced where guessing would otherwise pay: yes and no, left and right, the counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from paligemma.tiny.world import LABELS, Box, Scene, SceneObject, generator

T = TypeVar("T")
EncodeMask = Callable[[Sequence[tuple[np.ndarray, Box]]], Sequence[Sequence[int]]]
# [(mask bool [H, W], its box)] -> 16 codes for each

# The first wording is the canonical one, the others are only for training. {a}: "a dog", {many}: "dogs", {one}: "dog".
QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": (
        "what is this ?",
        "what is that ?",
        "what do you see ?",
        "what is shown here ?",
        "what is in the picture ?",
    ),
    "largest": (
        "what is the largest object ?",
        "what is the biggest object ?",
        "which object is the largest ?",
        "which object is the biggest ?",
    ),
    "color": (
        "what color is the {one} ?",
        "what is the color of the {one} ?",
        "which color does the {one} have ?",
        "what colour is the {one} ?",
    ),
    "background": (
        "what color is the background ?",
        "what is the color of the background ?",
        "which color does the background have ?",
        "what colour is the background ?",
    ),
    "exists": (
        "is there {a} ?",
        "do you see {a} ?",
        "is there {a} in the picture ?",
        "can you see {a} ?",
    ),
    "count": (
        "how many {many} are there ?",
        "how many {many} do you see ?",
        "how many {many} are in the picture ?",
        "what is the number of {many} ?",
    ),
    "count_all": (
        "how many objects are there ?",
        "how many objects do you see ?",
        "how many things are there ?",
        "how many objects are in the picture ?",
    ),
    "left_right": (
        "is the {one} to the left or right of the {two} ?",
        "is the {one} left or right of the {two} ?",
        "on which side of the {two} is the {one} ?",
    ),
    "left_of": (
        "what is to the left of the {one} ?",
        "what is left of the {one} ?",
        "which object is to the left of the {one} ?",
    ),
}
READING = ("ocr", "ocr", "answer en what does the sign say ?", "answer en what is written on the sign?")  # world 2
TASKS = (
    "caption", "what", "largest", "color", "background", "exists", "count", "count_all", "left_right", "left_of",
    "detect_one", "detect_all", "detect_absent", "segment", "ocr",
)  # fmt: skip

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLURALS = {
    "sheep": "sheep", "fish": "fish", "corn": "corn", "strawberry": "strawberries", "butterfly": "butterflies",
    "bus": "buses", "cactus": "cactuses", "octopus": "octopuses", "snowman": "snowmen",
}  # fmt: skip

CLEAR_GAP = 0.12  # of the side, between the middles of two objects of which one is called left of the other
CLEARLY_LARGER = 1.3  # times the visible pixels of the next (and not a smaller box)


@dataclass(frozen=True)
class Row:
    """A prompt, its right answer, and what the answer is about."""

    task: str  # one of TASKS
    prefix: str
    suffix: str
    asked: tuple[str, ...] = ()  # labels that the prompt names, in its order
    expected: tuple[SceneObject, ...] = ()  # objects that the answer names or lists, in its order


# --- words ----------------------------------------------------------------------------------------


def plural(label: str) -> str:
    return PLURALS.get(label, label + "s")


def article(name: str) -> str:
    """ "dog" -> "a dog", "orange car" -> "an orange car"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """Objects from left to right by their left edge. Equal ones (label and tint) are counted at the first of them."""
    groups: dict[tuple[str | None, str], int] = {}
    for thing in scene.objects:
        groups[thing.tint, thing.label] = groups.get((thing.tint, thing.label), 0) + 1
    parts = []
    for (tint, label), count in groups.items():
        words = (f"{tint} " if tint else "") + (label if count == 1 else plural(label))
        parts.append(article(words) if count == 1 else f"{NUMBERS[count]} {words}")
    where = f" on {article(scene.background)} background" if scene.background else ""
    return listed(parts) + where


# --- locations ------------------------------------------------------------------------------------


def location(coordinate: float, size: int, bin_step: int = 8) -> int:
    """The <loc> bin of a coordinate in pixels, a multiple of `bin_step`.

    `parse` decodes bin b as b / 1024 of the side, so the bin is round(1024 x coordinate / size), not 1023 x: otherwise
    decoded coordinates would be shifted. bin_step=8 leaves 128 bins, an eighth of the tokens to learn: one for each
    pixel of a picture of 128 pixels, one for 1.5 pixels at 192, the size of the model that ships. bin_step=1 uses all
    1,024. The last bin is 1024 - bin_step, because the far side itself, bin 1024, has no token.
    """
    return min(max(round(coordinate / size * 1024 / bin_step), 0) * bin_step, 1024 - bin_step)


def location_tokens(box: Box, size: int, bin_step: int = 8) -> str:
    """Four tokens in the order y0, x0, y1, x1."""
    x0, y0, x1, y1 = (location(edge, size, bin_step) for edge in box)
    return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>"


# --- what can be asked ----------------------------------------------------------------------------


def _by_label(scene: Scene) -> dict[str, list[SceneObject]]:
    """Label -> its objects from left to right; labels in the order of their first object."""
    groups: dict[str, list[SceneObject]] = {}
    for thing in scene.objects:
        groups.setdefault(thing.label, []).append(thing)
    return groups


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    present = {thing.label for thing in scene.objects}
    while (label := LABELS[rng.integers(len(LABELS))]) in present:
        pass
    return label


def _sometimes_absent(asked: list[str], scene: Scene, rng: np.random.Generator) -> list[str]:
    """In one case of five, add a class that is not in the scene; never more than five classes."""
    if len(asked) < 5 and rng.random() < 0.2:
        place = int(rng.integers(len(asked) + 1))
        return [*asked[:place], _absent(scene, rng), *asked[place:]]
    return asked


def largest_object(scene: Scene) -> SceneObject | None:
    """The largest object if it is clearly larger, in visible pixels and in its box, than everything of another name."""
    ordered = sorted(scene.objects, key=lambda thing: thing.area, reverse=True)
    first = ordered[0]
    others = [thing for thing in ordered if thing.label != first.label]
    clear = all(first.area >= CLEARLY_LARGER * o.area and _box_area(first.box) >= _box_area(o.box) for o in others)
    return first if clear and len(scene.objects) > 1 else None


def _box_area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def left_right_pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject]]:
    """(left, right): two objects, each the only one of its name, whose middles are a clear gap apart."""
    single = [group[0] for group in _by_label(scene).values() if len(group) == 1]
    gap = CLEAR_GAP * scene.size
    return [(a, b) for a in single for b in single if b.center[0] - a.center[0] >= gap]


def left_neighbor(scene: Scene, thing: SceneObject) -> SceneObject | None:
    """The nearest object to the left of this one; None if there is none or the answer would be debatable.

    It is clear if no object is only just left or right of this one, and the same one is nearest in x and in distance.
    """
    gap = CLEAR_GAP * scene.size
    left = []
    for other in scene.objects:
        shift = thing.center[0] - other.center[0]
        if other is thing:
            continue
        if shift >= gap:
            left.append((shift, float(np.hypot(shift, thing.center[1] - other.center[1])), other))
        elif shift > -gap:
            return None
    if not left:
        return None
    near = min(left, key=lambda entry: entry[1])
    for shift, distance, other in left:
        different = other.label != near[2].label
        if different and (shift - near[0] < gap / 2 or distance < 1.15 * near[1]):
            return None
    return near[2]


def sample_row(
    scene: Scene,
    task: str,
    rng: np.random.Generator,
    *,
    canonical: bool = False,
    bin_step: int = 8,
    encode_mask: EncodeMask | None = None,
) -> Row | None:
    """One prompt of this task with its answer; None if the scene does not allow it (no sign to read, nothing tinted).

    canonical:   the first wording of QUESTIONS, with the space before "?"; otherwise any wording, half without.
    bin_step:    see `location`.
    encode_mask: needed only by the task "segment"; [(mask, box)] in pixels of the scene -> 16 codes for each.

    Raises ValueError for an unknown task, and for "segment" without `encode_mask`.
    """
    if task == "caption":
        return Row(task, "caption en", caption(scene), (), scene.objects)
    if task == "ocr":
        sign = scene.sign
        if sign is None:
            return None
        prefix = "ocr" if canonical or scene.world == 1 else _pick(rng, READING)
        return Row(task, prefix, sign.text, (), (sign,))
    if task in QUESTIONS:
        content = _question(scene, task, rng)
        if content is None:
            return None
        wording = QUESTIONS[task][0] if canonical else _pick(rng, QUESTIONS[task])
        if not canonical and rng.random() < 0.5:
            wording = wording.replace(" ?", "?")
        prefix = "answer en " + wording.format(**content.words)
        return Row(task, prefix, content.answer, tuple(content.asked), tuple(content.expected))
    if task in ("detect_one", "detect_all", "detect_absent"):
        return _detect_row(scene, task, rng, canonical, bin_step)
    if task == "segment":
        if encode_mask is None:
            raise ValueError(
                "the answer to a segment prompt needs the mask codec: pass encode_mask, [(mask, box)] -> 16 codes each"
            )
        return _segment_row(scene, rng, canonical, bin_step, encode_mask)
    raise ValueError(f"unknown task {task!r}; there is: {', '.join(TASKS)}")


def _pick(rng: np.random.Generator, pool: Sequence[T]) -> T:
    return pool[int(rng.integers(len(pool)))]


# --- questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """What a question is about, before it is put into words."""

    answer: str
    asked: Sequence[str] = ()  # labels
    expected: Sequence[SceneObject] = ()
    words: dict[str, str] = field(default_factory=dict)  # for the wordings of QUESTIONS


def _question(scene: Scene, task: str, rng: np.random.Generator) -> _Content | None:
    """A question of one of the tasks of QUESTIONS about this scene; None if it allows none."""
    if task == "what":
        return _Content(scene.objects[0].label, (), scene.objects) if len(scene.objects) == 1 else None
    if task == "largest":
        largest = largest_object(scene)
        if largest and largest.label == "sign" and rng.random() < 0.7:  # otherwise "sign" would be a good guess
            return None
        return _Content(largest.label, (), [largest]) if largest else None
    if task == "color":
        return _question_color(scene, rng)
    if task == "background":
        return _Content(scene.background) if scene.background else None
    if task == "exists":
        return _question_exists(scene, rng)
    if task == "count":
        return _question_count(scene, rng)
    if task == "count_all":
        return _Content(NUMBERS[len(scene.objects)], (), scene.objects)
    if task == "left_right":
        return _question_left_right(scene, rng)
    return _question_left_of(scene, rng)


def _question_color(scene: Scene, rng: np.random.Generator) -> _Content | None:
    single = [group[0] for group in _by_label(scene).values() if len(group) == 1]
    colored = [thing for thing in single if thing.tint or thing.color]
    if not colored:
        return None
    thing = _pick(rng, colored)
    return _Content(str(thing.tint or thing.color), [thing.label], [thing], {"one": thing.label})


def _question_exists(scene: Scene, rng: np.random.Generator) -> _Content:
    groups = _by_label(scene)
    there = bool(rng.random() < 0.5)
    label = _pick(rng, tuple(groups)) if there else _absent(scene, rng)
    return _Content("yes" if there else "no", [label], groups.get(label, ()), {"a": article(label)})


def _question_count(scene: Scene, rng: np.random.Generator) -> _Content:
    """First the count is sampled, then the class, so that rare counts are common: nearly all would be "one"."""
    groups = _by_label(scene)
    counts = sorted({0} | {len(group) for group in groups.values()})
    bounds = np.cumsum([(1.0, 1.5)[count] if count < 2 else 4.0 for count in counts])
    count = counts[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]
    if count:
        label = _pick(rng, [label for label, group in groups.items() if len(group) == count])
    else:
        label = _absent(scene, rng)
    return _Content(NUMBERS[count], [label], groups.get(label, ()), {"many": plural(label)})


def _question_left_right(scene: Scene, rng: np.random.Generator) -> _Content | None:
    pairs = left_right_pairs(scene)
    if not pairs:
        return None
    left, right = _pick(rng, pairs)
    if rng.random() < 0.5:
        return _Content("left", [left.label, right.label], [left, right], {"one": left.label, "two": right.label})
    return _Content("right", [right.label, left.label], [right, left], {"one": right.label, "two": left.label})


def _question_left_of(scene: Scene, rng: np.random.Generator) -> _Content | None:
    single = [group[0] for group in _by_label(scene).values() if len(group) == 1]
    neighbors = [(near, thing) for thing in single if (near := left_neighbor(scene, thing)) is not None]
    if not neighbors:
        return None
    near, thing = _pick(rng, neighbors)
    return _Content(near.label, [thing.label], [near], {"one": thing.label})


# --- boxes and masks ------------------------------------------------------------------------------


def _detect_row(scene: Scene, task: str, rng: np.random.Generator, canonical: bool, bin_step: int) -> Row:
    groups = _by_label(scene)
    if task == "detect_one":
        asked = [_pick(rng, tuple(groups))]
    elif task == "detect_absent":
        asked = [_absent(scene, rng)]
    else:
        asked = [tuple(groups)[i] for i in rng.permutation(len(groups))][:5]
        if not canonical:  # in training sometimes only some of them, or one more that is absent
            if rng.random() < 0.3:
                asked = asked[: int(rng.integers(1, len(asked) + 1))]
            asked = _sometimes_absent(asked, scene, rng)
    things = [thing for label in asked for thing in groups.get(label, ())]
    parts = [f"{location_tokens(thing.box, scene.size, bin_step)} {thing.label}" for thing in things]
    return Row(task, "detect " + " ; ".join(asked), " ; ".join(parts), tuple(asked), tuple(things))


def _segment_row(
    scene: Scene, rng: np.random.Generator, canonical: bool, bin_step: int, encode_mask: EncodeMask
) -> Row:
    groups = _by_label(scene)
    asked = [_pick(rng, tuple(groups))]
    if not canonical:  # in training sometimes several, or one that is absent
        if rng.random() < 0.25:
            asked = [tuple(groups)[i] for i in rng.permutation(len(groups))][:3]
        asked = _sometimes_absent(asked, scene, rng)
        if rng.random() < 0.03:
            asked = [_absent(scene, rng)]
    things = [thing for label in asked for thing in groups.get(label, ())]
    codes = encode_mask([(thing.mask, thing.box) for thing in things]) if things else []
    parts = [
        location_tokens(thing.box, scene.size, bin_step)
        + "".join(f"<seg{int(code):03d}>" for code in row)
        + f" {thing.label}"
        for thing, row in zip(things, codes)
    ]
    return Row("segment", "segment " + " ; ".join(asked), " ; ".join(parts), tuple(asked), tuple(things))


# --- all rows of a scene --------------------------------------------------------------------------


def asker(scene: Scene) -> np.random.Generator:
    """The random numbers that decide what is asked about a scene. They depend only on its seed and split."""
    return generator(scene.seed, scene.split, scene.world).spawn(1)[0]


def rows(
    scene: Scene,
    rng: np.random.Generator,
    *,
    tasks: Sequence[str] = TASKS,
    canonical: bool = False,
    encode_mask: EncodeMask | None = None,
) -> list[Row]:
    """One row of each of `tasks` that the scene allows, see `sample_row`; none of "segment" without `encode_mask`."""
    # In world 2 each task has random numbers of its own, so that scenes are asked the same before and after they lost
    # their colours.
    own = dict(zip(TASKS, rng.spawn(len(TASKS)))) if scene.world == 2 else {}
    made = [
        sample_row(scene, task, own.get(task, rng), canonical=canonical, encode_mask=encode_mask)
        for task in tasks
        if task != "segment" or encode_mask is not None
    ]
    return [row for row in made if row is not None]
