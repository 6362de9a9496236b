"""The published shapes with random weights, and how much work is in them.

Speed does not depend on the values of the weights, so nothing needs to be downloaded: every tensor is a view of one
block of random numbers, and the checkpoint written from them has the published names, shapes and sizes.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.expected import empty_model, expected_shapes
from paligemma.weights.published import PUBLISHED, published_config
from paligemma.weights.saving import save_pretrained

TEXT_TOKENS = 10  # bos, a short question, newline


def published_shape(name: str) -> PaliGemmaConfig | None:
    """The configuration behind a published name ("paligemma-3b-pt-224"), None for any other name."""
    found = re.fullmatch(rf"(?:google/)?({'|'.join(PUBLISHED)})-(?:.+-)?(224|448|896)", name)
    return published_config(found[1], int(found[2])) if found else None


def write_random_checkpoint(config: PaliGemmaConfig, folder: Path) -> None:
    """A checkpoint with random weights in bfloat16. OSError before any work if the disk is too small for it."""
    model = empty_model(config)
    shapes = expected_shapes(config)
    needed = 2 * sum(map(math.prod, shapes.values()))
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 1.05 * needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, and the random weights take {needed / 1e9:.1f}: name a folder "
            "on another disk with --work"
        )
    largest = max(map(math.prod, shapes.values()))
    noise = torch.randn(min(largest, 2**24), generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    block = noise.repeat(-(-largest // len(noise)))
    weights = {name: block[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    model.load_state_dict(weights, assign=True)
    save_pretrained(model, folder)


@dataclass(frozen=True)
class Work:
    """The work that an answer takes where every layer reads every position.

    first_token_flops: multiplications and additions from the pixels to the logits of the first token. (Our model leaves
    out most of the decoder's last layer: 4.5% of them in paligemma-3b-pt-224.) decoder_weights: weights that are read
    for each later token. parameters: weights of the whole model.
    """

    parameters: int
    decoder_weights: int
    first_token_flops: float


def work_in(config: PaliGemmaConfig, text_tokens: int = TEXT_TOKENS) -> Work:
    text, vision, shapes = config.text_config, config.vision_config, expected_shapes(config)
    P, S = vision.num_patches, vision.num_patches + text_tokens

    def matrices(prefix: str) -> int:
        return sum(math.prod(s) for name, s in shapes.items() if name.startswith(prefix) and len(s) > 1)

    head = text.vocab_size * text.hidden_size
    layers = matrices("language_model.model.layers.")
    vision_tower = matrices("vision_tower.vision_model.encoder.") + matrices("multi_modal_projector.")
    # Queries times keys, and attention weights times values.
    attention = 4 * P * P * vision.hidden_size * vision.num_hidden_layers
    attention += 4 * S * S * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return Work(
        parameters=sum(map(math.prod, shapes.values())),
        decoder_weights=layers + head,
        # The head reads only the last position.
        first_token_flops=2.0 * (vision_tower * P + layers * S + head) + attention,
    )
