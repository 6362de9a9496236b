"""The published models: which sizes there are, and how a model is recognised as one of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.weights.safetensors_file import Shape

TINY = Path(__file__).parents[1] / "assets" / "tiny"  # the model that ships with the package


def _gemma2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> GemmaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 257216}
    return GemmaConfig.from_dict({"model_type": "gemma2", **sizes, **others})


PUBLISHED = {
    "paligemma-3b": GemmaConfig(),
    "paligemma2-3b": _gemma2(2304, 9216, 26, 8, 4),
    "paligemma2-10b": _gemma2(3584, 14336, 42, 16, 8),
    "paligemma2-28b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=4608 / 32),
}


def published_config(name: str, image_size: int) -> PaliGemmaConfig:
    """The configuration of a published size ("paligemma2-3b") at 224, 448 or 896 pixels."""
    return PaliGemmaConfig(text_config=PUBLISHED[name], vision_config=SiglipVisionConfig(image_size=image_size))


def published_name(config: PaliGemmaConfig) -> str | None:
    """The published size that a configuration has, whatever its resolution and vocabulary; None for all others."""
    for name, text in PUBLISHED.items():
        if _sizes(config.text_config, config.vision_config) == _sizes(text, SiglipVisionConfig()):
            return name
    return None


def _sizes(text: GemmaConfig, vision: SiglipVisionConfig) -> tuple[object, ...]:
    language_model = (text.model_type, text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    heads = (text.num_attention_heads, text.num_key_value_heads, text.head_dim, vision.num_attention_heads)
    vision_tower = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.patch_size)
    return language_model + heads + vision_tower


def config_of_arrays(path: Path, shapes: dict[str, Shape]) -> PaliGemmaConfig:
    """The configuration of an `.npz`, which has none of its own: sizes follow from shapes, the rest is as published.

    Raises ValueError, naming `path`, for the shapes of no model and for a vocabulary that is not the published one.
    """
    try:
        patch, _, _, d = shapes["img/embedding/kernel"]
        layers, _, heads, _ = shapes["img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"]
        grid = math.isqrt(shapes["img/pos_embedding"][1])
        f = shapes["img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias"][1]
        L, H, D, E = shapes["llm/layers/attn/q_einsum/w"]
        K, M = shapes["llm/layers/attn/kv_einsum/w"][2], shapes["llm/layers/mlp/linear"][1]
        V = shapes["llm/embedder/input_embedding"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a PaliGemma of big_vision: no array of that kind {error}") from None
    if V not in (257152, 257216):
        raise ValueError(
            f"{path} has an embedding of {V} rows, the published ones 257152: what its ids mean does not follow from "
            "the shapes. Put its config.json beside it"
        )
    sizes: dict[str, Any] = {"model_type": "gemma", "vocab_size": 257216, "hidden_size": D, "head_dim": E}
    sizes |= {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": M}
    if "llm/layers/post_attention_norm/scale" in shapes:
        # The 27B scales its queries by the width per head, all others by the size of a head.
        sizes |= {"model_type": "gemma2", "query_pre_attn_scalar": D / H if D == 4608 and H else E}
    vision = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads}
    vision |= {"image_size": grid * patch, "patch_size": patch}
    try:  # an empty array can claim a billion layers in a few bytes
        return PaliGemmaConfig(GemmaConfig.from_dict(sizes), SiglipVisionConfig.from_dict(vision))
    except ValueError as error:
        raise ValueError(f"{path}: the shapes of its arrays are those of no model: {error}") from None
