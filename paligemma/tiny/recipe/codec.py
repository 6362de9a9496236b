"""Trains the mask codec of the small world: the official VQ-VAE with narrower layers, on the outlines of pictograms.

python -m paligemma.tiny.recipe.codec --scenes runs/tiny/scenes --out runs/tiny/codec.safetensors --steps 4000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.answers.mask_codec import MaskCodec, crop
from paligemma.devices import multiplies_bfloat16
from paligemma.files import written_whole
from paligemma.tiny.recipe.shards import Shard, shard_paths

BATCH, LR = 64, 2e-3
WIDTHS: dict[str, Any] = {"embedding_dim": 64, "encoder_widths": (8, 24, 48, 96), "decoder_widths": (96, 64, 32, 16, 8)}


def outlines(shard: Shard) -> Tensor:
    """The masks of all objects of a shard as the codec sees them: float32 [N, 64, 64], 1 inside."""
    cut = [crop(thing.mask, thing.box) for i in range(len(shard)) for thing in shard.scene(i).objects]
    return torch.from_numpy(np.stack(cut))


def in_bytes(masks: Tensor) -> Tensor:
    """Masks in [0, 1] as uint8, 255 inside: a quarter of the memory."""
    return (masks * 255 + 0.5).to(torch.uint8)


def mask_codes(path: Path, codec: MaskCodec) -> np.ndarray:
    """The 16 codes of every object of a shard, uint8 [objects, 16]; kept beside the shard."""
    place = path.with_suffix(".codes.npy")
    if place.exists():
        return np.load(place)
    masks = outlines(Shard.load(path))
    with torch.no_grad():
        codes = torch.cat([codec.encode(part) for part in masks.split(256)]).cpu().numpy().astype(np.uint8)
    with written_whole(place) as beside:
        np.save(beside, codes)
    return codes


def code_similarity(codec: MaskCodec) -> Tensor:
    """Soft targets for codes, [K, K] with rows that sum to 1: highest for the code itself, high for similar ones.

    A softmax over squared distances between code vectors, in units of the distance to the nearest other code.
    """
    vectors = codec.code_vectors.detach()
    square = torch.cdist(vectors, vectors).square()
    nearest = square.masked_fill(torch.eye(len(square), dtype=torch.bool), torch.inf).amin(1, keepdim=True)
    return (-square / nearest.clamp(min=1e-6)).softmax(-1)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boolean masks [N, 64, 64] pair by pair: [N]."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


@torch.no_grad()
def measure(codec: MaskCodec, masks: Tensor) -> dict[str, float]:
    """How well masks [N, 64, 64] in [0, 1] survive coding: IoU with the decoded masks, IoU of a second round with the
    first, and how many codes are used."""
    once = codec.decode(codec.encode(masks)) > 0
    twice = codec.decode(codec.encode(once.float())) > 0
    used = codec.encode(masks).unique().numel()
    return {
        "iou": float(mask_iou(once, masks > 0.5).mean()),
        "again": float(mask_iou(twice, once).mean()),
        "codes": used,
    }


def train_codec(
    scenes: Path,
    out: Path,
    steps: int = 4000,
    log: Callable[[str], None] = print,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> MaskCodec:
    """Train and save the codec; the last shard's masks are kept for validation."""
    device = torch.device(device)
    torch.manual_seed(0)
    paths = shard_paths(scenes)
    unseen = (in_bytes(outlines(Shard.load(paths[-1]))).float() / 255).to(device)
    masks = torch.cat([in_bytes(outlines(Shard.load(path))) for path in paths[:-1][:12]])
    codec = MaskCodec(**WIDTHS) if weights is None else MaskCodec.load(weights).train()
    codec.to(device).requires_grad_(True)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-4)
    begun = time.monotonic()
    for step in range(steps):
        x = masks[torch.randint(len(masks), (BATCH,))].to(device).float() / 255
        if torch.rand(()) < 0.5:
            x = x.flip(-1)
        if step >= steps // 3:  # a quarter of the batch is what the codec itself decodes: this must be a fixed point
            with torch.no_grad():
                own = (codec.decode(codec.encode(x[: BATCH // 4])) > 0).float()
            x = torch.cat([own, x[BATCH // 4 :]])
        if step % 100 == 0 and step < 0.8 * steps:
            codec.revive_dead_codes(x)
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 100) * min(1.0, 2 * (1 - progress))
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            loss = codec.training_loss(x)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            codec.eval()
            now = f"loss {float(loss.detach()):.4f}, {time.monotonic() - begun:.0f} s"
            log(f"codec step {step + 1}: {now}, {measure(codec, unseen[:512])}")
            codec.train()
    codec.eval()
    log(f"codec: {measure(codec, unseen)} on {len(unseen)} unseen masks")
    codec.cpu().save(out)
    return codec


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the mask codec of the small world.")
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    train_codec(args.scenes, args.out, args.steps, weights=args.weights, device=args.device)


if __name__ == "__main__":
    main()
