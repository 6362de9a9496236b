"""Begin where another embedded model stands: its weights, carried over to a new world and to larger pictures.

    paligemma tiny train --from tiny --out runs/third --minutes 60 --in-all 240

What fits is copied. The table of positions is resized to the new grid, and embeddings go by token, since two worlds
have two vocabularies: a token that is new begins as the mean of the pieces that its text had before. The patch heads
are not part of a model that ships, so they begin anew; on patches that already say what they show, they learn within
minutes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from paligemma.files import written_whole
from paligemma.inference import load
from paligemma.tiny.recipe.joint_training import JointModel
from paligemma.tiny.recipe.settings import Recipe
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tokenizer import Tokenizer

START = "start.safetensors"  # in the folder of a training


def starting_weights(model: str | Path, recipe: Recipe) -> dict[str, Tensor]:
    """The state of a `JointModel` of this recipe, from a model as `paligemma.load` takes it, float32.

    Raises ValueError if it has other layers, widths or heads than the recipe.
    """
    before = load(model, device="cpu", dtype="float32", image_size=recipe.image_size)
    tokenizer = build_tokenizer(recipe.world)
    torch.manual_seed(0)
    state = JointModel(recipe.model_config(tokenizer)).state_dict()
    carried = {f"model.{name}": value for name, value in before.model.state_dict().items()}
    name = "model.language_model.model.embed_tokens.weight"
    carried[name] = carried_embeddings(carried[name], before.processor.tokenizer, tokenizer, len(state[name]))
    differing = [name for name, value in carried.items() if name not in state or state[name].shape != value.shape]
    missing = [name for name in state if name not in carried and not name.startswith("heads.")]
    if differing or missing:
        raise ValueError(
            f"cannot start from {model}: {(differing + missing)[0]} is of another shape in this recipe, or missing"
        )
    return state | carried


def carried_embeddings(embedding: Tensor, before: Tokenizer, after: Tokenizer, rows: int) -> Tensor:
    """The embeddings [V before, D] in the order of another tokenizer, [rows, D]; rows without a token are zero."""
    vocabulary = before.backend.get_vocab()
    carried = embedding.new_zeros(rows, embedding.shape[1])
    for token, row in after.backend.get_vocab().items():
        ids = [vocabulary[token]] if token in vocabulary else before.encode(token.replace("▁", " "))
        carried[row] = embedding[ids].mean(0)
    return carried


def remember_start(model: str | Path | None, recipe: Recipe, folder: Path) -> None:
    """Write the weights that a training begins with into its folder, once: the model may since have changed.

    Raises ValueError if the folder holds a training that began with random weights, or with another model.
    """
    path = folder / START
    if model is None:
        return
    if path.exists():
        with safe_open(path, "pt") as file:
            before = (file.metadata() or {}).get("model")
        if before != str(model):
            raise ValueError(f"{folder} was begun with --from {before}, now it is {model}: choose another with --out")
        return
    if any(folder.glob("*/checkpoints/*")):
        raise ValueError(
            f"{folder} holds a training that began with random weights: leave --from out to go on with it, "
            f"or begin another with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as beside:
        weights = {name: value.contiguous() for name, value in starting_weights(model, recipe).items()}
        save_file(weights, beside, {"model": str(model)})


def remembered_start(folder: Path) -> dict[str, Tensor] | None:
    """What `remember_start` wrote, None if the training begins with random weights."""
    path = folder / START
    return load_file(path) if path.exists() else None
