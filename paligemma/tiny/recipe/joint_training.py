"""Stage 2 of the recipe: the whole model learns to answer all prompts.

    python -m paligemma.tiny.recipe.joint_training --out runs/tiny --minutes 30

The decoder does not start from random weights. Its word embeddings start as the directions that the patch heads of
stage 1 detect, and its first attention layer already looks up the patches that a word names; see `initialize_decoder`.

Letters: D width of the decoder, E size of an attention head.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.answers.mask_codec import MaskCodec
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.tiny import rows, world
from paligemma.tiny.recipe.ahead import Ahead
from paligemma.tiny.recipe.batches import PromptBatches, joint_loss
from paligemma.tiny.recipe.codec import code_similarity
from paligemma.tiny.recipe.pieces import until
from paligemma.tiny.recipe.settings import FIRST, RECIPES, Recipe, autocast_dtype
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.recipe.vision_pretraining import (
    HEADS,
    PatchHeads,
    SceneBatches,
    Vision,
    explicit_attention_on_cpu,
    initialize,
    load_weights,
    vision_part,
    waves,
)
from paligemma.tokenizer import Tokenizer
from paligemma.train import checkpointing
from paligemma.train.loop import TrainConfig, train
from paligemma.train.optimizer import muon_and_adamw


class JointModel(nn.Module):
    """The model, and the patch heads for the auxiliary loss."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.model = PaliGemmaForConditionalGeneration(config)
        self.heads = PatchHeads(config.vision_config.hidden_size)
        explicit_attention_on_cpu(self)


def initialize_decoder(
    vision: Vision, tokenizer: Tokenizer, config: PaliGemmaConfig, scenes: dict[str, Tensor]
) -> JointModel:
    """A model with the vision tower of `vision` and word embeddings aligned with its patch heads.

    The decoder's embedding is also its output layer. The word "dog" starts as the weight row of the class head for
    "dog". A patch that is copied to the output then already predicts the name of what it shows, and a word in a prompt
    resembles the patches that it names.
    """
    torch.manual_seed(1)
    joint = JointModel(config)
    initialize(joint)
    text = config.text_config
    D = text.hidden_size
    decoder = joint.model.language_model.model
    for name, parameter in decoder.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= (2 * text.num_hidden_layers) ** -0.5
    joint.model.vision_tower.load_state_dict(vision.model.state_dict())
    joint.heads.load_state_dict(vision.heads.state_dict())
    nn.init.orthogonal_(joint.model.multi_modal_projector.linear.weight)
    projector = joint.model.multi_modal_projector.linear.weight.data  # [D, vision width]

    embedding = torch.randn(text.vocab_size, D)
    directions = dict(zip(HEADS, vision.heads.linear.weight.data.split(list(HEADS.values()))))
    for token, direction in directions_of_words(tokenizer, directions):
        direction = projector @ (direction - direction.mean())
        embedding[token] = 0.5 * embedding[token] + direction * (D**0.5 / direction.norm())
    embedding[tokenizer.first_loc_id : tokenizer.first_loc_id + 1024] = location_embeddings(D) * D**0.5
    embedding /= embedding.norm(dim=1, keepdim=True)  # times sqrt(D) on the way in: as large as image features
    decoder.embed_tokens.weight.data.copy_(embedding)
    initialize_lookup(joint, tokenizer, scenes, copied=0.7)
    return joint


