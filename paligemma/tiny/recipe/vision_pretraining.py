"""Stage 1 of the recipe: the vision model learns to say what every patch shows, before there is a language model.

    python -m paligemma.tiny.recipe.vision_pretraining --scenes runs/tiny/scenes --out runs/tiny/vision --steps 3000

A caption is weak supervision: a dozen words for 192 x 192 pixels. The renderer knows more. For every patch it knows
the class, tint, box, outline and letters of the object it belongs to, its rank from the left, how many objects have the
same class, and the mask codes of its part of the outline. One linear layer (`PatchHeads`) predicts all of that from a
patch's features. It stays as an auxiliary loss in stage 2 and is thrown away when the model ships.

Letters: n pictures, G patches in a row, P = G x G patches, D width of the vision model, K mask codes.
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

from paligemma.answers.mask_codec import GRID as CODES_ACROSS
from paligemma.answers.mask_codec import MaskCodec
from paligemma.files import written_whole
from paligemma.modeling_gemma import GemmaAttention
from paligemma.modeling_siglip import SiglipAttention, SiglipVisionConfig, SiglipVisionModel
from paligemma.tiny import world
from paligemma.tiny.pages import PATTERN
from paligemma.tiny.recipe.ahead import Ahead
from paligemma.tiny.recipe.codec import code_similarity, mask_codes
from paligemma.tiny.recipe.pieces import until
from paligemma.tiny.recipe.settings import RECIPES, Recipe, autocast_dtype
from paligemma.tiny.recipe.shards import SHARD, Shard, pack, pages_of, pixels, some_shards, training_scene
from paligemma.train import checkpointing, distributed
from paligemma.train.loop import TrainConfig, Validate, train
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
    "edges": 4 * 64,  # where its box is in the picture, encoded as the initial embeddings of location tokens are
    "codes": 4 * 128,  # which mask code its object has at the middle of each quarter of the patch
}
NONE = -100  # no target here
GREY = 0.15  # share of the pictures that lose their colours
VALIDATION = 512  # scenes
MIRRORED = 0.3  # share of the pictures without a sign that are mirrored


class PatchHeads(nn.Module):
    """Features [n, P, D] -> one tensor [n, P, size] for each of HEADS, and their loss."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(HEADS.values()))
        self.similarity: Tensor  # [K, K], see `code_similarity`; without a codec every code is similar only to itself
        self.register_buffer("similarity", torch.eye(HEADS["codes"] // 4), persistent=False)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return dict(zip(HEADS, self.linear(features).float().split(list(HEADS.values()), dim=-1)))

    def loss(self, features: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of all heads' losses, and figures for the log: losses, and how often the heads are right."""
        predicted = {name: value.flatten(0, 1) for name, value in self(features).items()}  # [n * P, size]
        label = targets["class"].flatten()
        thing = label > 0
        # Three patches of four are background: without weights they would dominate the loss.
        weight = torch.where(thing, 1.0, 0.25)

        def weighted(name: str) -> Tensor:
            loss = F.cross_entropy(predicted[name], targets[name].flatten(), reduction="none", ignore_index=NONE)
            return (loss * weight).sum() / weight.sum()

        def mean(values: Tensor) -> Tensor:
            return values.sum() / max(values.numel(), 1)  # a small batch may have none

        def known_mean(name: str, patches: Tensor) -> Tensor:
            """Over those of the patches that have a target: backgrounds of many colours have no name."""
            target = targets[name].flatten()
            patches = patches & (target != NONE)
            return mean(F.cross_entropy(predicted[name][patches], target[patches], reduction="none"))

        parts = {name: weighted(name) for name in ("class", "tint", "order")}
        parts["background"] = known_mean("background", torch.ones_like(thing))
        parts["total"] = known_mean("total", torch.ones_like(thing))
        parts["same"] = known_mean("same", thing)
        off = (predicted["box"][thing] - targets["box"].flatten(0, 1)[thing]).abs()
        parts["box"] = mean(off)
        outline = targets["mask"].flatten(0, 1)[thing]
        parts["mask"] = mean(F.binary_cross_entropy_with_logits(predicted["mask"][thing], outline, reduction="none"))
        letters = predicted["characters"].unflatten(-1, (2, -1)).flatten(0, 1)
        letter = targets["characters"].flatten()
        on_sign = (label == len(world.LABELS)).repeat_interleave(2)
        parts["characters"] = F.cross_entropy(letters[on_sign], letter[on_sign]) if on_sign.any() else letters.sum() * 0
        waves_off = (predicted["edges"][thing] - waves(targets["edges"].flatten(0, 1)[thing]).flatten(1)).square()
        parts["edges"] = mean(waves_off)
        code = targets["codes"].flatten(0, 1).flatten()  # [n * P * 4]
        known = code != NONE
        logp = predicted["codes"].unflatten(-1, (4, -1)).flatten(0, 1)[known].log_softmax(-1)  # [codes, K]
        parts["codes"] = -(self.similarity[code[known]] * logp).sum() / max(len(logp), 1)
        loss = (
            parts["class"] + 0.5 * parts["tint"] + 0.25 * parts["background"] + 10 * parts["box"] + parts["mask"]
            + 2 * parts["characters"] + 0.4 * parts["order"] + 0.3 * parts["same"] + 0.2 * parts["total"]
            + 4 * parts["edges"] + parts["codes"]
        )  # fmt: skip
        figures = {f"loss/{name}": float(value.detach()) for name, value in parts.items()}
        for name, chosen in (("class", thing), ("tint", thing), ("order", thing), ("total", thing | ~thing)):
            target = targets[name].flatten()
            figures[name] = float((predicted[name].argmax(-1) == target)[chosen & (target != NONE)].float().mean())
        figures["box_px"] = float(mean(off.detach())) * 128  # at a side of 128 pixels
        figures["codes"] = float((logp.argmax(-1) == code[known]).float().mean()) if known.any() else 0.0
        written = on_sign & (letter > 0)
        figures["letters"] = float((letters.argmax(-1) == letter)[written].float().mean()) if written.any() else 0.0
        return loss, figures


def stored_targets(
    shard: Shard, rows: np.ndarray, mirrored: np.ndarray, codes: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures uint8 [n, S, S, 3], mirrored where `mirrored` [n] is True, and their patches' targets [n, G * G, ...].

    codes: mask codes of all objects of the shard [objects, 16]. Mirrored outlines have other codes, so mirrored
    pictures get none.
    """
    a = shard.arrays
    image = a["image"][rows]
    index = a["index"][rows].astype(np.int64)
    count = np.array([len(shard.facts["objects"][i]) for i in rows])
    order, same, edges = _facts_by_index(shard, rows, mirrored)
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
        "codes": codes_of_quarters(shard, rows, codes) if codes is not None else np.full((*index.shape, 4), NONE),
    }
    targets["codes"][mirrored] = NONE
    if mirrored.any():
        image[mirrored] = image[mirrored][:, :, ::-1]
        for name in targets:
            targets[name][mirrored] = targets[name][mirrored][:, :, ::-1]
        targets["mask"][mirrored] = targets["mask"][mirrored][..., ::-1]
        box = targets["box"][mirrored]
        targets["box"][mirrored] = np.stack([-box[..., 2], box[..., 1], -box[..., 0], box[..., 3]], -1)
    shape = index.shape
    targets["background"] = np.broadcast_to(a["background"][rows].astype(np.int64)[:, None, None], shape)
    targets["total"] = np.broadcast_to(np.where(count < HEADS["total"], count, NONE)[:, None, None], shape)
    flat = {name: value.reshape(len(rows), shape[1] * shape[2], *value.shape[3:]) for name, value in targets.items()}
    flat["mask"] = flat["mask"].reshape(len(rows), -1, 64)
    return image, flat


def _facts_by_index(shard: Shard, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of object k - 1 of scene n, at [n, k] (k = 0 is the background): its rank from the left, how many objects have
    its label, and its edges [n, k, 4] in sides of the picture. On pages, nobody asks for rank or number."""
    most = 1 + max((len(shard.facts["objects"][row]) for row in rows), default=0)
    order, same = np.zeros((2, len(rows), most), np.int64)
    edges = np.zeros((len(rows), most, 4), np.float32)
    for n, row in enumerate(rows):
        things = shard.facts["objects"][row]
        names, used = [thing["label"] for thing in things], slice(1, 1 + len(things))
        boxes = np.array([thing["box"] for thing in things], np.float32)
        boxes /= shard.facts["scenes"][row]["size"]
        same[n, used] = [names.count(name) for name in names]
        if mirrored[n]:  # now the first from the left is the one with the rightmost right edge
            edges[n, used] = np.abs(boxes[:, [2, 1, 0, 3]] - [1, 0, 1, 0])
            order[n, used] = 1 + np.argsort(np.argsort([-thing["box"][2] for thing in things], kind="stable"))
        else:
            edges[n, used] = boxes
            order[n, used] = 1 + np.arange(len(names))
        if shard.facts["scenes"][row]["pattern"] == PATTERN:
            order[n], same[n] = NONE, NONE
    return order, same, edges


def codes_of_quarters(shard: Shard, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The mask code [n, G, G, 4] at the middle of each quarter of a patch (row-major), NONE outside the object's box.

    A code describes a sixteenth of its object's box, so the right answer for a patch depends on the whole box.
    """
    index = shard.arrays["index"][rows].astype(np.int64)  # [n, G, G]
    of_object = codes[shard.first_object[rows][:, None, None] + index.clip(0)]  # [n, G, G, 16]
    x0, y0, x1, y1 = np.moveaxis(shard.arrays["box"][rows], -1, 0)  # relative to the patch's middle, in sides
    quarter = np.array([-0.25, 0.25]) / index.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # background patches have boxes of no size
        column = (quarter - x0[..., None]) / (x1 - x0)[..., None] * CODES_ACROSS  # [n, G, G, 2]
        row = (quarter - y0[..., None]) / (y1 - y0)[..., None] * CODES_ACROSS
    column, row = np.broadcast_arrays(column[..., None, :], row[..., :, None])  # [n, G, G, 2, 2]
    inside = (index >= 0)[..., None, None] & (column > 0) & (column < CODES_ACROSS) & (row > 0) & (row < CODES_ACROSS)
    row, column = (np.where(inside, cell, 0).astype(np.int64) for cell in (row, column))
    place = row * CODES_ACROSS + column
    found = np.take_along_axis(of_object, place.reshape(*index.shape, 4), -1).astype(np.int64)
    return np.where(inside.reshape(*index.shape, 4), found, NONE)


def without_color(image: np.ndarray, target: dict[str, np.ndarray], chosen: np.ndarray) -> None:
    """Make some pictures grey, in place, and remove the colours from their targets.

    If a class is never seen in a held-out tint ("green shirt"), a model learns that green things are no shirts. A grey
    shirt teaches the shape without showing what is held out.
    """
    grey = image[chosen].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    image[chosen] = np.round(grey).astype(np.uint8)[..., None]
    for name in ("tint", "background"):
        target[name] = np.where(chosen[:, None], NONE, target[name])


def augmented_targets(
    shard: Shard, rows: np.ndarray, codes: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`stored_targets` with augmentation: some pictures are mirrored (none with a sign, for its letters), some grey."""
    signs = np.array([any(thing["text"] for thing in shard.facts["objects"][i]) for i in rows], bool)
    image, target = stored_targets(shard, rows, (rng.random(len(rows)) < MIRRORED) & ~signs, codes)
    without_color(image, target, rng.random(len(rows)) < GREY)
    return image, target


def waves(place: Tensor) -> Tensor:
    """Sinusoidal encoding, [...] in [0, 1] -> [..., 64]: 32 wavelengths from 4 picture sides down to 3 pixels."""
    angles = 2 * math.pi * place[..., None] * 2.0 ** torch.linspace(-2, 5.5, 32, device=place.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


class SceneBatches:
    """Batches of pictures and their patches' targets, from the shards that are in the folder at that time.

    Each process takes its pictures from four shards at a time, shuffled together; with `pages`, two of them are shards
    of pages. Without a codec there are no targets for mask codes.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        seed: int = 0,
        mixed: int = 4,
        codec: MaskCodec | None = None,
        pages: bool = False,
    ):
        self.folder, self.size, self.seed, self.mixed = folder, size, seed, mixed
        self.codec, self.pages = codec, pages
        self._round: tuple[int, int] | None = None
        self._shards: list[Shard] = []
        self._places: list[np.ndarray] = []
        self._codes: list[np.ndarray | None] = []

    def __call__(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        share = self.size // parts // self.mixed
        round_, place = divmod(step, SHARD // share)
        if self._round != (round_, part):
            rng = np.random.default_rng([self.seed, round_, part])
            of_pages = self.mixed // 2 if self.pages else 0
            chosen = some_shards(self.folder, self.mixed - of_pages, rng)
            chosen += some_shards(pages_of(self.folder), of_pages, rng)
            self._shards = [Shard.load(path) for path in chosen]
            self._codes = [mask_codes(path, self.codec) if self.codec else None for path in chosen]
            self._places = [rng.permutation(SHARD) for _ in self._shards]
            self._round = round_, part
        rng = np.random.default_rng([self.seed, step, part, 1])
        made = []
        for shard, codes, places in zip(self._shards, self._codes, self._places):
            made.append(augmented_targets(shard, places[place * share : (place + 1) * share], codes, rng))
        targets = {name: torch.from_numpy(np.concatenate([m[1][name] for m in made])) for name in made[0][1]}
        return {"pixel_values": pixels(np.concatenate([m[0] for m in made])), **targets}


class Vision(nn.Module):
    """The vision model with its patch heads."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.model, self.heads = SiglipVisionModel(config), PatchHeads(config.hidden_size)
        initialize(self)
        explicit_attention_on_cpu(self)


def explicit_attention_on_cpu(model: nn.Module) -> None:
    """Written-out attention trains faster on a CPU, fused attention on a GPU."""
    explicit = next(model.parameters()).device.type == "cpu"
    for module in model.modules():
        if isinstance(module, (SiglipAttention, GemmaAttention)):
            module.explicit = explicit


def vision_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float, dict[str, float]]:
    features = model.model(batch["pixel_values"])
    with torch.autocast(features.device.type, enabled=False):
        loss, figures = model.heads.loss(features.float(), batch)
    n = len(features)
    return loss * n, n, {name: value * n for name, value in figures.items()}


def validate_vision(scenes: Path, recipe: Recipe, codec: MaskCodec | None) -> Validate:
    """A function that gives the patch heads' figures on `VALIDATION` scenes that training never sees, as they are drawn
    without any augmentation."""
    path = scenes / "validation.npz"
    if not path.exists():
        drawn = [training_scene(seed, "val", recipe, redraw=0.0) for seed in range(VALIDATION)]
        with written_whole(path) as beside:
            np.savez(beside, **pack(drawn, recipe))  # type: ignore[arg-type]
    shard = Shard.load(path)
    codes = mask_codes(path, codec) if codec is not None else None

    def validate(model: Any, step: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for rows in np.array_split(np.arange(len(shard)), 8):
            image, targets = stored_targets(shard, rows, np.zeros(len(rows), bool), codes)
            batch = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in targets.items()}
            device = next(model.parameters()).device
            batch = {name: value.to(device) for name, value in (batch | {"pixel_values": pixels(image)}).items()}
            with torch.autocast(device.type, autocast_dtype(device), enabled=autocast_dtype(device) is not None):
                loss, _, figures = vision_loss(model, batch)
            for name, value in {"loss": float(loss), **figures}.items():
                sums[name] = sums.get(name, 0.0) + value / len(shard)
        return sums

    return validate


def train_vision(
    recipe: Recipe,
    scenes: Path,
    out: Path,
    minutes: float,
    codec: MaskCodec | None = None,
    *,
    lr: float = 3e-3,
    decay_from: float = 0.6,
    start: dict[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    end: float = math.inf,
    processor_time: bool = False,
) -> Vision:
    """Stage 1 for `minutes` in all, or resume; returns the model.

    start:   weights of either stage, whose vision tower and heads are the initial ones.
    workers: processes that make batches ahead.
    end:     stop when `time.monotonic()` passes it, and raise PieceOver; see pieces.py.
    processor_time: `minutes` are those of this process's processor.
    """
    torch.manual_seed(0)
    vision = Vision(recipe.vision_config())
    if start is not None:
        load_weights(vision, vision_part(start))
    if codec is not None:
        vision.heads.similarity = code_similarity(codec)
    vision.to(device)
    explicit_attention_on_cpu(vision)
    optimizers = muon_and_adamw(vision, lr=lr, adamw_lr=lr / 2)
    settings = TrainConfig(
        steps=10**9, warmup=0.01, schedule="linear", decay_from=decay_from, ema=0.998, minutes=minutes, log_every=20,
        save_every=90, autocast=autocast_dtype(torch.device(device)), processor_time=processor_time, validate_every=400,
    )  # fmt: skip
    validate = validate_vision(scenes, recipe, codec) if distributed.start()[0] == 0 else None
    arguments = {"folder": scenes, "size": recipe.vision_batch, "codec": codec, "pages": recipe.page_shards > 0}
    ahead = Ahead(workers, SceneBatches, **arguments)
    with ahead as batches, until(end) as limited:
        train(
            vision, limited(batches), settings, out, loss=vision_loss, optimizers=optimizers, validate=validate
        )  # fmt: skip
    return vision


def vision_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `Vision` among those of a checkpoint of stage 1 or 2."""
    inner = "model.vision_tower."
    both = any(name.startswith(inner) for name in state)
    return {
        name.replace(inner, "model."): value
        for name, value in state.items()
        if not both or name.startswith((inner, "heads."))
    }


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights of an earlier run that may have fewer patch heads or fewer key/value heads.

    New patch heads keep their initial values. Key/value heads are repeated, which computes the same.
    """
    for name, value in module.state_dict().items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            value.copy_(state[name].repeat(len(value) // len(state[name]), *[1] * (value.ndim - 1)))
        else:
            value[: len(state[name])] = state[name]


def initialize(model: nn.Module) -> None:
    """Initialise linear layers with variance 1 / inputs and zero biases, position embeddings with small values."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and name.endswith("position_embedding"):
            nn.init.normal_(module.weight, std=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the vision model on what every patch shows.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and log")
    parser.add_argument("--scenes", type=Path, required=True, help="folder with shards")
    parser.add_argument("--world", type=int, choices=(1, 2), default=world.SHIPPED, help="whose recipe")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--weights", type=Path, help="checkpoint to start from")
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    codec = MaskCodec.load(args.codec) if args.codec else None
    start = checkpointing.load(args.weights)["average"] if args.weights else None
    train_vision(
        RECIPES[args.world], args.scenes, args.out, args.minutes, codec,
        lr=args.lr, decay_from=args.decay_from, start=start, device=args.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
