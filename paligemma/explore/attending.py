"""Attention weights, computed again from what went into each layer.

The fused kernels never hold the weights. So they are computed from the layer's input by the layer's own norm,
projections and rotary positions, for the wanted queries only. They equal those that the model used (to rounding).

A trap: attention is not importance. `<bos>` can take half of the attention of the first layer, and can be cut with next
to no effect on the answer. `changing.py` measures importance.

Letters: L layers, H heads, K key/value heads, G = H / K, Q queries, S tokens, E head size; n images, g grid, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paligemma.attention_mask import prefix_lm_mask
from paligemma.explore.watching import Look, evaluating, numbers_of
from paligemma.images import preprocess
from paligemma.modeling_gemma import GemmaAttention, apply_rotary, rotary_tables

MOST_BYTES = 500_000_000  # of the weights of one call


@dataclass(repr=False)
class Attention:
    """weights: float32 [L, H, Q, S], each row sums to 1, what is masked is exactly 0. queries: int64 [Q], columns."""

    look: Look
    weights: Tensor
    queries: Tensor

    def __repr__(self) -> str:
        L, H, Q, S = self.weights.shape
        return f"Attention({L} layers, {H} heads, {Q} queries, {S} keys)"

    def of(self, token: int) -> Tensor:
        """Weights of the query that *predicts* answer token `token`, one column to its left: [L, H, S].

        Raises ValueError if that query is not among `queries`.
        """
        column = self.look.query_of(token)
        found = (self.queries == column).nonzero()
        if not len(found):
            raise ValueError(f"answer token {token} is predicted at column {column}, which is not among the queries")
        return self.weights[:, :, int(found[0])]

    def on_image(self) -> Tensor:
        """The weights on the patches, as pictures: [L, H, Q, n, g, g]."""
        g = self.look.grid
        return self.weights[..., self.look.image_columns].unflatten(-1, (self.look.images, g, g))

    def share(self) -> Tensor:
        """How much of each row lies on image, bos, prompt, newline, and the answer so far: [L, H, Q, 5]; sums to 1.

        The query's own column counts to the group that it stands in.
        """
        look = self.look
        S = len(look.input_ids)
        groups = [
            look.image_columns,
            torch.tensor([look.first_text]),
            look.prompt_columns,
            torch.tensor([look.first_answer - 1]),
            torch.arange(look.first_answer, S),
        ]
        return torch.stack([self.weights[..., columns].sum(-1) for columns in groups], dim=-1)


def columns_of(look: Look, queries: str | Sequence[int]) -> Tensor:
    """int64 [Q]. "text": bos to the last column; "answer": the columns that predict the answer; "all"; or columns."""
    S = len(look.input_ids)
    if isinstance(queries, str):
        if queries not in ("text", "answer", "all"):
            raise ValueError(f"queries is {queries!r}, expected 'text', 'answer', 'all' or a list of columns")
        first, end = {"text": (look.first_text, S), "answer": (look.first_answer - 1, S - 1), "all": (0, S)}[queries]
        return torch.arange(first, end)
    return torch.tensor(numbers_of(queries, S, "queries has column", "columns"), dtype=torch.int64)


@torch.no_grad()
def attention(look: Look, queries: str | Sequence[int] = "answer") -> Attention:
    """The decoder's attention weights, for some queries.

    Raises ValueError where the weights would take more than half a gigabyte, naming how much.
    """
    columns = columns_of(look, queries)
    model = look.pg.model
    text = model.config.text_config
    layers: Any = model.language_model.model.layers
    S = len(look.input_ids)
    instead = "a few columns, or give a shorter answer" if queries == "answer" else "'text', 'answer' or a few columns"
    _check_size((text.num_hidden_layers, text.num_attention_heads, len(columns), S), instead)
    types = look.token_type_ids[None].to(model.device)
    valid = torch.ones_like(types, dtype=torch.bool)
    places = torch.arange(S, device=model.device)[None] + text.position_offset
    cos, sin = rotary_tables(places, text.head_dim, text.rope_theta, model.dtype)
    weights = torch.empty(text.num_hidden_layers, text.num_attention_heads, len(columns), S)
    with evaluating(model):
        for index, layer in enumerate(layers):
            x = layer.input_layernorm(look.hidden_states[index][None].to(model.device, model.dtype))  # [1, S, D]
            mask = prefix_lm_mask(types, valid, text.window(index))[0, 0, columns]  # [Q, S]
            weights[index] = _weights(layer.self_attn, x, columns.to(model.device), mask, cos, sin)
    return Attention(look, weights, columns)


def _check_size(shape: tuple[int, int, int, int], instead: str) -> None:
    """Raises ValueError where float32 weights [L, H, Q, S] would be larger than MOST_BYTES."""
    if (size := 4 * math.prod(shape)) > MOST_BYTES:
        raise ValueError(
            f"the weights of {shape[2]:,} queries would take {size / 1e9:.1f} GB, at most {MOST_BYTES / 1e9:.1f} "
            f"are held: ask for {instead}"
        )


def _weights(layer: GemmaAttention, x: Tensor, columns: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer's weights: x [1, S, D], columns [Q], mask [Q, S] -> float32 [H, Q, S]."""
    q = layer.q_proj(x[:, columns]).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # [1, H, Q, E]
    k = layer.k_proj(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # [1, K, S, E]
    q, k = apply_rotary(q, cos[:, :, columns], sin[:, :, columns])[0], apply_rotary(k, cos, sin)[0]
    k = k.repeat_interleave(len(q) // len(k), dim=0)  # [H, S, E]
    scores = (q @ k.transpose(-1, -2)) * layer.scale  # [H, Q, S]
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return scores.float().masked_fill(~mask, float("-inf")).softmax(-1)


@dataclass(repr=False)
class VisionAttention:
    """weights: float32 [L, H, Q, P] of the vision tower. patches: int64 [Q], numbered over all images."""

    weights: Tensor
    patches: Tensor

    def __repr__(self) -> str:
        L, H, Q, P = self.weights.shape
        return f"VisionAttention({L} layers, {H} heads, {Q} of {P} patches)"


@torch.no_grad()
def vision_attention(look: Look, patches: Sequence[int]) -> VisionAttention:
    """Which patches some patches look at, in every layer of the vision tower.

    patches: numbers over all images, all of one image. Raises ValueError for others, and where the weights would take
    more than half a gigabyte, naming how much.
    """
    P = look.grid**2
    numbers = torch.tensor(numbers_of(patches, look.images * P, "patches has"), dtype=torch.int64)
    if not len(numbers):
        raise ValueError(f"patches is empty, expected numbers from 0 to {look.images * P - 1}")
    image = int(numbers[0]) // P
    if (numbers // P != image).any():
        raise ValueError(f"patches is {list(patches)}: they are of several images, which do not see each other")
    model = look.pg.model
    pixels = preprocess(look.pictures[image], look.pg.processor.image_size)[None]
    tower = model.vision_tower.vision_model
    layers: Any = tower.encoder.layers
    _check_size((len(layers), layers[0].self_attn.num_heads, len(numbers), P), "fewer patches")
    x = tower.embeddings(pixels.to(model.device, model.dtype))  # [1, P, D]
    weights = []
    for layer in layers:
        attention, seen = layer.self_attn, layer.layer_norm1(x)
        q = attention.q_proj(seen[:, numbers % P]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)[0]
        k = attention.k_proj(seen).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)[0]  # [H, P, E]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [H, Q, P]
        weights.append(scores.float().softmax(-1).cpu())
        x = layer(x)
    return VisionAttention(torch.stack(weights), numbers)
