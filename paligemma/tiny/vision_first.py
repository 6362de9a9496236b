"""Vision first: every patch learns to say what it shows, before the model learns to speak.

    python -m paligemma.tiny.vision_first --scenes runs/tiny/scenes --out runs/tiny/vision --steps 3000

A caption is a thin teacher: a dozen words for 128 x 128 pixels. The renderer knows more. It can tell every patch the
class, tint, box, outline and letters of the object it belongs to, and how that object stands among the others (which
from the left, how many of its kind). One linear layer (`PatchHeads`) reads all of that from a patch's features; it is
thrown away when the model ships, and until then keeps the features honest as an auxiliary loss.

Letters: n pictures, G patches in a row, D width of the vision model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.modeling_siglip import SiglipAttention, SiglipVisionConfig, SiglipVisionModel
from paligemma.tiny import world
from paligemma.tiny.recipe_scenes import SHARD, Shard, shard_paths
from paligemma.train import checkpointing
from paligemma.train.loop import TrainConfig, train
from paligemma.train.optimizer import muon_and_adamw

# What a patch predicts, and how many numbers that takes.
HEADS = {
    "class": 1 + len(world.LABELS),
    "tint": 1 + len(world.TINTS),
    "background": len(world.BACKGROUNDS),
    "box": 4,
    "mask": 64,
    "characters": 2 * (1 + len(world.CHARACTERS)),
    "order": 7,  # 0 background, else which object from the left
    "same": 7,  # how many objects have its label
    "total": 7,  # how many objects there are
    "edges": 4 * 64,  # where its box is in the picture, in the waves that location tokens begin with
}
NONE = -100  # no target here
GREY = 0.15  # share of the pictures that lose their colours

VISION = SiglipVisionConfig(
    hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, image_size=128, patch_size=16
)


class PatchHeads(nn.Module):
    """Features [n, P, D] -> one tensor [n, P, size] for each of HEADS, and the loss against what the renderer knows."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(HEADS.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return dict(zip(HEADS, self.linear(features).float().split(list(HEADS.values()), dim=-1)))

    def loss(self, features: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The sum of all heads' losses, and figures for the log (their means, and how often the heads are right)."""
        said = {name: value.flatten(0, 1) for name, value in self(features).items()}  # [n * P, size]
        label = targets["class"].flatten()
        thing = label > 0
        background = said["background"]
        # There are three times as many background patches as all others: without weights they would be most of the
        # loss.
        weight = torch.where(thing, 1.0, 0.25)

        def weighted(name: str) -> Tensor:
            loss = F.cross_entropy(said[name], targets[name].flatten(), reduction="none", ignore_index=NONE)
            return (loss * weight).sum() / weight.sum()

        parts = {name: weighted(name) for name in ("class", "tint", "order")}
        parts["background"] = F.cross_entropy(background, targets["background"].flatten())
        parts["total"] = F.cross_entropy(said["total"], targets["total"].flatten())
        parts["same"] = F.cross_entropy(said["same"][thing], targets["same"].flatten()[thing])
        off = (said["box"][thing] - targets["box"].flatten(0, 1)[thing]).abs()
        parts["box"] = off.mean()
        parts["mask"] = F.binary_cross_entropy_with_logits(said["mask"][thing], targets["mask"].flatten(0, 1)[thing])
        letters = said["characters"].unflatten(-1, (2, -1)).flatten(0, 1)
        letter = targets["characters"].flatten()
        on_sign = (label == len(world.LABELS)).repeat_interleave(2)
        parts["characters"] = F.cross_entropy(letters[on_sign], letter[on_sign]) if on_sign.any() else letters.sum() * 0
        waves_off = (said["edges"][thing] - waves(targets["edges"].flatten(0, 1)[thing]).flatten(1)).square()
        parts["edges"] = waves_off.mean()
        loss = (
            parts["class"] + 0.5 * parts["tint"] + 0.25 * parts["background"] + 10 * parts["box"] + parts["mask"]
            + 2 * parts["characters"] + 0.4 * parts["order"] + 0.3 * parts["same"] + 0.2 * parts["total"]
            + 4 * parts["edges"]
        )  # fmt: skip
        with torch.no_grad():
            figures = {f"loss/{name}": float(value) for name, value in parts.items()}
            figures["class"] = float((said["class"].argmax(-1) == label)[thing].float().mean())
            figures["tint"] = float((said["tint"].argmax(-1) == targets["tint"].flatten())[thing].float().mean())
            figures["order"] = float((said["order"].argmax(-1) == targets["order"].flatten())[thing].float().mean())
            figures["total"] = float((said["total"].argmax(-1) == targets["total"].flatten()).float().mean())
            figures["box_px"] = float(off.mean()) * 128
            written = on_sign & (letter > 0)
            figures["letters"] = float((letters.argmax(-1) == letter)[written].float().mean()) if written.any() else 0.0
        return loss, figures


def targets_of(shard: Shard, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures uint8 [n, S, S, 3], some of them mirrored (bool [n]), and their patches' targets [n, G * G, ...]."""
    a = shard.arrays
    image = a["image"][rows]
    index = a["index"][rows].astype(np.int64)
    count = np.array([len(shard.facts["objects"][i]) for i in rows])
    labels = [[thing["label"] for thing in shard.facts["objects"][i]] for i in rows]
    # lookup[n, k]: what holds for object k - 1; 0 is the background
    order, same = np.zeros((2, len(rows), 8), np.int64)
    edges = np.zeros((len(rows), 8, 4), np.float32)  # in sides of the picture
    for n, names in enumerate(labels):
        boxes = np.array([thing["box"] for thing in shard.facts["objects"][rows[n]]], np.float32)
        boxes /= shard.facts["scenes"][rows[n]]["size"]
        edges[n, 1 : 1 + len(names)] = boxes if not mirrored[n] else np.abs(boxes[:, [2, 1, 0, 3]] - [1, 0, 1, 0])
        same[n, 1 : 1 + len(names)] = [names.count(name) for name in names]
        if mirrored[n]:  # then the first from the left is the one whose right edge was last
            ends = [-thing["box"][2] for thing in shard.facts["objects"][rows[n]]]
            order[n, 1 : 1 + len(names)] = 1 + np.argsort(np.argsort(ends, kind="stable"))
        else:
            order[n, 1 : 1 + len(names)] = 1 + np.arange(len(names))
    pick = np.arange(len(rows))[:, None, None]
    targets = {
        "class": a["class"][rows].astype(np.int64),
        "tint": a["tint"][rows].astype(np.int64),
        "box": a["box"][rows],
        "mask": np.unpackbits(a["mask"][rows][..., None], axis=-1).astype(np.float32),  # [n, G, G, 8, 8]
        "characters": a["characters"][rows].astype(np.int64),
        "order": order[pick, index + 1],
        "edges": edges[pick, index + 1],
        "same": same[pick, index + 1],
    }
    if mirrored.any():
        image[mirrored] = image[mirrored][:, :, ::-1]
        for name in targets:
            targets[name][mirrored] = targets[name][mirrored][:, :, ::-1]
        targets["mask"][mirrored] = targets["mask"][mirrored][..., ::-1]
        box = targets["box"][mirrored]
        targets["box"][mirrored] = np.stack([-box[..., 2], box[..., 1], -box[..., 0], box[..., 3]], -1)
    shape = index.shape
    targets["background"] = np.broadcast_to(a["background"][rows].astype(np.int64)[:, None, None], shape)
    targets["total"] = np.broadcast_to(count[:, None, None], shape)
    flat = {name: value.reshape(len(rows), shape[1] * shape[2], *value.shape[3:]) for name, value in targets.items()}
    flat["mask"] = flat["mask"].reshape(len(rows), -1, 64)
    return image, flat


def without_color(image: np.ndarray, target: dict[str, np.ndarray], chosen: np.ndarray) -> None:
    """Greys some pictures, in place, and takes their colours out of the targets.

    A tint that training withholds from a class ("green shirt") would otherwise teach that green things are no shirts.
    A grey shirt teaches the shape and shows nothing of what is withheld.
    """
    grey = image[chosen].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    image[chosen] = np.round(grey).astype(np.uint8)[..., None]
    for name in ("tint", "background"):
        target[name] = np.where(chosen[:, None], NONE, target[name])


def waves(place: Tensor) -> Tensor:
    """[...] in [0, 1] -> [..., 64]: sines and cosines of 32 lengths, from four sides of the picture to three pixels."""
    angles = 2 * math.pi * place[..., None] * 2.0 ** torch.linspace(-2, 5.5, 32)
    return torch.cat([angles.sin(), angles.cos()], -1)


def pixels(image: np.ndarray) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] in [-1, 1], as the processor makes them."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class SceneBatches:
    """Batches of pictures and their patches' targets, from the shards that are in the folder by now.

    A part of a step takes its scenes from four shards, shuffled together; when they are used up, from four others.
    """

    def __init__(self, folder: Path, size: int, seed: int = 0, mixed: int = 4):
        self.folder, self.size, self.seed, self.mixed = folder, size, seed, mixed
        self._round: tuple[int, int] | None = None
        self._shards: list[Shard] = []
        self._places: list[np.ndarray] = []

    def __call__(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        share = self.size // parts // self.mixed
        round_, place = divmod(step, SHARD // share)
        if self._round != (round_, part):
            rng = np.random.default_rng([self.seed, round_, part])
            paths = shard_paths(self.folder)
            if len(paths) < self.mixed:
                raise FileNotFoundError(f"too few scenes in {self.folder}: python -m paligemma.tiny.recipe_scenes")
            self._shards = [Shard.load(paths[i]) for i in rng.choice(len(paths), self.mixed, replace=False)]
            self._places = [rng.permutation(SHARD) for _ in self._shards]
            self._round = round_, part
        rng = np.random.default_rng([self.seed, step, part, 1])
        made = []
        for shard, places in zip(self._shards, self._places):
            rows = places[place * share : (place + 1) * share]
            signs = np.array([any(thing["text"] for thing in shard.facts["objects"][i]) for i in rows])
            image, target = targets_of(shard, rows, (rng.random(len(rows)) < 0.5) & ~signs)
            without_color(image, target, rng.random(len(rows)) < GREY)
            made.append((image, target))
        targets = {name: torch.from_numpy(np.concatenate([m[1][name] for m in made])) for name in made[0][1]}
        return {"pixel_values": pixels(np.concatenate([m[0] for m in made])), **targets}


class Vision(nn.Module):
    """The vision model and its heads, trained together."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.model, self.heads = SiglipVisionModel(config), PatchHeads(config.hidden_size)
        initialize(self)
        for module in self.modules():
            if isinstance(module, SiglipAttention):
                module.explicit = True


def vision_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float, dict[str, float]]:
    features = model.model(batch["pixel_values"])
    with torch.autocast("cpu", enabled=False):
        loss, figures = model.heads.loss(features.float(), batch)
    n = len(features)
    return loss * n, n, {name: value * n for name, value in figures.items()}


def train_vision(
    config: SiglipVisionConfig,
    scenes: Path,
    out: Path,
    steps: int,
    batch: int = 128,
    lr: float = 3e-3,
    minutes: float | None = None,
    decay_from: float = 0.6,
    start: Path | None = None,
) -> Vision:
    """Train (or go on training) for `steps` in all; gives the average of the last weights."""
    torch.manual_seed(0)
    vision = Vision(config)
    if start is not None:
        vision.load_state_dict(checkpointing.load(start)["average"])
    optimizers = muon_and_adamw(vision, lr=lr, adamw_lr=lr / 2)
    settings = TrainConfig(
        steps=steps, warmup=0.01, schedule="linear", decay_from=decay_from, ema=0.998, minutes=minutes, log_every=20,
        save_every=90
    )  # fmt: skip
    train(vision, SceneBatches(scenes, batch), settings, out, loss=vision_loss, optimizers=optimizers)
    return vision


def initialize(model: nn.Module) -> None:
    """Linear layers as ViTs begin: variance 1 / inputs, biases zero, positions small."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and name.endswith("position_embedding"):
            nn.init.normal_(module.weight, std=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the vision model on what every patch shows.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    train_vision(
        VISION, args.scenes, args.out, args.steps, args.batch, args.lr, args.minutes, args.decay_from, args.weights
    )


if __name__ == "__main__":
    main()
