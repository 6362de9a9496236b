"""The recipe of the model that ships, in one call: tokenizer, mask codec, vision first, then everything.

    paligemma tiny train --minutes 60                      # or: python -m paligemma.tiny.train --minutes 60
    torchrun --nproc-per-node 2 -m paligemma.tiny.train --minutes 60

Every stage keeps its state in the output folder and goes on where it stopped; running the command again trains on.
What was tried and what it gave is in docs/tiny.md.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from paligemma.checkpoints import save_pretrained
from paligemma.mask_codec import MaskCodec
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.processing_paligemma import PaliGemmaProcessor, Tokenizer
from paligemma.tiny import rows, world
from paligemma.tiny.recipe_codec import train_codec
from paligemma.tiny.recipe_rows import TalkBatches, talk_loss
from paligemma.tiny.recipe_scenes import write_shard
from paligemma.tiny.recipe_tokenizer import build_tokenizer
from paligemma.tiny.vision_first import HEADS, PatchHeads, Vision, initialize, train_vision
from paligemma.train import checkpointing, distributed
from paligemma.train.loop import TrainConfig
from paligemma.train.loop import train as run
from paligemma.train.optimizer import muon_and_adamw

VISION = SiglipVisionConfig(
    hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, image_size=128, patch_size=16
)


def model_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    text = GemmaConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
    )
    return PaliGemmaConfig(text, VISION, image_token_index=tokenizer.image_token_id)


class Talker(nn.Module):
    """The model, and the heads that keep its patches honest."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.model = PaliGemmaForConditionalGeneration(config)
        self.heads = PatchHeads(config.vision_config.hidden_size)
        self.model.set_explicit_attention(True)


def begin_talking(vision: Vision, tokenizer: Tokenizer, config: PaliGemmaConfig) -> Talker:
    """A model that sees as `vision` does and whose words lie where the patches' heads look for them.

    The decoder's embedding is also its output layer. So the word "dog" begins in the direction in which a patch says
    that it shows a dog: a patch copied to the output already names what it shows, and the word in a prompt resembles
    what it asks for.
    """
    torch.manual_seed(1)
    talker = Talker(config)
    initialize(talker)
    text = config.text_config
    D = text.hidden_size
    decoder = talker.model.language_model.model
    for name, parameter in decoder.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= (2 * text.num_hidden_layers) ** -0.5
    talker.model.vision_tower.load_state_dict(vision.model.state_dict())
    talker.heads.load_state_dict(vision.heads.state_dict())
    nn.init.orthogonal_(talker.model.multi_modal_projector.linear.weight)
    projector = talker.model.multi_modal_projector.linear.weight.data  # [D, vision width]

    embedding = torch.randn(text.vocab_size, D)
    directions = dict(zip(HEADS, vision.heads.linear.weight.data.split(list(HEADS.values()))))
    for token, direction in words_of_heads(tokenizer, directions):
        direction = projector @ (direction - direction.mean())
        embedding[token] = 0.5 * embedding[token] + direction * (D**0.5 / direction.norm())
    embedding[tokenizer.first_loc_id : tokenizer.first_loc_id + 1024] = smooth_code(1024, D) * D**0.5
    embedding /= embedding.norm(dim=1, keepdim=True)  # times sqrt(D) on the way in: as large as image features
    decoder.embed_tokens.weight.data.copy_(embedding)
    return talker


