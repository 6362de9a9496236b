"""The recipe of the model that ships, in one call: tokenizer, mask codec, vision first, then everything.

    paligemma tiny train --minutes 60                      # or: python -m paligemma.tiny.recipe.train --minutes 60
    torchrun --nproc-per-node 2 -m paligemma.tiny.recipe.train --minutes 60

Every stage keeps its state in the output folder and goes on where it stopped; running the command again trains on. What
was tried and what it gave is in docs/tiny.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from paligemma.answers.mask_codec import MaskCodec
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tiny.recipe.codec import train_codec
from paligemma.tiny.recipe.scenes import write_shard
from paligemma.tiny.recipe.talk import Talker, model_config, train_talking
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_first import VISION, train_vision
from paligemma.train import checkpointing, distributed
from paligemma.weights.saving import save_pretrained


def train(minutes: float, out: str | Path = "runs/tiny", resume: bool = True) -> Path:
    """All stages, within `minutes` in all; run it again to go on. Returns the folder of the packaged checkpoint.

    The first run gives a tenth of its time to the codec and a third to vision first; later runs only talk, each from
    a warm start and with a learning rate that ends at zero. resume=False begins from nothing.
    """
    out = Path(out)
    begun = time.monotonic()
    scenes, codec, vision = out / "scenes", out / "codec.safetensors", out / "vision"
    rank, _ = distributed.start()
    if not resume and rank == 0:
        shutil.rmtree(out, ignore_errors=True)

    def say(words: str) -> None:
        if rank == 0:
            print(f"[{(time.monotonic() - begun) / 60:.0f} of {minutes:g} min] {words}", file=sys.stderr)

    if rank == 0:
        say("drawing scenes")
        for number in range(min(60, 4 + round(minutes))):
            write_shard(scenes, number)
        if not codec.exists():
            say("mask codec")
            train_codec(scenes, codec, steps=min(2000, 20 * round(minutes)), say=say)
    distributed.wait_for_all()
    sessions = sorted(out.glob("talk-[0-9][0-9]"))
    if not sessions:
        say("vision first")
        train_vision(VISION, scenes, vision, steps=10**9, minutes=0.35 * minutes, codec=MaskCodec.load(codec))
    last = checkpointing.load_last(sessions[-1] / "checkpoints") if sessions else None
    left = max(0.05 * minutes, minutes - (time.monotonic() - begun) / 60)  # drawing scenes may have taken it all
    say("everything")
    if last is not None and not last["finished"]:
        folder = sessions[-1].name
        train_talking(out, minutes=last["elapsed"] / 60 + left, folder=folder)
    else:
        folder = f"talk-{int(sessions[-1].name[-2:]) + 1 if sessions else 1:02d}"
        weights = checkpointing.checkpoints(sessions[-1] / "checkpoints")[-1] if last is not None else None
        train_talking(out, minutes=left, folder=folder, weights=weights)
    if rank == 0:
        package(checkpointing.checkpoints(out / folder / "checkpoints")[-1], codec, out / "package")
        say(f"the checkpoint is in {out / 'package'}")
    return out / "package"


def package(state: Path, codec: Path, folder: Path) -> None:
    """A checkpoint of stage 2 -> the files that ship: the averaged weights in bfloat16, without the heads."""
    tokenizer = build_tokenizer()
    talker = Talker(model_config(tokenizer))
    talker.load_state_dict(checkpointing.load(state)["average"])
    processor = PaliGemmaProcessor(tokenizer, VISION.num_patches, VISION.image_size)
    save_pretrained(talker.model.bfloat16(), folder, processor)
    MaskCodec.load(codec).save(folder / "mask_codec.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from nothing, or go on training it.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--from-nothing", action="store_true", help="throw away what is in the folder")
    args = parser.parse_args()
    train(args.minutes, args.out, resume=not args.from_nothing)


if __name__ == "__main__":
    main()
