"""The whole recipe of an embedded model: scenes, tokenizer, mask codec, vision pretraining, joint training.

    paligemma tiny train --minutes 60                      # or: python -m paligemma.tiny.recipe.train --minutes 60
    torchrun --nproc-per-node 2 -m paligemma.tiny.recipe.train --minutes 60
    paligemma tiny train --minutes 55 --in-all 600                    # the first of eleven pieces of one training
    paligemma tiny train --minutes 60 --device cuda
    paligemma tiny train --from tiny --minutes 60 --in-all 240 --out runs/third       # begin with another model

Every stage keeps its state in the output folder and resumes where it stopped; running the command again continues the
training. docs/tiny.md says what was tried and what it gave.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from paligemma.answers.mask_codec import MaskCodec
from paligemma.devices import cpu_count, pick_device
from paligemma.files import LOCK, locked, made_folder
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tiny.recipe.codec import mask_codes, train_codec
from paligemma.tiny.recipe.joint_training import JointModel, train_jointly
from paligemma.tiny.recipe.pieces import PieceOver
from paligemma.tiny.recipe.settings import RECIPES, Recipe, check_recipe, for_device, remember
from paligemma.tiny.recipe.shards import make_room, pages_of, rendering_beside, shard_number, shard_paths, write_shards
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_pretraining import train_vision
from paligemma.tiny.recipe.warm_start import remember_start, remembered_start
from paligemma.tiny.world import SHIPPED
from paligemma.train import checkpointing, distributed
from paligemma.weights.saving import save_pretrained

FIRST_SHARDS = 60  # with which the first piece of a long training begins
# Later runs keep the codec of a first run, however short that was. On unseen masks 20 steps gave an IoU of .61, and 200
# gave .82 (in half a minute on one core).
LEAST_CODEC_STEPS = 200


def train(
    minutes: float,
    out: str | Path = "runs/tiny",
    resume: bool = True,
    *,
    recipe: Recipe = RECIPES[SHIPPED],
    device: str | None = "cpu",
    in_all: float | None = None,
    start: str | Path | None = None,
) -> Path:
    """All stages within `minutes`; run it again to continue. Returns the folder of the packaged checkpoint.

    Without `in_all` a run is whole: the first gives a tenth of its time to the codec (half a minute at least) and the
    recipe's `vision_share` to vision pretraining; later ones only do joint training, each starting from the weights of
    the last one, with a learning rate that ends at zero. With it, this run is a piece of a training of `in_all`
    minutes, and the learning rate falls at its end only. What a piece leaves is packaged as well. On a CPU, the minutes
    `in_all` are those that each process works: other programs delay such a training and do not shorten it.

    start: an embedded model whose weights are the initial ones, see warm_start.py. Later runs remember it.
    resume=False deletes the folder first. device: None for the best there is; a GPU gets larger batches.

    Raises ValueError if the folder was begun with another recipe, BlockingIOError if another process trains there.
    """
    run = _Run(Path(out), minutes, recipe, pick_device(device), in_all)
    with made_folder(run.out), locked(run.out, "paligemma tiny train") if run.rank == 0 else nullcontext():
        return _train(run, resume, start)


def _train(run: _Run, resume: bool, start: str | Path | None) -> Path:
    if not resume and run.rank == 0:
        for old in run.out.iterdir():
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if run.rank == 0:
        check_recipe(run.recipe, run.out)
        remember_start(start, run.recipe, run.out)  # may fail, and then nothing is remembered
        remember(run.recipe, run.out)
        run.prepare()
    distributed.barrier()
    with rendering_beside(run.scenes, run.recipe) if run.beside and run.rank == 0 else nullcontext():
        folder = run.whole() if run.in_all is None else run.piece(run.in_all)
    if run.rank == 0 and folder is not None:
        package(checkpointing.checkpoints(folder / "checkpoints")[-1], run.out, run.recipe)
        run.log(f"the checkpoint is in {run.out / 'package'}")
    return run.out / "package"


class _Run:
    """One call of `train`: its time, its device, and the stages."""

    def __init__(self, out: Path, minutes: float, recipe: Recipe, device: torch.device, in_all: float | None):
        self.begun, self.minutes, self.in_all, self.out = time.monotonic(), minutes, in_all, out
        self.recipe, self.device = for_device(recipe, device), device
        self.scenes, self.codec = out / "scenes", out / "codec.safetensors"
        self.workers = 0 if device.type == "cpu" else max(1, cpu_count() - 2)
        self.rank, processes = distributed.start()
        for name in ("vision_batch", "joint_batch"):
            batch = getattr(self.recipe, name)
            if batch % (4 * processes):  # each process takes as many pictures from each of four shards
                raise ValueError(
                    f"{name} is {batch}, expected a multiple of 4 for each of {processes} processes: start fewer"
                )

    def log(self, words: str) -> None:
        if self.rank == 0:
            print(f"[{self.spent:.0f} of {self.minutes:g} min] {words}", file=sys.stderr)

    @property
    def spent(self) -> float:
        return (time.monotonic() - self.begun) / 60

    @property
    def beside(self) -> bool:
        """Whether training begins with a few scenes, more are rendered beside it, and the oldest make room for them."""
        return self.in_all is not None and self.device.type == "cpu"

    def prepare(self) -> None:
        """Scenes and codec, as far as they are missing. A third of the time at most goes to more scenes."""
        self.log("rendering scenes")
        recipe, processes = self.recipe, max(1, self.workers)
        for folder, shards in ((self.scenes, recipe.shards), (pages_of(self.scenes), recipe.page_shards)):
            if self.beside:
                make_room(folder, 2 * shards // 3)
                wanted = min(shards, FIRST_SHARDS)
            else:
                wanted = shards if recipe.world == 2 else min(shards, 4 + round(self.minutes))
            there = shard_paths(folder)
            if not there or shard_number(there[0]) == 0:  # else the first ones have made room
                write_shards(folder, range(min(4, wanted)), recipe, processes)
                write_shards(folder, range(wanted), recipe, processes, self.minutes / 3 - self.spent)
        if not self.codec.exists():
            self.log("mask codec")
            steps = recipe.codec_steps if self.in_all or self.workers else codec_steps(recipe, self.minutes)
            train_codec(self.scenes, self.codec, steps, log=self.log, device=self.device)
        if self.workers:  # otherwise each of them would make the same codes
            codec = MaskCodec.load(self.codec).to(self.device)
            for path in shard_paths(self.scenes) + shard_paths(pages_of(self.scenes)):
                mask_codes(path, codec)

    def vision(self, minutes: float, end: float = float("inf")) -> None:
        self.log("vision pretraining")
        codec = MaskCodec.load(self.codec)
        train_vision(
            self.recipe, self.scenes, self.out / "vision", minutes, codec, start=remembered_start(self.out),
            lr=self.recipe.vision_lr, device=self.device, workers=self.workers, end=end,
            processor_time=self.processor_time(end),
        )  # fmt: skip

    def joint(self, minutes: float, folder: str, last: Path | None = None, end: float = float("inf")) -> None:
        """last: the checkpoint of an earlier run of this stage to start from."""
        self.log("joint training")
        distributed.barrier()  # the first process has written stage 1 by now
        weights, vision = remembered_start(self.out), None
        if last is not None:
            weights = checkpointing.load(last)["average"]
        elif weights is not None and (stage_1 := checkpointing.load_last(self.out / "vision" / "checkpoints")):
            vision = stage_1["average"]
        train_jointly(
            self.out, minutes, folder, weights, vision,
            recipe=self.recipe, lr=self.recipe.joint_lr, device=self.device, workers=self.workers, end=end,
            processor_time=self.processor_time(end),
        )  # fmt: skip

    def processor_time(self, end: float) -> bool:
        return self.device.type == "cpu" and math.isfinite(end)

    def whole(self) -> Path:
        """A run with a schedule of its own; returns its folder."""
        runs = sorted(self.out.glob("joint-[0-9][0-9]"))
        if not runs:
            self.vision(self.recipe.vision_share * self.minutes)
        last = checkpointing.load_last(runs[-1] / "checkpoints") if runs else None
        left = max(0.05 * self.minutes, self.minutes - self.spent)  # rendering may have taken it all
        if last is not None and not last["finished"]:
            self.joint(last["elapsed"] / 60 + left, runs[-1].name)
            return runs[-1]
        folder = f"joint-{int(runs[-1].name[-2:]) + 1 if runs else 1:02d}"
        self.joint(left, folder, checkpointing.checkpoints(runs[-1] / "checkpoints")[-1] if last is not None else None)
        return self.out / folder

    def piece(self, in_all: float) -> Path | None:
        """A piece of one long schedule; returns the folder of stage 2, None if that has not begun."""
        end = self.begun + 60 * self.minutes
        folder = self.out / "joint-01"
        try:
            if not _finished(self.out / "vision"):
                self.vision(self.recipe.vision_share * in_all, end)
            if not _finished(folder):
                self.joint((1 - self.recipe.vision_share) * in_all, folder.name, end=end)
        except PieceOver:
            self.log("this piece is over; the same command goes on")
        return folder if checkpointing.checkpoints(folder / "checkpoints") else None


def codec_steps(recipe: Recipe, minutes: float) -> int:
    """Of the mask codec, in a whole first run of so many minutes on a CPU. Other trainings make all of them."""
    return min(recipe.codec_steps, max(LEAST_CODEC_STEPS, round(20 * minutes)))


def _finished(stage: Path) -> bool:
    last = checkpointing.load_last(stage / "checkpoints")
    return last is not None and bool(last["finished"])


def package(state: Path, out: Path, recipe: Recipe) -> None:
    """Write the files that ship from a checkpoint of stage 2: the averaged weights in bfloat16, without the heads."""
    tokenizer = build_tokenizer(recipe.world)
    joint = JointModel(recipe.model_config(tokenizer))
    joint.load_state_dict(checkpointing.load(state)["average"])
    processor = PaliGemmaProcessor(tokenizer, recipe.num_patches, recipe.image_size)
    processor.mask_codec = MaskCodec.load(out / "codec.safetensors")
    save_pretrained(joint.model.bfloat16(), out / "package", processor)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch, or resume.")
    parser.add_argument("--minutes", type=float, default=60.0, help="time of this run")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder for state, log and checkpoint")
    parser.add_argument("--world", type=int, choices=(1, 2), default=SHIPPED, help="whose recipe")
    parser.add_argument("--in-all", type=float, help="minutes of the whole training that this run is a piece of")
    parser.add_argument("--from", dest="start", metavar="MODEL", help="begin with the weights of this model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--from-nothing", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    train(
        args.minutes, args.out, not args.from_nothing,
        recipe=RECIPES[args.world], device=args.device, in_all=args.in_all, start=args.start,
    )  # fmt: skip


if __name__ == "__main__":
    main()
