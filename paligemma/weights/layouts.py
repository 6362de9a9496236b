"""The names of every published layout of the weights, and ours. All maps between layouts live in this file.

    layout H   vision_tower.vision_model.*   language_model.model.*          what the hub has, and what we write
    layout W   vision_tower.*                language_model.model.*          what transformers 5 writes
    layout N   model.vision_tower.*          model.language_model.*          a state_dict of transformers 5
               model.vision_tower.vision_model.*   model.language_model.*    the same of transformers 4.52
    .npz       img/Transformer/...           llm/layers/...                  big_vision, all layers in one array

Our parameter names are those of layout H, so three of the four need only their names changed (`our_name`). An `.npz`
stacks the layers and transposes the matrices: `bigvision_layout` says how, for both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.weights.safetensors_file import Shape

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # in no model of ours: it is the embedding
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def our_name(key: str) -> str:
    """The name in any published layout -> the name in layout H, which is ours."""
    name = key.removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for tower, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        if name.startswith(tower) and not name.startswith((tower + inner, HEAD)):
            name = tower + inner + name.removeprefix(tower)
    return name


def their_name(name: str) -> str:
    """The name of one of our modules or parameters in layout N, that of transformers 5."""
    for tower in ("vision_tower.vision_model.", "language_model.model."):
        if name.startswith(tower):
            name = tower.partition(".")[0] + "." + name.removeprefix(tower)
    return "model." + name


def prefix_of(keys: Iterable[str]) -> str:
    """What stands before the names of a whole model: "module.", "_orig_mod.", "vlm.", ... and mostly nothing.

    Wrappers (torch.compile, DataParallel, peft) and models built around PaliGemma put it there. It is seen in the name
    of a tensor that every checkpoint has once. A last "model." belongs to layout N.
    """
    patches = re.compile(r"(.*?)vision_tower\.(vision_model\.)?embeddings\.patch_embedding\.weight")
    found = [match[1] for key in keys if (match := patches.fullmatch(key))]
    return found[0].removesuffix("model.") if len(found) == 1 else ""


# ------------------------------------------------------------------------------------------------ big_vision .npz


@dataclass(frozen=True)
class ArrayLayout:
    """How one array of an `.npz` becomes tensors of ours.

    The array is [layers, len(names), *item], without the axes that would be 1. Each item, with its axes reordered and
    then flattened to the shape of the parameter, is one tensor. Read backwards it makes the array.
    """

    key: str
    names: tuple[str, ...]  # "{i}" is the layer
    item: Shape
    axes: Shape = ()  # () keeps the order
    layers: int = 0  # 0: not stacked

    @property
    def shape(self) -> Shape:
        return (
            *((self.layers,) if self.layers else ()),
            *((len(self.names),) if len(self.names) > 1 else ()),
            *self.item,
        )

    def unpack(self, item: Tensor, shape: Shape) -> Tensor:
        axes = self.axes or tuple(range(item.ndim))
        tensor = torch.empty(shape, dtype=item.dtype)  # its own memory, so that nothing keeps the whole slice alive
        tensor.view([item.shape[axis] for axis in axes]).copy_(item.permute(axes))
        return tensor

    def pack(self, tensor: Tensor) -> Tensor:
        axes = self.axes or tuple(range(len(self.item)))
        reordered = tensor.reshape([self.item[axis] for axis in axes])
        return reordered.permute([axes.index(axis) for axis in range(len(axes))])


TRANSPOSED = (1, 0)  # big_vision multiplies from the left: its kernels are [in, out], our weights [out, in]


def bigvision_layout(config: PaliGemmaConfig, embedding_rows: int) -> list[ArrayLayout]:
    """Every array of big_vision's `.npz` for a configuration.

    Source: big_vision models/vit.py and models/ppp/gemma.py; the names of the norms differ between Gemma 1 and 2.
    """
    vision, text = config.vision_config, config.text_config
    d, D = vision.hidden_size, text.hidden_size
    projector = "multi_modal_projector.linear."
    return [
        *_vision_arrays(vision),
        ArrayLayout("img/head/kernel", (projector + "weight",), (d, D), TRANSPOSED),
        ArrayLayout("img/head/bias", (projector + "bias",), (D,)),
        *_decoder_arrays(text, embedding_rows),
    ]


def _vision_arrays(vision: SiglipVisionConfig) -> list[ArrayLayout]:
    d, f, h, patch = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, vision.patch_size
    tower = "vision_tower.vision_model."
    embeddings = tower + "embeddings."
    once = [
        ArrayLayout(
            "img/embedding/kernel", (embeddings + "patch_embedding.weight",), (patch, patch, 3, d), (3, 2, 0, 1)
        ),
        ArrayLayout("img/embedding/bias", (embeddings + "patch_embedding.bias",), (d,)),
        ArrayLayout("img/pos_embedding", (POSITIONS,), (1, vision.num_patches, d)),
        ArrayLayout("img/Transformer/encoder_norm/scale", (tower + "post_layernorm.weight",), (d,)),
        ArrayLayout("img/Transformer/encoder_norm/bias", (tower + "post_layernorm.bias",), (d,)),
    ]
    layer, attention = "encoder.layers.{i}.", "MultiHeadDotProductAttention_0"
    stacked = [
        ArrayLayout("LayerNorm_0/scale", ("layer_norm1.weight",), (d,)),
        ArrayLayout("LayerNorm_0/bias", ("layer_norm1.bias",), (d,)),
        ArrayLayout("LayerNorm_1/scale", ("layer_norm2.weight",), (d,)),
        ArrayLayout("LayerNorm_1/bias", ("layer_norm2.bias",), (d,)),
        ArrayLayout(f"{attention}/query/kernel", ("self_attn.q_proj.weight",), (d, h, d // h), (1, 2, 0)),
        ArrayLayout(f"{attention}/query/bias", ("self_attn.q_proj.bias",), (h, d // h)),
        ArrayLayout(f"{attention}/key/kernel", ("self_attn.k_proj.weight",), (d, h, d // h), (1, 2, 0)),
        ArrayLayout(f"{attention}/key/bias", ("self_attn.k_proj.bias",), (h, d // h)),
        ArrayLayout(f"{attention}/value/kernel", ("self_attn.v_proj.weight",), (d, h, d // h), (1, 2, 0)),
        ArrayLayout(f"{attention}/value/bias", ("self_attn.v_proj.bias",), (h, d // h)),
        ArrayLayout(f"{attention}/out/kernel", ("self_attn.out_proj.weight",), (h, d // h, d), (2, 0, 1)),
        ArrayLayout(f"{attention}/out/bias", ("self_attn.out_proj.bias",), (d,)),
        ArrayLayout("MlpBlock_0/Dense_0/kernel", ("mlp.fc1.weight",), (d, f), TRANSPOSED),
        ArrayLayout("MlpBlock_0/Dense_0/bias", ("mlp.fc1.bias",), (f,)),
        ArrayLayout("MlpBlock_0/Dense_1/kernel", ("mlp.fc2.weight",), (f, d), TRANSPOSED),
        ArrayLayout("MlpBlock_0/Dense_1/bias", ("mlp.fc2.bias",), (d,)),
    ]
    return once + _in_every_layer(stacked, "img/Transformer/encoderblock/", tower + layer, vision.num_hidden_layers)


def _decoder_arrays(text: GemmaConfig, embedding_rows: int) -> list[ArrayLayout]:
    D, M, E = text.hidden_size, text.intermediate_size, text.head_dim  # M: width of the MLP
    H, K = text.num_attention_heads, text.num_key_value_heads
    once = [
        ArrayLayout("llm/embedder/input_embedding", (EMBEDDING,), (embedding_rows, D)),
        ArrayLayout("llm/final_norm/scale", ("language_model.model.norm.weight",), (D,)),
    ]
    keys_values = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
    gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if text.model_type == "gemma2":
        norms |= {"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
        norms |= {"post_attention_norm": "post_attention_layernorm"}
    stacked = [
        ArrayLayout("attn/q_einsum/w", ("self_attn.q_proj.weight",), (H, D, E), (0, 2, 1)),
        ArrayLayout("attn/kv_einsum/w", keys_values, (K, D, E), (0, 2, 1)),
        ArrayLayout("attn/attn_vec_einsum/w", ("self_attn.o_proj.weight",), (H, E, D), (2, 0, 1)),
        ArrayLayout("mlp/gating_einsum", gate_up, (D, M), TRANSPOSED),
        ArrayLayout("mlp/linear", ("mlp.down_proj.weight",), (M, D), TRANSPOSED),
        *(ArrayLayout(f"{theirs}/scale", (f"{ours}.weight",), (D,)) for theirs, ours in norms.items()),
    ]
    return once + _in_every_layer(stacked, "llm/layers/", "language_model.model.layers.{i}.", text.num_hidden_layers)


def _in_every_layer(arrays: list[ArrayLayout], theirs: str, ours: str, layers: int) -> list[ArrayLayout]:
    """The arrays of one layer -> those that hold all layers. theirs, ours: what stands before the names."""
    return [
        replace(array, key=theirs + array.key, names=tuple(ours + name for name in array.names), layers=layers)
        for array in arrays
    ]
