"""Scenes rendered ahead into files, so that training never waits for the renderer.

    python -m paligemma.tiny.recipe.shards --folder runs/tiny/scenes --shards 200

A shard is one `.npz` of 512 scenes: pictures at the model's size, what every patch shows (`patch_targets`), and the
objects with their masks, from which any prompt can be made later (`Shard.scene`). The number of a shard determines its
seeds, so a folder can be deleted and rendered again. Training uses a scene several times, mirrored and with other
prompts, so rendering takes a twentieth of the time.

Half of the scenes (three in four of world 2) are rendered at the model's size, the others at twice that size and
reduced as the processor would do it, because users have pictures of both kinds. A third has more signs than usual,
in world 1 with larger letters. Shards from number `SIGNS` on have only such scenes, because reading is learned last and
needs practice. In world 2, most drawings are changed (`redrawing.py`).

A folder named `pages` (`pages_of`) holds shards of pages (`pages.py`) instead of scenes.
"""

import functools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paligemma.files import written_whole
from paligemma.tiny import world
from paligemma.tiny.pages import render_page
from paligemma.tiny.recipe.patch_targets import patch_targets
from paligemma.tiny.recipe.settings import FIRST, RECIPES, Recipe
from paligemma.tiny.renderer import render
from paligemma.tiny.varied import render_in_world

SHARD = 512
REDRAWN = 0.65  # of the drawings in world 2
SIGNS = 5000  # from this shard on, most scenes have a sign


def training_scene(seed: int, split: str = "train", recipe: Recipe = FIRST, redraw: float = REDRAWN) -> world.Scene:
    """The scene of a seed, with the mixture of sizes and signs described above."""
    size = recipe.image_size if seed % (2 * recipe.world) else 2 * recipe.image_size
    kind = seed // 2 % (7 if seed < SIGNS * SHARD else 2)
    if recipe.world == 2:
        more_signs: dict[str, Any] = {"sign": 0.75, "sign_only": 0.2} if kind < 2 else {}
        return render_in_world(2, seed, split, size, redraw=redraw, **more_signs)
    if kind == 0:  # large letters
        return render(seed, split, size, sign=0.7, sign_only=0.25, text_length=(1, 3), char_size=(0.14, 0.3))
    if kind == 1:
        return render(seed, split, size, sign=0.8, sign_only=0.2)
    return render(seed, split, size)


def training_page(seed: int, recipe: Recipe = FIRST) -> world.Scene:
    """The page of a seed, in the same mixture of sizes."""
    size = recipe.image_size if seed % 4 else 2 * recipe.image_size
    return render_page(seed, "train", size, redraw=REDRAWN)


def pages_of(scenes: Path) -> Path:
    """The folder of the pages beside these scenes."""
    return scenes / "pages"


def picture(scene: world.Scene, side: int = FIRST.image_size) -> np.ndarray:
    """The scene at the model's size: uint8 [side, side, 3]."""
    if scene.size == side:
        return scene.image
    return np.asarray(Image.fromarray(scene.image).resize((side, side), Image.Resampling.BICUBIC))


def pack(scenes: list[world.Scene], recipe: Recipe = FIRST) -> dict[str, np.ndarray]:
    """The arrays of a shard."""
    targets = [patch_targets(scene, recipe.grid) for scene in scenes]
    arrays = {name: np.stack([t[name] for t in targets]) for name in targets[0]}
    objects: list[list[dict[str, Any]]] = []
    masks = []
    for scene in scenes:
        objects.append([])
        for thing in scene.objects:
            x0, y0, x1, y1 = (int(edge) for edge in thing.box)
            masks.append(np.packbits(thing.mask[y0:y1, x0:x1]))
            facts: dict[str, Any] = {
                "label": thing.label,
                "tint": thing.tint,
                "box": thing.box,
                "visible": thing.visible,
            }
            facts |= {"text": thing.text, "chars": thing.char_boxes}
            objects[-1].append(facts | ({"color": thing.color} if scene.world == 2 else {}))
    facts_of_scenes = [
        {
            "size": s.size,
            "background": s.background,
            "pattern": s.pattern,
            "style": s.style,
            "seed": s.seed,
            "split": s.split,
            **({"world": 2} if s.world == 2 else {}),
        }
        for s in scenes
    ]
    return {
        "image": np.stack([picture(scene, recipe.image_size) for scene in scenes]),
        "class": arrays["class"].astype(np.int8),
        "tint": arrays["tint"].astype(np.int8),
        "background": arrays["background"].astype(np.int8),
        "index": arrays["index"].astype(np.int8),
        "box": arrays["box"].astype(np.float32),
        "mask": np.packbits(arrays["mask"], axis=-1)[..., 0],  # [n, G, G, 8] bytes
        "characters": arrays["characters"].astype(np.int8),
        "object_masks": np.concatenate(masks),
        "mask_ends": np.cumsum([len(mask) for mask in masks]),
        "facts": np.frombuffer(json.dumps({"scenes": facts_of_scenes, "objects": objects}).encode(), np.uint8),
    }


