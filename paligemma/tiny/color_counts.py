"""A task that the model of this world does not know, to show how it is taught: counting by colour.

    write_color_counts(2000, "runs/color/train", split="train")
    folder/images/train_000000.png ...
    folder/rows.jsonl    {"image": "images/train_000000.png", "prefix": "answer en how many red things are there ?",
                          "suffix": "two"}

The model can name the colour of a thing and count the things of a name, but was never asked to put the two together.

Every thing in these scenes is of a class that is always tinted, and there are no signs: nobody can argue whether a red
apple (whose red is its own) or a red board is meant. A thing counts if its tint is the colour asked for. First the
answer is drawn, each as likely as the others, then a scene that has it: in the scenes of `render` nearly every answer
would be "zero" or "one".

With `questions` there are several about each picture, one after the other, each about another colour: more to learn
from a look that is paid for once (`paligemma train --keep-together`). Of them the first is balanced and the others are
less so: each count is drawn from what the counts before it leave of the five things, so that small ones are commoner.
(They cannot all be balanced: three counts of 2.5 on average would be more than five things.)

`most` bounds what is counted, not how much stands around it. Each thing more can be missed: these scenes are fuller
than those that the model was trained with. With `apart` none of them hides a part of another.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma.files import new_folder_written_whole
from paligemma.tiny.renderer import MIN_VISIBLE, render
from paligemma.tiny.rows import NUMBERS, Row
from paligemma.tiny.scenes import drawing
from paligemma.tiny.world import TINTABLE, TINTS, Scene, generator, has_held_out

MOST = 5  # things in a scene
QUESTION = "answer en how many {color} things are there ?"


def color_scene(
    seed: int, split: str = "train", size: int = 256, most: int = MOST, apart: bool = False
) -> tuple[Scene, Row]:
    """A scene of 1 to 5 tinted things, and a question about one colour whose answer is "zero" to "five" (or `most`).

    The first of `color_questions`. apart: nothing hides a part of another.
    """
    scene, rows = color_questions(seed, split, size, 1, most, apart)
    return scene, rows[0]


def color_questions(
    seed: int, split: str = "train", size: int = 256, questions: int = 1, most: int = MOST, apart: bool = False
) -> tuple[Scene, list[Row]]:
    """A scene of 1 to 5 tinted things, and questions about as many colours, answers "zero" to "five" (or `most`).

    apart: nothing hides a part of another. Of the split "heldout", every scene has a pair that training never shows; of
    the others, none has. ValueError for fewer questions than one, or so many that no colour is left for things that
    nobody asks about, and for a `most` that is not 1 to 5.
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
    """The pictures and questions of the seeds from `seed` on, `count` pictures with so many questions each. Returns the
    folder, which is whole or isn't there.

    Raises FileExistsError if the folder is there already and not empty, and ValueError for a count below 1 and for
    questions that `color_questions` refuses.
    """
    folder = Path(folder)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    seeds = range(seed, seed + count)
    with new_folder_written_whole(folder) as beside, open(beside / "rows.jsonl", "w", encoding="utf-8") as lines:
        (beside / "images").mkdir()
        for number in drawing(seeds, progress):
            scene, rows = color_questions(number, split, size, questions, most, apart)
            name = f"images/{split}_{number:06d}.png"
            Image.fromarray(scene.image).save(beside / name)
            for row in rows:
                lines.write(json.dumps({"image": name, "prefix": row.prefix, "suffix": row.suffix}) + "\n")
    return folder
