"""SigLIP, a plain vision transformer that turns an image into one vector per patch.

    pixels [B, 3, side, side] -> patch embedding + learned positions -> 27 x (attention, MLP) -> LayerNorm -> [B, P, D]

At 224 pixels and patches of 14 x 14 that is a grid of 16 x 16: 256 vectors of 1152 numbers.

What is unusual, compared with other vision transformers:
- no class token and no pooling head: PaliGemma wants every patch, so the output is the whole grid;
- patches are read row by row: patch `i` sits at row `i // grid`, column `i % grid`;
- positions are a learned table with one row per patch, so each resolution (224, 448, 896) has its own checkpoint;
- `post_layernorm` is applied to every patch at the end (many vision transformers normalise a pooled vector only).

Follows "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343) in its So400m/14 shape.

Letters: B images, P patches, D hidden (of this transformer), H heads, E head size; side: of the image, in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma import configuration


@dataclass(frozen=True)
class SiglipVisionConfig:
    """`vision_config` of a checkpoint. The defaults are So400m/14 at 224 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224  # the config.json of the 224 checkpoints leaves it out
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        configuration.check_vision_config(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SiglipVisionConfig:
        """From the `vision_config` object of a `config.json`. Raises ValueError, see `configuration.py`."""
        return cls(**configuration.read_vision_config(cls, given))

    @property
    def num_patches(self) -> int:
        """Image tokens per image: 256, 1024 or 4096 at the official sizes."""
        return (self.image_size // self.patch_size) ** 2


class SiglipVisionEmbeddings(nn.Module):
    """Cuts the image into patches, projects each to the hidden size and adds its learned position."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        # A convolution whose stride equals its kernel size is a linear layer over patches: each pixel is read once.
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}, expected "
                f"[images, 3, {self.image_size}, {self.image_size}]: this checkpoint sees that size only"
            )
        patches = self.patch_embedding(pixel_values)  # [B, D, grid, grid]
        patches = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        return patches + self.position_embedding.weight  # the whole table, [P, D]: row i belongs to patch i


class SiglipAttention(nn.Module):
    """Multi-head attention in which every patch looks at every patch: no mask at all."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.explicit = False  # True: attention written out, whose backward pass is faster on a CPU

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, P, E]
        k = self.k_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(-2))  # [B, P, D]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, P, E] each -> [B, H, P, E]."""
        if self.explicit:
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [B, H, P, P]
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v)


class SiglipMLP(nn.Module):
    """Two linear layers with a GELU between them, applied to every patch by itself."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # The tanh approximation, not the exact GELU: the checkpoints were trained with it.
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """Pre-norm: attention and MLP each read a normalised copy of x and add their result to x."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionTransformer(nn.Module):
    """The whole vision transformer: pixel_values [B, 3, side, side] in [-1, 1] -> patch features [B, P, D]."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class SiglipVisionModel(nn.Module):
    """Exists for the parameter names: published checkpoints call the transformer `vision_tower.vision_model`."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model(pixel_values)
