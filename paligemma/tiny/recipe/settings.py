"""What a recipe decides: the world, the size of the pictures and of the model, the batches.

`SECOND` is for world 2; the last round of the model that ships was made with it, with lower learning rates and less
time for stage 1 (docs/tiny.md). `FIRST` made the one before, in world 1, with pictures of 128 pixels, where a letter is
8 pixels wide. A trial is one of these with a field replaced.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paligemma.devices import multiplies_bfloat16
from paligemma.files import read_json, write_json
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    world: int = 1
    image_size: int = 128  # pixels of the model's pictures
    patch_size: int = 16
    bin_step: int = 8  # locations are multiples of it: 8 leaves 128 of the 1,024
    vision_width: int = 256
    vision_layers: int = 6
    text_width: int = 256
    text_layers: int = 6
    codec_steps: int = 2000
    shards: int = 60  # files of 512 scenes that are rendered ahead, at most
    page_shards: int = 0  # files of 512 pages, see pages.py; if there are any, half of stage 1 is pages
    vision_share: float = 0.35  # of the training time for stage 1
    vision_lr: float = 3e-3  # the highest learning rate of stage 1
    joint_lr: float = 2e-3  # and of stage 2
    vision_batch: int = 128  # pictures in a step of stage 1
    joint_batch: int = 16  # pictures in a step of stage 2, with about a dozen prompts each

    def __post_init__(self) -> None:
        if self.page_shards and self.page_shards < 4:  # the pages of a step come from several of them
            raise ValueError(f"page_shards must be 0 or at least 4, got {self.page_shards}")

    @property
    def grid(self) -> int:
        """Patches in a row."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    def vision_config(self) -> SiglipVisionConfig:
        return SiglipVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=3 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_width // 64,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )

    def model_config(self, tokenizer: Tokenizer) -> PaliGemmaConfig:
        text = GemmaConfig(
            vocab_size=64 * math.ceil(len(tokenizer) / 64),
            hidden_size=self.text_width,
            intermediate_size=self.text_width * 5 // 2,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_width // 64,
            num_key_value_heads=self.text_width // 64,
            head_dim=64,
            max_position_embeddings=1024,
        )
        return PaliGemmaConfig(text, self.vision_config(), image_token_index=tokenizer.image_token_id)


FIRST = Recipe()
SECOND = Recipe(world=2, image_size=192, codec_steps=4000, shards=400, page_shards=250, vision_share=0.45)
RECIPES = {1: FIRST, 2: SECOND}  # by world


def for_device(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with batches that make use of a GPU."""
    if device.type == "cpu":
        return recipe
    return replace(recipe, vision_batch=8 * recipe.vision_batch, joint_batch=8 * recipe.joint_batch)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matrix products in it are fast, else None for float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else None


RECIPE_FILE = "recipe.json"  # in the folder of a training


def remember(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into the folder of a training; raises as `check_recipe` does."""
    check_recipe(recipe, folder)
    if not (folder / RECIPE_FILE).exists():
        write_json(folder / RECIPE_FILE, asdict(recipe))


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """ValueError if the folder was begun with another recipe. Batches may differ: a training can move between a CPU
    and a GPU."""
    file = folder / RECIPE_FILE
    if not file.exists():
        return
    before, now = asdict(FIRST) | read_json(file), asdict(recipe)  # an older file lacks newer fields
    differing = [name for name in now if not name.endswith("_batch") and before.get(name) != now[name]]
    if differing:
        raise ValueError(
            f"{folder} was begun with another recipe ({_shown(before, differing)}; now {_shown(now, differing)}): "
            "choose another folder with --out"
        )


def _shown(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name)}" for name in names)
