"""Writes scenes of the small world as a data set: pictures, prompts with answers, and annotations in COCO's format.

    write_scenes(20, "folder")
    folder/images/test_000000.png ...
    folder/rows.jsonl    {"image": "images/test_000000.png", "task": "caption", "prefix": "caption en", "suffix": "..."}
    folder/coco.json     bounding boxes and masks (uncompressed run lengths) of every object

The pictures are made of other people's drawings: read ARTWORK.md before you pass them on.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from paligemma.answers.formats import rle_encode
from paligemma.files import new_folder_written_whole
from paligemma.tiny.rows import asker, rows
from paligemma.tiny.varied import render_in_world
from paligemma.tiny.world import LABELS, SHIPPED, Scene

ATTRIBUTION = (
    "Pictograms by Google (Noto Color Emoji, OFL 1.1), OpenMoji (CC BY-SA 4.0) or Twemoji (CC BY 4.0): "
    "each image says which. Pictures with OpenMoji's drawings may be shared under CC BY-SA 4.0 only."
)
ATTRIBUTION_OF_WORLD_2 = (
    "Pictograms by Google (noto: OFL 1.1; noto-v1: Apache-2.0), OpenMoji (CC BY-SA 4.0), Twemoji (CC BY 4.0), "
    "Microsoft (fluent, fluent-flat: MIT) or EmojiOne (CC BY 4.0): each image says which; mixed: several of them. "
    "Pictures of the styles openmoji and mixed may be shared under CC BY-SA 4.0 only."
)


def coco_image(scene: Scene, name: str, image_id: int) -> dict[str, Any]:
    """A picture as an image of COCO, with what else is known of it."""
    image: dict[str, Any] = {
        "id": image_id,
        "file_name": name,
        "width": scene.size,
        "height": scene.size,
        "background": scene.background,
        "style": scene.style,
        "seed": scene.seed,
    }
    if scene.world != 1:
        image |= {"world": scene.world, "degradations": [list(degradation) for degradation in scene.degradations]}
    return image


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The objects of a scene as COCO instances; category ids are 1 + index in LABELS, boxes are x, y, width, height."""
    annotations = []
    for i, thing in enumerate(scene.objects):
        x0, y0, x1, y1 = thing.box
        annotation: dict[str, Any] = {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": 1 + LABELS.index(thing.label),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": thing.area,
            "iscrowd": 0,
            "segmentation": rle_encode(thing.mask),
        }
        if thing.tint:
            annotation["tint"] = thing.tint
        if thing.color:
            annotation["color"] = thing.color
        if thing.text:
            annotation["text"] = thing.text
        annotations.append(annotation)
    return annotations


def write_scenes(
    count: int,
    folder: str | Path,
    split: str = "test",
    size: int = 384,
    seed: int = 0,
    *,
    style: str | None = None,
    world: int = SHIPPED,
    progress: bool = True,
    **difficulty: Any,
) -> Path:
    """The `count` scenes from `seed` on, each with one row for every task that it allows but "segment". Returns the
    folder.

    Everything is written into a temporary folder that is renamed at the end, so `folder` is complete or does not exist.

    style, difficulty:    as for `render`, in world 2 for `render_varied`. style="noto" avoids OpenMoji's share-alike.
    world:                1, or 2 with more artists and variety, see varied.py.
    progress:             a progress bar on stderr.

    Raises FileExistsError if the folder exists and is not empty, and ValueError for a count below 1.
    """
    folder = Path(folder)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with new_folder_written_whole(folder) as beside:
        (beside / "images").mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        with open(beside / "rows.jsonl", "w", encoding="utf-8") as lines:
            for number in with_progress(range(seed, seed + count), progress):
                scene = render_in_world(world, number, split, size, style, **difficulty)
                name = f"images/{split}_{number:06d}.png"
                Image.fromarray(scene.image).save(beside / name)
                for row in rows(scene, asker(scene), canonical=True):
                    line = {"image": name, "task": row.task, "prefix": row.prefix, "suffix": row.suffix}
                    lines.write(json.dumps(line) + "\n")
                images.append(coco_image(scene, name, len(images) + 1))
                annotations += coco_annotations(scene, len(images), len(annotations) + 1)
        attribution = ATTRIBUTION if world == 1 else ATTRIBUTION_OF_WORLD_2
        data = {
            "info": {"description": f"scenes of the small world, split {split}", "attribution": attribution},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": label} for i, label in enumerate(LABELS, 1)],
        }
        (beside / "coco.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def with_progress(seeds: Sequence[int], progress: bool) -> Iterable[int]:
    """The seeds one by one, with a progress bar on a terminal. (In a log file the bar would leave an empty line.)"""
    console = Console(stderr=True)
    show = progress and console.is_terminal
    return track(seeds, "drawing scenes", console=console, disable=not show, transient=True)
