"""After stage 2: the mask codec learns to draw from the codes that the model writes.

The codec was trained on the codes of true masks. The model writes others: it finds the right object, but fewer than
one in five of its codes is the one that the codec would give, and a mask drawn from such a mixture is ragged. A decoder
that has seen what the model writes draws what is most likely meant.

Encoder and codebook stay as they are, and with them the meaning of every code. A part of each batch are masks with
their own codes, so that these are drawn as before.

    python -m paligemma.tiny.recipe.mask_decoder --model runs/tiny/package

Letters: N masks.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paligemma.answers.mask_codec import CODEC_FILE, MaskCodec, crop
from paligemma.answers.scores import CALIBRATION_FILE
from paligemma.evaluate.regions import Region, match_by_score
from paligemma.inference import PaliGemma, load
from paligemma.tiny.evaluation import to_region
from paligemma.tiny.recipe.codec import in_bytes, mask_iou
from paligemma.tiny.recipe.settings import RECIPES, Recipe
from paligemma.tiny.recipe.shards import training_scene
from paligemma.tiny.world import SHIPPED

# Scenes that no shard has: what the model writes of pictures that it was trained on is better than of others. They come
# before those in which most things are signs.
FIRST_SEED = 2_000_000
OWN = 0.3  # of a batch are masks with their own codes
UNSEEN = 512  # masks for validation

Pairs = tuple[Tensor, Tensor]  # codes int64 [N, 16], and the masks that they should draw: uint8 [N, 64, 64], 255 inside


def questions(recipe: Recipe, first: int = FIRST_SEED) -> Iterable[tuple[np.ndarray, str, list[Region]]]:
    """(picture, label, the true objects of this label), without end: at most two questions about a scene."""
    for seed in itertools.count(first):
        scene = training_scene(seed, recipe=recipe)
        labels = sorted({thing.label for thing in scene.objects})
        for label in np.random.default_rng(seed).permutation(labels)[:2]:
            yield scene.image, str(label), [to_region(t, masks=True) for t in scene.objects if t.label == label]


def written(pg: PaliGemma, recipe: Recipe, count: int, log: Callable[[str], None] = print) -> tuple[Pairs, Pairs]:
    """`count` masks in the boxes that the model wrote, with the codes that it wrote; and the same masks in their true
    boxes, with the codes that the codec gives them."""
    codes: list[list[int]] = []
    seen: list[np.ndarray] = []
    true: list[np.ndarray] = []
    asked = iter(questions(recipe))
    begun = time.monotonic()
    while len(codes) < count:
        images, labels, things = zip(*itertools.islice(asked, 48))
        answers = pg.generate(list(images), [f"segment {label}" for label in labels])
        for truth, answer in zip(things, answers):
            predicted = [Region(found.label, found.box, score=found.score) for found in answer.segments]
            for i, j, _ in match_by_score(truth, predicted):
                codes.append(answer.segments[i].codes or [])
                seen.append(crop(truth[j].mask, predicted[i].box))
                true.append(crop(truth[j].mask, truth[j].box))
        log(f"{len(codes)} of {count} masks, {time.monotonic() - begun:.0f} s")
    masks = torch.from_numpy(np.stack(true))
    with torch.no_grad():
        own = torch.cat([pg.codec.encode(part) for part in masks.split(256)])
    return (torch.tensor(codes), in_bytes(torch.from_numpy(np.stack(seen)))), (own, in_bytes(masks))


def train_decoder(
    codec: MaskCodec,
    of_model: Pairs,
    own: Pairs,
    steps: int = 3000,
    unseen: int = UNSEEN,
    log: Callable[[str], None] = print,
) -> None:
    """Trains the decoder of `codec` in place on the pairs that `written` returns. The last `unseen` of them are for
    validation."""
    batch, lr = 64, 1e-3
    rows = len(of_model[0]) - unseen
    if rows < batch:
        raise ValueError(f"{len(of_model[0])} masks are too few: {unseen} are for validation, and a step takes {batch}")
    torch.manual_seed(0)
    codec.requires_grad_(False).decoder.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    log(f"before: {_measure(codec, unseen, of_model, own)}")
    for step in range(steps):
        places = torch.randint(rows, (batch,)).split([round(OWN * batch), batch - round(OWN * batch)])
        codes, masks = (torch.cat([pairs[i][place] for pairs, place in zip((own, of_model), places)]) for i in (0, 1))
        target = 2 * (masks.to(codec.code_vectors.device).float() / 255 - 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps))
        loss = F.mse_loss(codec.decode(codes), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            log(f"step {step + 1}: {_measure(codec, unseen, of_model, own)}")
    codec.requires_grad_(False).eval()


@torch.no_grad()
def _measure(codec: MaskCodec, unseen: int, *pairs: Pairs) -> str:
    """Mean IoU of the masks that are drawn, from codes of the model and from their own."""
    found = []
    for codes, masks in pairs:
        drawn = codec.decode(codes[-unseen:]).cpu() > 0
        found.append(float(mask_iou(drawn, masks[-unseen:] > 127).mean()))
    return "IoU {:.3f} from the model's codes, {:.3f} from their own".format(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the mask codec to draw from the codes that a model writes.")
    parser.add_argument("--model", type=Path, required=True, help="the folder; its codec is replaced")
    parser.add_argument("--masks", type=int, default=20_000, help="how many the model writes")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--world", type=int, choices=(1, 2), default=SHIPPED)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pg = load(args.model, device=args.device, dtype="float32")
    train_decoder(pg.codec, *written(pg, RECIPES[args.world], args.masks), args.steps)
    pg.codec.cpu().save(args.model / CODEC_FILE)
    if (fitted := args.model / CALIBRATION_FILE).exists():
        fitted.unlink()
        print(f"{fitted} is deleted: it was fitted to other masks. `paligemma evaluate --calibrate` makes another")


if __name__ == "__main__":
    main()
