"""The scene that the course (docs/course) looks at, and which patches of it show what.

    scene = course.scene()                        a red umbrella, a green book, a dog and a house
    course.patches(scene, "book", grid=12)        the patches of which a part is the book

Every chapter, its figure and its exercise use this one scene, so that what was seen in one chapter can be looked up in
the next. Nothing in it hides anything else, and what is in it is known to the pixel.
"""

import numpy as np

from paligemma.tiny.renderer import render
from paligemma.tiny.world import Scene

SEED, SPLIT = 34, "test"
SIZE = 480  # pixels: whole pixels for 8, 10 or 12 patches in a row


def scene(tint: str = "red") -> Scene:
    """The scene; with another tint its twin, in which the umbrella has that colour and nothing else differs."""
    things = [("umbrella", tint), ("book", "green"), ("dog", None), ("house", None)]
    return render(SEED, SPLIT, SIZE, things=things, sign=0.0, sign_only=0.0, visible=1.0)


def shares(scene: Scene, label: str, grid: int) -> np.ndarray:
    """float64 [grid * grid], how much of each patch is the object with this label. grid: patches in a row.

    Raises ValueError if there is not exactly one such object, or if the patches would cut pixels.
    """
    found = [thing for thing in scene.objects if thing.label == label]
    if len(found) != 1:
        raise ValueError(f"the scene has {len(found)} objects with the label {label!r}, expected one")
    if scene.size % grid:
        raise ValueError(f"{grid} patches in a row would cut pixels: the picture has {scene.size}")
    side = scene.size // grid
    return found[0].mask.reshape(grid, side, grid, side).mean((1, 3)).ravel()


def patches(scene: Scene, label: str, grid: int) -> list[int]:
    """The patches, row by row from 0, that show a part of the object."""
    return np.flatnonzero(shares(scene, label, grid)).tolist()


def fullest(scene: Scene, label: str, grid: int) -> int:
    """The patch that shows most of the object; of several, the first."""
    return int(shares(scene, label, grid).argmax())


def around(patch: int, window: int, grid: int) -> list[int]:
    """The window x window patches around a patch (window: odd), cut off at the edge of the picture."""
    row, column = divmod(patch, grid)
    rows = range(max(0, row - window // 2), min(grid, row + window // 2 + 1))
    columns = range(max(0, column - window // 2), min(grid, column + window // 2 + 1))
    return [r * grid + c for r in rows for c in columns]