def initialize_lookup(joint: JointModel, tokenizer: Tokenizer, scenes: dict[str, Tensor], copied: float) -> None:
    """Initialise the first attention layer as a look-up: "dog" attends to patches that show a dog and copies them.

    Every question about an object begins with finding it, and learning to find takes thousands of steps. So the query
    and key projections are solved for by least squares: the query of a word and the key of a patch of `scenes` (a batch
    of `SceneBatches`) encode a class, the key of a word encodes none. Rotary position embeddings rotate the first half
    of a head's pairs too fast to compare words with patches more than a hundred positions away, so the look-up uses
    the slow half.
    """
    decoder = joint.model.language_model.model
    attention, E = decoder.layers[0].get_submodule("self_attn"), decoder.config.head_dim
    embedding = decoder.embed_tokens.weight.data
    D, classes = embedding.shape[1], len(world.LABELS)
    named, importance = torch.zeros(len(embedding), classes), torch.ones(len(embedding), 1)
    for i, label in enumerate(world.LABELS):
        for word in (label, " " + label, " " + rows.plural(label)):
            token = tokenizer.encode(word)[0]
            named[token, i], importance[token] = 1.0, 10.0
    words = F.rms_norm(embedding, (D,))  # what the layer's norm gives
    query = least_squares(words, named, importance)
    with torch.no_grad():
        patches = F.rms_norm(joint.model.encode_image(scenes["pixel_values"]), (D,)).flatten(0, 1)
    shown = F.one_hot(scenes["class"].flatten(), classes + 1)[:, 1:].float()
    inputs, targets = torch.cat([patches, words]), torch.cat([shown, torch.full_like(named, -0.5)])
    weight = 1.0 + 5.0 * shown.sum(1, keepdim=True)  # most patches are background
    key = least_squares(inputs, targets, torch.cat([weight, importance]))
    # 73 classes in the slow 32 of 64 dimensions: a random projection keeps them apart.
    mixed = torch.randn(E // 2, classes, generator=torch.Generator().manual_seed(3)) * (E // 2) ** -0.5
    slow = [i for i in range(E) if i % (E // 2) >= E // 4]
    value = nn.init.orthogonal_(torch.empty(D, D))
    sharp = 24 * E**0.5
    weights = {
        name: attention.get_parameter(f"{name}.weight").data for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    weights["q_proj"].mul_(0.1).unflatten(0, (-1, E))[:, slow] += sharp**0.5 * mixed @ query
    weights["k_proj"].mul_(0.1).unflatten(0, (-1, E))[:, slow] += sharp**0.5 * mixed @ key
    weights["v_proj"].copy_(value)
    weights["o_proj"].copy_(copied * value.T)


def least_squares(inputs: Tensor, targets: Tensor, importance: Tensor) -> Tensor:
    """The matrix [outputs, inputs] that maps rows of `inputs` to rows of `targets` best."""
    weighted = (inputs * importance).T
    square = weighted @ inputs
    square += 1e-3 * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square, weighted @ targets).T


def directions_of_words(tokenizer: Tokenizer, directions: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(token, sum of the patch heads' weight rows [vision width] for what the token names)."""
    meant: list[tuple[str, Tensor]] = []
    for i, label in enumerate(world.LABELS, 1):
        meant += [(label, directions["class"][i]), (rows.plural(label), directions["class"][i])]
    for head, names, first in (
        ("tint", world.TINTS, 1),
        ("background", world.BACKGROUNDS, 0),
        ("total", rows.NUMBERS, 0),
    ):
        meant += [(name, directions[head][i]) for i, name in enumerate(names, first)]
    letters = directions["characters"]  # of the first letter in a patch, then of the second
    meant += [(letter, letters[i] + letters[i + len(letters) // 2]) for i, letter in enumerate(world.CHARACTERS, 1)]
    sums: dict[int, Tensor] = {}  # "orange" is a fruit, a tint and, on a sign, letters
    for word, direction in meant:
        direction = direction / direction.norm()
        for text in (word, " " + word):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                sums[ids[0]] = sums.get(ids[0], torch.zeros_like(direction)) + direction
    return list(sums.items())


def wave_directions(size: int) -> Tensor:
    """A random direction of norm 1 for each of the 64 values of `waves`: [64, size]."""
    directions = torch.randn(64, size, generator=torch.Generator().manual_seed(2))
    return directions / directions.norm(dim=1, keepdim=True)


def location_embeddings(size: int) -> Tensor:
    """Initial embeddings of the 1,024 locations, [1024, size] of norm 1, sinusoidal, so that neighbours are similar."""
    code = waves(torch.arange(1024) / 1024) @ wave_directions(size)
    return code / code.norm(dim=1, keepdim=True)


def starting_model(
    out: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    weights: dict[str, Tensor] | None,
    vision_weights: dict[str, Tensor] | None,
) -> JointModel:
    """The model that a run of stage 2 starts from: `weights` of stage 2, with the vision tower and heads of
    `vision_weights` if given. Without `weights`, what stage 1 left in `out`, and `initialize_decoder`."""
    config = recipe.model_config(tokenizer)
    if weights is not None:
        joint = JointModel(config)
        if vision_weights is not None:
            better = vision_part(vision_weights)
            weights = weights | {
                name.replace("model.", "model.vision_tower.", 1): value for name, value in better.items()
            }
        load_weights(joint, weights)
        return joint
    vision = Vision(config.vision_config)
    stage_1 = checkpointing.load_last(out / "vision" / "checkpoints")
    if stage_1 is not None:
        load_weights(vision, stage_1["average"])
    return initialize_decoder(vision, tokenizer, config, SceneBatches(out / "scenes", 256)(0, 0, 1))


def train_jointly(
    out: Path,
    minutes: float,
    folder: str = "joint-01",
    weights: dict[str, Tensor] | None = None,
    vision_weights: dict[str, Tensor] | None = None,
    *,
    recipe: Recipe = FIRST,
    lr: float = 2e-3,
    vision_lr: float = 0.2,
    auxiliary: float = 0.4,
    decay_from: float = 0.6,
    unpacked_every: int = 2,
    extra_images: int = 2,
    device: torch.device | str = "cpu",
    workers: int = 0,
    end: float = math.inf,
    processor_time: bool = False,
) -> JointModel:
    """Stage 2, for `minutes`. State and log go to `out / folder`.

    weights:        of stage 2, to start from, instead of what stage 1 left in `out/vision`.
    vision_weights: of a better vision tower and heads than `weights` has, mostly of stage 1.
    vision_lr:      learning rate of the vision tower as a share of `lr`.
    auxiliary:      weight of the patch heads' loss.
    decay_from:     share of the time after which the learning rate falls to zero.
    unpacked_every, extra_images: see `PromptBatches`.
    workers:        processes that make batches ahead.
    end:            stop when `time.monotonic()` passes it, and raise PieceOver; see pieces.py.
    processor_time: `minutes` are those of this process's processor.
    """
    tokenizer = build_tokenizer(recipe.world)
    joint = starting_model(out, recipe, tokenizer, weights, vision_weights)
    codec = MaskCodec.load(out / "codec.safetensors")
    joint.heads.similarity = code_similarity(codec)
    joint.to(device)
    explicit_attention_on_cpu(joint)
    optimizers = muon_and_adamw(joint, lr=lr, adamw_lr=lr / 3, weight_decay=0.1, slower=("vision_tower", vision_lr))
    settings = TrainConfig(
        steps=10**9, minutes=minutes, warmup=0.01, schedule="linear", decay_from=decay_from, ema=0.998,
        autocast=autocast_dtype(torch.device(device)), log_every=40, save_every=90,
        processor_time=processor_time,
    )  # fmt: skip
    loss = joint_loss(tokenizer.first_loc_id, auxiliary, bin_step=recipe.bin_step)
    arguments = {"folder": out / "scenes", "world": recipe.world, "codec": codec, "size": recipe.joint_batch}
    arguments |= {"unpacked_every": unpacked_every, "extra_images": extra_images, "num_patches": recipe.num_patches}
    arguments |= {"bin_step": recipe.bin_step, "pages": recipe.page_shards > 0}
    with Ahead(workers, prompt_batches, **arguments) as batches, until(end) as limited:
        train(joint, limited(batches), settings, out / folder, loss=loss, optimizers=optimizers)
    return joint


def prompt_batches(world: int, **arguments: Any) -> PromptBatches:
    """`PromptBatches` with the tokenizer of a world, which cannot be sent from one process to another."""
    return PromptBatches(tokenizer=build_tokenizer(world), **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage 2: train on all prompts, or resume.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder with what stage 1 left")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--folder", default="joint-01", help="of this run, inside --out")
    parser.add_argument("--weights", type=Path, help="checkpoint of stage 2 to start from")
    parser.add_argument("--vision-weights", type=Path, help="checkpoint with a better vision tower")
    parser.add_argument("--world", type=int, choices=(1, 2), default=world.SHIPPED, help="whose recipe")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vision-lr", type=float, default=0.2, help="as a share of --lr")
    parser.add_argument("--auxiliary", type=float, default=0.4, help="weight of the patch heads' loss")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the time after which the rate falls")
    parser.add_argument("--unpacked-every", type=int, default=2)
    parser.add_argument("--extra-images", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = vars(parser.parse_args())
    for name in ("weights", "vision_weights"):
        given[name] = checkpointing.load(given[name])["average"] if given[name] else None
    train_jointly(recipe=RECIPES[given.pop("world")], **given)


if __name__ == "__main__":
    main()
