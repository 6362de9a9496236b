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
from paligemma.tiny.renderer import render
from paligemma.tiny.rows import TASKS, EncodeMask, asker, rows
from paligemma.tiny.world import LABELS, Scene

ATTRIBUTION = (
    "Pictograms by Google (Noto Color Emoji, OFL 1.1), OpenMoji (CC BY-SA 4.0) or Twemoji (CC BY 4.0): "
    "each image says which. Pictures with OpenMoji's drawings may be shared under CC BY-SA 4.0 only."
)


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
    tasks: Sequence[str] = TASKS,
    canonical: bool = True,
    encode_mask: EncodeMask | None = None,
    progress: bool = True,
    **difficulty: Any,
) -> Path:
    """The `count` scenes from `seed` on, each with one row for every task that it allows. Returns the folder.

    Everything is written into a temporary folder that is renamed at the end, so `folder` is complete or does not exist.

    style, difficulty:    as for `render`. style="noto" gives pictures without share-alike.
    tasks, canonical, encode_mask: as for `rows`. Segment prompts are left out without `encode_mask`.
    progress:             a progress bar on stderr.

    Raises FileExistsError if the folder exists and is not empty, and ValueError for a count below 1.
    """
    folder = Path(folder)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with new_folder_written_whole(folder) as beside:
        _write(
            beside, range(seed, seed + count), split, size, style, tasks, canonical, encode_mask, progress, difficulty
        )
    return folder


def with_progress(seeds: Sequence[int], progress: bool) -> Iterable[int]:
    """The seeds one by one, with a progress bar on a terminal. (In a log file the bar would leave an empty line.)"""
    console = Console(stderr=True)
    show = progress and console.is_terminal
    return track(seeds, "drawing scenes", console=console, disable=not show, transient=True)


def _write(
    folder: Path,
    seeds: range,
    split: str,
    size: int,
    style: str | None,
    tasks: Sequence[str],
    canonical: bool,
    encode_mask: EncodeMask | None,
    progress: bool,
    difficulty: dict[str, Any],
) -> None:
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as lines:
        for seed in with_progress(seeds, progress):
            scene = render(seed, split, size, style, **difficulty)
            name = f"images/{split}_{seed:06d}.png"
            Image.fromarray(scene.image).save(folder / name)
            for row in rows(scene, asker(scene), tasks=tasks, canonical=canonical, encode_mask=encode_mask):
                line = {"image": name, "task": row.task, "prefix": row.prefix, "suffix": row.suffix}
                lines.write(json.dumps(line) + "\n")
            image_id = len(images) + 1
            images.append(
                {
                    "id": image_id,
                    "file_name": name,
                    "width": size,
                    "height": size,
                    "background": scene.background,
                    "style": scene.style,
                    "seed": seed,
                }
            )
            annotations += coco_annotations(scene, image_id, len(annotations) + 1)
    categories = [{"id": i, "name": label} for i, label in enumerate(LABELS, 1)]
    data = {
        "info": {"description": f"scenes of the small world, split {split}", "attribution": ATTRIBUTION},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "coco.json").write_text(json.dumps(data), encoding="utf-8")
