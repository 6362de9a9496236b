"""Counting by colour: a task that the embedded model does not know, for examples of fine-tuning.

    write_color_counts(2000, "runs/color/train", split="train")
    folder/images/train_000000.png ...
    folder/rows.jsonl    {"image": "images/train_000000.png", "prefix": "answer en how many red things are there ?",
                          "suffix": "two"}

The model can name the colour of an object and count the objects of a class, but it was never trained to do both in one
question.

All objects in these scenes are of tinted classes, and there are no signs, so it is never debatable whether a red apple
(untinted, but red) or a red board counts. An object counts if its tint is the colour asked about. The answer is sampled
first, uniformly, and then a scene that has it: in ordinary scenes nearly every answer would be "zero" or "one".

With `questions`, a picture has several questions in a row, each about another colour. The picture is encoded only once
for all of them (`paligemma train --keep-together`). Only the first answer is uniform. Each further count is sampled
from what the earlier ones leave of five objects, so small counts are more common. (Not all can be uniform: three counts
with a mean of 2.5 would need more than five objects.)

`most` limits the count, not the number of other objects: these scenes are fuller than those of training. With `apart`
no object hides a part of another.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma.files import new_folder_written_whole
from paligemma.tiny.renderer import MIN_VISIBLE, render
from paligemma.tiny.rows import NUMBERS, Row
from paligemma.tiny.scenes import with_progress
from paligemma.tiny.world import TINTABLE, TINTS, Scene, generator, has_held_out

MOST = 5  # things in a scene
QUESTION = "answer en how many {color} things are there ?"


def color_scene(
    seed: int, split: str = "train", size: int = 256, most: int = MOST, apart: bool = False
) -> tuple[Scene, Row]:
    """A scene of 1 to 5 tinted objects, and a question about one colour whose answer is "zero" to "five" (or `most`).

    The first of `color_questions`. apart: no object hides a part of another.
    """
    scene, rows = color_questions(seed, split, size, 1, most, apart)
    return scene, rows[0]


def color_questions(
    seed: int, split: str = "train", size: int = 256, questions: int = 1, most: int = MOST, apart: bool = False
) -> tuple[Scene, list[Row]]:
    """A scene of 1 to 5 tinted objects, and questions about as many colours, answers "zero" to "five" (or `most`).

    apart: no object hides a part of another. Every scene of the split "heldout" has something that is held out of
    training, scenes of other splits have nothing held out. Raises ValueError for fewer than one question, for so many
    that no colour is left for other objects, and for a `most` that is not 1 to 5.
    """
    if not 1 <= questions < len(TINTS):
        raise ValueError(f"questions must be 1 to {len(TINTS) - 1}, got {questions}")
    if not 1 <= most <= MOST:
        raise ValueError(f"most must be 1 to {MOST}, got {most}")
    rng = generator(seed, split).spawn(2)[1]
    colors = tuple(TINTS)
    wanted: dict[str, int] = {}  # how many of each colour
    for _ in range(questions):
        color = pick(rng, [color for color in colors if color not in wanted])
        wanted[color] = int(rng.integers(min(most, MOST - sum(wanted.values())) + 1))
    there = sum(wanted.values())
    while True:
        others = int(rng.integers(0 if there else 1, MOST - there + 1))
        tints = [color for color, count in wanted.items() for _ in range(count)]
        tints += [pick(rng, [color for color in colors if color not in wanted]) for _ in range(others)]
        things = [(pick(rng, TINTABLE), tint) for tint in tints]
        if has_held_out(things) == (split == "heldout"):
            break
    things = [things[i] for i in rng.permutation(len(things))]
    visible = 1.0 if apart else MIN_VISIBLE
    scene = render(seed, split, size, things=things, sign=0.0, sign_only=0.0, visible=visible)
    rows = []
    for color in wanted:
        counted = tuple(thing for thing in scene.objects if thing.tint == color)
        rows.append(Row("count_color", QUESTION.format(color=color), NUMBERS[len(counted)], (color,), counted))
    return scene, rows


def pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def write_color_counts(
    count: int,
    folder: str | Path,
    split: str = "train",
    size: int = 256,
    seed: int = 0,
    questions: int = 1,
    most: int = MOST,
    apart: bool = False,
    *,
    progress: bool = True,
) -> Path:
    """Write `count` pictures, from `seed` on, with so many questions each. Returns the folder, written whole.

    Raises FileExistsError if the folder exists and is not empty, and ValueError for a count below 1 and whatever
    `color_questions` refuses.
    """
    folder = Path(folder)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    seeds = range(seed, seed + count)
    with new_folder_written_whole(folder) as beside, open(beside / "rows.jsonl", "w", encoding="utf-8") as lines:
        (beside / "images").mkdir()
        for number in with_progress(seeds, progress):
            scene, rows = color_questions(number, split, size, questions, most, apart)
            name = f"images/{split}_{number:06d}.png"
            Image.fromarray(scene.image).save(beside / name)
            for row in rows:
                lines.write(json.dumps({"image": name, "prefix": row.prefix, "suffix": row.suffix}) + "\n")
    return folder