def words_of_heads(tokenizer: Tokenizer, directions: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(token, row of the heads' matrix [vision width] that speaks of the same thing)."""
    meant: list[tuple[str, Tensor]] = []
    for i, label in enumerate(world.LABELS, 1):
        meant += [(label, directions["class"][i]), (rows.plural(label), directions["class"][i])]
    for head, names, first in (
        ("tint", world.TINTS, 1),
        ("background", world.BACKGROUNDS, 0),
        ("total", rows.NUMBERS, 0),
    ):
        meant += [(name, directions[head][i]) for i, name in enumerate(names, first)]
    letters = directions["characters"]  # first letter of a patch, then second
    meant += [(letter, letters[i] + letters[i + len(letters) // 2]) for i, letter in enumerate(world.CHARACTERS, 1)]
    sums: dict[int, Tensor] = {}  # "orange" is a fruit, a tint and, on a sign, letters
    for word, direction in meant:
        direction = direction / direction.norm()
        for text in (word, " " + word):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                sums[ids[0]] = sums.get(ids[0], torch.zeros_like(direction)) + direction
    return list(sums.items())


def smooth_code(count: int, size: int) -> Tensor:
    """[count, size] of norm 1: waves of many lengths over 0..count, so that neighbours are alike."""
    place = torch.arange(count)[:, None] / count
    frequency = 2.0 ** torch.linspace(-2, 5.5, 32)
    waves = torch.cat([torch.sin(2 * math.pi * frequency * place), torch.cos(2 * math.pi * frequency * place)], 1)
    code = waves @ torch.randn(64, size, generator=torch.Generator().manual_seed(2))
    return code / code.norm(dim=1, keepdim=True)


def train_talking(
    out: Path,
    steps: int,
    batch: int = 24,
    lr: float = 3e-3,
    vision_lr: float = 0.3,
    auxiliary: float = 0.3,
    minutes: float | None = None,
    decay_from: float = 0.5,
    alone: int = 4,
    folder: str = "talk",
    weights: Path | None = None,
) -> Talker:
    """Stage 2. Begins with what stage 1 left in `out/vision`, or with `weights`, a checkpoint of stage 2."""
    tokenizer = build_tokenizer()
    config = model_config(tokenizer)
    vision = Vision(VISION)
    seen = checkpointing.load_last(out / "vision" / "checkpoints")
    if seen is not None:
        vision.load_state_dict(seen["average"])
    talker = begin_talking(vision, tokenizer, config)
    if weights is not None:
        talker.load_state_dict(checkpointing.load(weights)["average"])
    optimizers = muon_and_adamw(talker, lr=lr, adamw_lr=lr / 2, slower=("vision_tower", vision_lr))
    batches = TalkBatches(out / "scenes", tokenizer, MaskCodec.load(out / "codec.safetensors"), batch, alone=alone)
    settings = TrainConfig(
        steps=steps, warmup=0.01, schedule="linear", decay_from=decay_from, ema=0.998, minutes=minutes, log_every=20,
        save_every=90,
    )  # fmt: skip
    run(
        talker,
        batches,
        settings,
        out / folder,
        loss=talk_loss(tokenizer.first_loc_id, auxiliary),
        optimizers=optimizers,
    )
    return talker


def package(state: Path, codec: Path, folder: Path) -> None:
    """A checkpoint of stage 2 -> the files that ship: the averaged weights in bfloat16, without the heads."""
    tokenizer = build_tokenizer()
    talker = Talker(model_config(tokenizer))
    talker.load_state_dict(checkpointing.load(state)["average"])
    processor = PaliGemmaProcessor(tokenizer, VISION.num_patches, VISION.image_size)
    save_pretrained(talker.model.bfloat16(), folder, processor)
    MaskCodec.load(codec).save(folder / "mask_codec.npz")


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
    sessions = sorted(out.glob("talk-*"))
    if not sessions:
        say("vision first")
        train_vision(VISION, scenes, vision, steps=10**9, minutes=0.35 * minutes)
    last = checkpointing.load_last(sessions[-1] / "checkpoints") if sessions else None
    go_on = last is not None and not last["finished"]
    say("everything")
    folder = sessions[-1].name if go_on else f"talk-{len(sessions) + 1:02d}"
    weights = checkpointing.checkpoints(sessions[-1] / "checkpoints")[-1] if last is not None and not go_on else None
    train_talking(out, steps=10**9, minutes=minutes - (time.monotonic() - begun) / 60, folder=folder, weights=weights)
    package(checkpointing.checkpoints(out / folder / "checkpoints")[-1], codec, out / "package")
    say(f"the checkpoint is in {out / 'package'}")
    return out / "package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vision-lr", type=float, default=0.3)
    parser.add_argument("--auxiliary", type=float, default=0.3)
    parser.add_argument("--decay-from", type=float, default=0.5)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--folder", default="talk")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    train_talking(**vars(args))


if __name__ == "__main__":
    main()
