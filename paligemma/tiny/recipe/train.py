"""The whole recipe of the model that ships: tokenizer, mask codec, vision pretraining, joint training.

    paligemma tiny train --minutes 60                      # or: python -m paligemma.tiny.recipe.train --minutes 60
    torchrun --nproc-per-node 2 -m paligemma.tiny.recipe.train --minutes 60

Every stage keeps its state in the output folder and resumes where it stopped; running the command again continues the
training. docs/tiny.md says what was tried and what it gave.
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
from paligemma.tiny.recipe.joint_training import JointModel, model_config, train_jointly
from paligemma.tiny.recipe.shards import write_shard
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_pretraining import VISION, train_vision
from paligemma.train import checkpointing, distributed
from paligemma.weights.saving import save_pretrained


def train(minutes: float, out: str | Path = "runs/tiny", resume: bool = True) -> Path:
    """All stages within `minutes`; run it again to continue. Returns the folder of the packaged checkpoint.

    The first run gives a tenth of its time to the codec and a third to vision pretraining. Later runs only do joint
    training, each starting from the weights of the last one, with a learning rate that ends at zero. resume=False
    deletes the folder first.
    """
    out = Path(out)
    begun = time.monotonic()
    scenes, codec, vision = out / "scenes", out / "codec.safetensors", out / "vision"
    rank, _ = distributed.start()
    if not resume and rank == 0:
        shutil.rmtree(out, ignore_errors=True)

    def log(words: str) -> None:
        if rank == 0:
            print(f"[{(time.monotonic() - begun) / 60:.0f} of {minutes:g} min] {words}", file=sys.stderr)

    if rank == 0:
        log("rendering scenes")
        for number in range(min(60, 4 + round(minutes))):
            write_shard(scenes, number)
        if not codec.exists():
            log("mask codec")
            train_codec(scenes, codec, steps=min(2000, 20 * round(minutes)), log=log)
    distributed.barrier()
    runs = sorted(out.glob("joint-[0-9][0-9]"))
    if not runs:
        log("vision pretraining")
        train_vision(VISION, scenes, vision, steps=10**9, minutes=0.35 * minutes, codec=MaskCodec.load(codec))
    last = checkpointing.load_last(runs[-1] / "checkpoints") if runs else None
    left = max(0.05 * minutes, minutes - (time.monotonic() - begun) / 60)  # rendering may have taken it all
    log("joint training")
    if last is not None and not last["finished"]:
        folder = runs[-1].name
        train_jointly(out, minutes=last["elapsed"] / 60 + left, folder=folder)
    else:
        folder = f"joint-{int(runs[-1].name[-2:]) + 1 if runs else 1:02d}"
        weights = checkpointing.checkpoints(runs[-1] / "checkpoints")[-1] if last is not None else None
        train_jointly(out, minutes=left, folder=folder, weights=weights)
    if rank == 0:
        package(checkpointing.checkpoints(out / folder / "checkpoints")[-1], codec, out / "package")
        log(f"the checkpoint is in {out / 'package'}")
    return out / "package"


def package(state: Path, codec: Path, folder: Path) -> None:
    """Write the files that ship from a checkpoint of stage 2: the averaged weights in bfloat16, without the heads."""
    tokenizer = build_tokenizer()
    joint = JointModel(model_config(tokenizer))
    joint.load_state_dict(checkpointing.load(state)["average"])
    processor = PaliGemmaProcessor(tokenizer, VISION.num_patches, VISION.image_size)
    save_pretrained(joint.model.bfloat16(), folder, processor)
    MaskCodec.load(codec).save(folder / "mask_codec.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch, or resume.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--from-nothing", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    train(args.minutes, args.out, resume=not args.from_nothing)


if __name__ == "__main__":
    main()
