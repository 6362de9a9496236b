"""What every patch of a picture shows: what a vision model can be taught before it reads or writes a word.

A patch belongs to the object that covers most of it, if that covers at least the share `least`; otherwise to the
background. Letters: G patches in a row, c cells in a row of a patch.
"""

import numpy as np

from paligemma.tiny.world import BACKGROUNDS, CHARACTERS, LABELS, TINTS, Scene


def patch_targets(scene: Scene, grid: int = 8, cells: int = 8, least: float = 0.2) -> dict[str, np.ndarray]:
    """What each of the `grid` x `grid` patches shows:

    class       int64   [G, G]        0 background, else 1 + index in LABELS
    tint        int64   [G, G]        0 none, else 1 + index in TINTS
    background  int64   []            index in BACKGROUNDS, -100 if its colour has no name
    index       int64   [G, G]        -1 background, else index in scene.objects
    box         float32 [G, G, 4]     x0 y0 x1 y1 of its object relative to the patch's middle, in sides of the picture
    mask        bool    [G, G, c, c]  its object's mask inside the patch: cells that are at least half covered
    characters  int64   [G, G, 2]     1 + index in CHARACTERS of those with their middle in the patch, from the left

    Raises ValueError when the picture's side is not a multiple of grid x cells.
    """
    size = scene.size
    pixels = size // (grid * cells)  # per cell
    if size != pixels * grid * cells:
        raise ValueError(f"a picture of {size} pixels has no {grid} x {grid} patches of {cells} x {cells} whole cells")
    filled = _pixels_of_cells(scene, grid, cells, pixels)
    share = filled.sum((3, 4)).astype(np.float32) / (cells * pixels) ** 2  # [objects, G, G]
    index = share.argmax(0)
    empty = share.max(0) < least

    label = np.array([1 + LABELS.index(thing.label) for thing in scene.objects])
    tint = np.array([1 + tuple(TINTS).index(thing.tint) if thing.tint else 0 for thing in scene.objects])
    boxes = np.array([thing.box for thing in scene.objects], np.float32) / size
    middle = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    middles = np.stack(np.broadcast_arrays(middle, middle[:, None]), -1)  # [G, G, 2]: x, y
    box = boxes[index] - np.concatenate([middles, middles], -1)
    mask = np.take_along_axis(filled, index[None, :, :, None, None], 0)[0] * 2 >= pixels * pixels
    box[empty] = 0
    mask[empty] = False
    return {
        "class": np.where(empty, 0, label[index]),
        "tint": np.where(empty, 0, tint[index]),
        "background": np.array(tuple(BACKGROUNDS).index(scene.background) if scene.background else -100),
        "index": np.where(empty, -1, index),
        "box": box,
        "mask": mask,
        "characters": _characters(scene, grid),
    }


def _pixels_of_cells(scene: Scene, grid: int, cells: int, pixels: int) -> np.ndarray:
    """How many pixels of each cell each object covers: [objects, G, G, c, c]."""
    masks = np.stack([thing.mask for thing in scene.objects]).view(np.uint8)
    rows = masks.reshape(len(masks), grid * cells, pixels, scene.size).sum(2, dtype=np.uint16)
    columns = rows.reshape(len(masks), grid * cells, grid * cells, pixels)
    filled = np.asarray(sum(columns[..., i] for i in range(pixels)))  # [objects, G*c, G*c]
    return filled.reshape(len(masks), grid, cells, grid, cells).transpose(0, 1, 3, 2, 4)


def _characters(scene: Scene, grid: int) -> np.ndarray:
    """The letters in each patch [G, G, 2], no more than two, the rest is left out."""
    characters = np.zeros((grid, grid, 2), np.int64)
    for thing in scene.objects:
        for letter, (x0, y0, x1, y1) in zip(thing.text, thing.char_boxes):
            row, column = int((y0 + y1) / 2 / scene.size * grid), int((x0 + x1) / 2 / scene.size * grid)
            free = np.flatnonzero(characters[row, column] == 0)
            if len(free):
                characters[row, column, free[0]] = 1 + CHARACTERS.index(letter)
    return characters