@dataclass
class Shard:
    """One file of scenes. `arrays` as `pack` makes them."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.arrays["image"])

    @classmethod
    def load(cls, path: Path) -> "Shard":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(arrays, json.loads(arrays.pop("facts").tobytes()))

    @cached_property
    def first_object(self) -> np.ndarray:
        """The number of each scene's first object among those of the shard, and how many these are: [scenes + 1]."""
        return np.cumsum([0] + [len(things) for things in self.facts["objects"]])

    def scene(self, i: int) -> world.Scene:
        """Scene i without its full-size picture: masks and boxes are in pixels of the size it was rendered at."""
        ends = self.arrays["mask_ends"]
        facts = self.facts["scenes"][i]
        things = []
        for j, thing in enumerate(self.facts["objects"][i], self.first_object[i]):
            bits = self.arrays["object_masks"][ends[j - 1] if j else 0 : ends[j]]
            x0, y0, x1, y1 = (int(edge) for edge in thing["box"])
            mask = np.zeros((facts["size"], facts["size"]), bool)
            mask[y0:y1, x0:x1] = np.unpackbits(bits, count=(y1 - y0) * (x1 - x0)).reshape(y1 - y0, x1 - x0)
            chars = tuple(tuple(box) for box in thing["chars"])
            things.append(
                world.SceneObject(
                    thing["label"],
                    thing["tint"],
                    tuple(thing["box"]),
                    mask,
                    thing["visible"],
                    thing["text"],
                    chars,
                    thing.get("color"),
                )
            )
        # `Scene.size` is the size of the picture, so this one has the size that boxes and masks are measured in.
        image = np.broadcast_to(np.uint8(0), (facts["size"], facts["size"], 3))
        return world.Scene(
            image,
            tuple(things),
            facts["background"],
            facts["pattern"],
            facts["style"],
            facts["seed"],
            facts["split"],
            facts.get("world", 1),
        )


def pixels(image: np.ndarray) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] in [-1, 1], as the processor makes them."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def shard_paths(folder: Path) -> list[Path]:
    """The finished shards in order, without the codes beside them."""
    return sorted(folder.glob("[0-9]*[0-9].npz"))


def some_shards(folder: Path, count: int, rng: np.random.Generator) -> list[Path]:
    """So many different shards, chosen by chance. Raises FileNotFoundError if there are too few."""
    paths = shard_paths(folder)
    if len(paths) < count:
        raise FileNotFoundError(f"too few shards in {folder}: {len(paths)}, and {count} are needed")
    return [paths[i] for i in rng.choice(len(paths), count, replace=False)]


def shard_number(path: Path) -> int:
    return int(path.stem)


def write_shard(folder: Path, number: int, recipe: Recipe = FIRST) -> None:
    """Render shard `number`, unless the file exists."""
    path = shard_path(folder, number)
    if path.exists():
        return
    draw = training_page if folder.name == "pages" else training_scene
    arrays = pack([draw(number * SHARD + i, recipe=recipe) for i in range(SHARD)], recipe)
    with written_whole(path) as beside:
        np.savez(beside, **arrays)  # type: ignore[arg-type]


def write_shards(
    folder: Path, numbers: Sequence[int], recipe: Recipe, processes: int = 1, minutes: float = math.inf
) -> int:
    """Render these shards, in several processes; none is begun after `minutes`. Returns how many exist then."""
    missing = [number for number in numbers if not shard_path(folder, number).exists()]
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    if processes == 1 or len(missing) < 2:
        for number in missing:
            if time.monotonic() > end:
                break
            write_shard(folder, number, recipe=recipe)
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for first in range(0, len(missing), processes):
                if time.monotonic() > end:
                    break
                group = missing[first : first + processes]
                list(pool.map(functools.partial(write_shard, folder, recipe=recipe), group))
    return len(shard_paths(folder))


@contextmanager
def rendering_beside(folder: Path, recipe: Recipe, share: float = 0.2) -> Iterator[None]:
    """New scenes and pages are rendered by another process meanwhile, on about `share` of a core, until there are as
    many shards as the recipe wants. What training has not seen yet is worth more than its steps on old scenes."""
    context = multiprocessing.get_context("spawn")  # a forked process would inherit the threads of PyTorch
    process = context.Process(target=_render_slowly, args=(folder, recipe, share), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _render_slowly(folder: Path, recipe: Recipe, share: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which ends this process afterwards
    training = os.getppid()  # if that is killed, another process becomes the parent
    wanted = {folder: recipe.shards, pages_of(folder): recipe.page_shards}
    while os.getppid() == training:
        missing = [place for place, shards in wanted.items() if len(shard_paths(place)) < shards]
        if not missing:
            break
        for place in missing:
            begun = time.monotonic()  # not the processor's: where the training waits for it, this process waits as long
            write_shards(place, [next_number(place)], recipe)
            time.sleep((time.monotonic() - begun) * (1 / share - 1))


def next_number(folder: Path) -> int:
    """The number after the last shard."""
    return max((shard_number(path) + 1 for path in shard_paths(folder)), default=0)


def make_room(folder: Path, shards: int) -> None:
    """Delete all but the newest `shards`, with their mask codes."""
    for path in shard_paths(folder)[: -shards or None]:
        path.with_suffix(".codes.npy").unlink(missing_ok=True)
        path.unlink()


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Render scenes ahead of training.")
    parser.add_argument("--folder", type=Path, required=True, help="where the shards are written")
    parser.add_argument("--shards", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--world", type=int, choices=(1, 2), default=world.SHIPPED)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    write_shards(args.folder, range(args.first, args.first + args.shards), RECIPES[args.world], args.processes)


if __name__ == "__main__":
    main()
