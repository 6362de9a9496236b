"""The mouth: Gemma, a decoder-only language model, and PaliGemma, which lets it read an image.

    pixels [n, 3, side, side] --SigLIP--> [n, P, 1152] --projector--> image features [n, P, D]
                                                                       |  (replace the <image> tokens)
    ids [B, S] --embedding x sqrt(D)--> [B, S, D] ---------------------+--> Gemma layers -> norm -> logits [B, S, V]

A row of ids is laid out like this; `<image>` stands P times per image, and `<bos>` comes after the images:

    <image> <image> ... <image> <bos> caption en (newline)   a cat <eos>
    '--------------------- prefix -----------------------'   '- suffix -'

Gemma 1 (PaliGemma 1) and Gemma 2 (PaliGemma 2) differ in four places, all visible below:
- Gemma 2 also normalises what attention and MLP *return*, before adding it (`Gemma2DecoderLayer`);
- it squashes attention scores to +-50 and logits to +-30 (soft-capping: `cap * tanh(x / cap)`);
- every other layer sees a sliding window of 4096 tokens only;
- its query scale is a setting of its own (the 27B has heads of 128 but scales by 144^-0.5).

What is unusual, compared with other decoders:
- RMSNorm multiplies by `1 + weight`, in float32;
- the prefix (image and prompt) is not causal, see `attention_mask.py`;
- text embeddings are scaled by sqrt(D), image features are not;
- the output layer is the input embedding again (tied), and has no parameter of its own;
- positions count from 1, as in transformers.

Follows arXiv 2403.08295 (Gemma), 2408.00118 (Gemma 2), 2407.07726 (PaliGemma), 2412.03555 (PaliGemma 2).

Letters: B batch, S query length, T key length, D hidden, H query heads, K key/value heads, G = H / K query heads per
key head, E head size, P image patches, V vocabulary, n images.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.attention_mask import SUFFIX, cached_mask, positions, prefix_lm_mask, token_types_from_labels
from paligemma.configuration import INERT_KEYS, as_object, take_fields
from paligemma.files import LARGEST_JSON, parse_json, read_bytes
from paligemma.kv_cache import KVCache
from paligemma.modeling_siglip import SiglipAttention, SiglipVisionConfig, SiglipVisionModel

# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class GemmaConfig:
    """`text_config` of a checkpoint. The defaults are Gemma 2B, the text model of PaliGemma 1."""

    model_type: str = "gemma"  # or "gemma2"
    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256  # a size of its own: in PaliGemma 2 it is not hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    position_offset: int = 1  # the first token stands at position 1 (transformers) or 0 (big_vision)
    # Gemma 2 only:
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: by that of head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # None: no layer slides

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of numbers")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            raise ValueError(f"sliding_window is {self.sliding_window!r}, expected a positive whole number or null")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise ValueError(f"{name} is {cap!r}, expected a positive number, or null for none")
        if self.position_offset not in (0, 1):
            raise ValueError(
                f"position_offset is {self.position_offset!r}, expected 1 (transformers) or 0 (big_vision)"
            )
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
                )
            strange = [kind for kind in self.layer_types if kind not in ("sliding_attention", "full_attention")]
            if strange:
                raise ValueError(f"layer_types has {strange[0]!r}, expected sliding_attention or full_attention")

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> GemmaConfig:
        """From the `text_config` object of a `config.json`, with what published files leave out.

        Raises ValueError on missing sizes, on unknown keys, and on another model than Gemma 1 or 2.
        """
        given = as_object(given, "text_config")
        if given.get("model_type") not in ("gemma", "gemma2"):
            raise ValueError(f"text_config.model_type is {given.get('model_type')!r}, expected 'gemma' or 'gemma2'")
        if (rope := given.pop("rope_parameters", None)) is not None:
            # How transformers 5 writes rope_theta and rope_scaling.
            rope = as_object(rope, "text_config.rope_parameters")
            if rope.get("rope_type", "default") != "default":
                raise ValueError(
                    f"text_config.rope_parameters asks for {rope['rope_type']!r}; PaliGemma only has 'default'"
                )
            given.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if given.get("hidden_act") == "gelu":
            del given["hidden_act"]  # so say Gemma's first files, and have always been run as the tanh approximation
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        heads = ("num_attention_heads", "num_key_value_heads")
        fields = take_fields(cls, given, "text_config", required=sizes + heads)
        if given["model_type"] == "gemma2":
            fields.setdefault("query_pre_attn_scalar", 256)
            fields.setdefault("sliding_window", 4096)
            fields.setdefault("attn_logit_softcapping", 50.0)
            fields.setdefault("final_logit_softcapping", 30.0)
            if fields.get("layer_types") is None:
                fields["layer_types"] = alternating_layers(fields["num_hidden_layers"])
        if fields.get("layer_types") is not None:
            fields["layer_types"] = tuple(fields["layer_types"])
        return cls(**fields)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything."""
        slides = self.layer_types is not None and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def query_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5


def alternating_layers(num_layers: int) -> tuple[str, ...]:
    """Gemma 2's order: layers 0, 2, 4, ... slide, the others see everything."""
    return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers))


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The whole `config.json`. Reads every published file and what current transformers writes."""

    text_config: GemmaConfig = field(default_factory=GemmaConfig)
    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    image_token_index: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> PaliGemmaConfig:
        """From the parsed `config.json`. Raises ValueError if it is of another model or cannot be honoured."""
        given = as_object(given, "the configuration")
        if given.get("model_type") != "paligemma":
            raise ValueError(
                f"model_type is {given.get('model_type')!r}, expected 'paligemma': another model's checkpoint"
            )
        # Never rely on a default for this one: the default of transformers, 256000, is <loc0000>.
        image_token = given.get("image_token_index", given.get("image_token_id"))
        if type(image_token) is not int or image_token < 0:
            raise ValueError(f"image_token_index is {image_token!r}, expected the id of <image>")
        for name in ("text_config", "vision_config"):
            if name not in given:
                raise ValueError(f"{name} is missing: not a complete PaliGemma configuration")
        known = {"text_config", "vision_config", "image_token_index", "image_token_id", "hidden_size", "vocab_size"}
        known |= {"_vocab_size", "ignore_index", "num_hidden_layers", "tie_word_embeddings"}
        unknown = sorted(set(given) - known - INERT_KEYS)
        if unknown:
            warnings.warn(f"config.json has keys that are not used: {', '.join(unknown)}", stacklevel=2)
        if given.get("tie_word_embeddings") is False:
            raise ValueError("tie_word_embeddings is false; PaliGemma's output layer is its input embedding")
        text = as_object(given["text_config"], "text_config")
        specials: dict[str, int] = {}
        for name, usual in (("pad_token_id", 0), ("bos_token_id", 2), ("eos_token_id", 1)):
            # At the top in published files, inside text_config in what transformers 5 writes. PaliGemma 2 lists
            # Gemma's chat stop token beside eos inside text_config: that one is never meant here.
            value: Any = given.get(name)
            if value is None:
                value = text.get(name)
            value = value[0] if isinstance(value, list) and value else value
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} is {value!r}, expected the id of a token")
            specials[name] = usual if value is None else value
        return cls(
            text_config=GemmaConfig.from_dict(text),
            vision_config=SiglipVisionConfig.from_dict(given["vision_config"]),
            image_token_index=image_token,
            **specials,
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PaliGemmaConfig:
        """Reads `config.json` in a folder. Raises FileNotFoundError or ValueError, naming the file."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a checkpoint folder holds a config.json")
        try:
            return cls.from_dict(parse_json(read_bytes(path, LARGEST_JSON), any_number=True))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that this project, transformers and what builds on it read alike."""
        text = asdict(self.text_config)
        if self.text_config.position_offset == 1:
            del text["position_offset"]  # ours alone; written only where it differs from everybody's
        if self.text_config.model_type == "gemma":
            gemma2_only = (
                "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window layer_types"
            )
            for name in gemma2_only.split():
                if text[name] is None:
                    del text[name]
            text["hidden_act"] = "gelu_pytorch_tanh"
        else:
            text["query_pre_attn_scalar"] = self.text_config.query_pre_attn_scalar or self.text_config.head_dim
            every_layer = ("full_attention",) * self.text_config.num_hidden_layers
            text["layer_types"] = list(self.text_config.layer_types or every_layer)
            if self.text_config.sliding_window is None:  # transformers reads no null here, but layers that do not slide
                text |= {"sliding_window": 4096, "layer_types": list(every_layer)}
            text["hidden_activation"] = "gelu_pytorch_tanh"
        text["num_image_tokens"] = self.vision_config.num_patches
        vision = {"model_type": "siglip_vision_model", **asdict(self.vision_config)}
        vision |= {"vision_use_head": False, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
        vision |= {"num_image_tokens": self.vision_config.num_patches, "projection_dim": self.text_config.hidden_size}
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_index,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "hidden_size": self.text_config.hidden_size,
            "projection_dim": self.text_config.hidden_size,
            "text_config": text,
            "vision_config": vision,
        }


# ---------------------------------------------------------------------------------------------- parts


class GemmaRMSNorm(nn.Module):
    """Divides by the root of the mean square. Unlike LayerNorm it subtracts no mean and has no bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))  # stored as the offset from 1

    def forward(self, x: Tensor) -> Tensor:
        # float32 throughout, rounded once at the end: in bfloat16 `1 + weight` alone would lose most of the weight.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [B, 1, S, E/2] each, computed in float32 and then cast to `dtype`.

    Rotary positions: at position p, pair i of a query or key is turned by the angle p * theta^(-2i / E), fast for the
    first pairs and slowly for the last. The product of a query and a key then depends on their distance alone.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[..., None] * theta**-exponent  # [B, S, E/2]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + E/2]) by its angle: the halves are split, not interleaved. x: [B, H, S, E]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, max_scores: int = 2**24
) -> Tensor:
    """Attention written out, which soft-capping needs: q [B, H, S, E], k and v [B, K, T, E], mask [B, 1, S, T].

    Works through the queries in chunks of at most `max_scores` scores (64 MB in float32): at 896 pixels all of them
    would be 4096 x 4096 x heads numbers, half a gigabyte a copy. Returns [B, H, S, E].
    """
    B, H, S, E = q.shape
    K, T = k.shape[1], k.shape[2]
    # The G query heads that share a key head are G times as many queries to it: no key is copied.
    q = q.view(B, K, H // K, S, E)
    keys = k.transpose(-1, -2)  # [B, K, E, T]
    rows = max(1, max_scores // (B * H * T))
    chunks = []
    for start in range(0, S, rows):
        chunk = q[:, :, :, start : start + rows]  # [B, K, G, s, E]
        s = chunk.shape[3]
        scores = (chunk.flatten(2, 3) @ keys) * scale  # [B, K, G * s, T]
        if softcap is not None:
            # Before the mask: capped afterwards, what is hidden would be at -cap and no longer hidden.
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(B, K, -1, s, T).masked_fill(
            ~mask[:, :, None, start : start + rows], torch.finfo(scores.dtype).min
        )
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        chunks.append((weights.flatten(2, 3) @ v).view(B, K, -1, s, E))
    attended = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=3)
    return attended.reshape(B, H, S, E)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same through PyTorch's fused kernel. Shapes as in `explicit_attention`."""
    if q.shape[2] == 1:
        # One new token: its G query heads become G queries to the one key head they share, so no key is repeated.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, K, G, E]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    # Views where K = 1, as in all of PaliGemma 1. (`enable_gqa=True` says the same, but not every backend has a fused
    # kernel that takes it together with a mask; without one all scores would be held at once.)
    G = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))  # [B, H, T, E]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions. Query head h reads key/value head h // (H / K)."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.query_scale
        self.softcap = config.attn_logit_softcapping
        self.explicit = False  # True: scores written out also where nothing is soft-capped
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]. last: only so many positions, the last ones, look around; 0 for all."""
        q = self.q_proj(x[:, -last:]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, E]; -0 keeps all
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, S, E]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = self.turn(q, cos[:, :, -last:], sin[:, :, -last:]), self.turn(k, cos, sin)
        mask = mask[:, :, -last:]  # [B, 1, S, T]
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, K, T, E]
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(-2))  # [B, S, D]

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rotary(x, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Shapes as in `explicit_attention`."""
        if self.explicit or self.softcap is not None:
            return explicit_attention(q, k, v, mask, self.scale, self.softcap)
        return fused_attention(q, k, v, mask, self.scale)


class GemmaMLP(nn.Module):
    """GeGLU: one projection, passed through GELU, opens and closes the gates of another."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaDecoderLayer(nn.Module):
    """Gemma 1: normalise before attention, normalise before the MLP.

    A trap in the published names: here `post_attention_layernorm` stands *after* the attention block in reading order
    but is the norm *before* the MLP. In Gemma 2 the same name is what it says.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        x = x[:, -last:] + self.self_attn(self.input_layernorm(x), mask, cos, sin, cache, last)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma2DecoderLayer(nn.Module):
    """Gemma 2: normalise before *and after* each half, inside the residual branch."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)
        self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), mask, cos, sin, cache, last)
        x = x[:, -last:] + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# ---------------------------------------------------------------------------------------------- the language model


class GemmaEmbedding(nn.Embedding):
    """The table of tokens, [V, D], read in both directions: rows on the way in, as the head on the way out."""

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V]: how well each token's row fits. ids: int64 [n], of these rows only, [..., n]."""
        return F.linear(hidden, self.weight if ids is None else self.weight[ids])


class GemmaModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = GemmaEmbedding(config.vocab_size, config.hidden_size)
        layer_class = Gemma2DecoderLayer if config.model_type == "gemma2" else GemmaDecoderLayer
        self.layers = nn.ModuleList(layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings times sqrt(D): int64 [B, S] -> [B, S, D]. The output head uses them unscaled."""
        # The factor is rounded to the weights' dtype, as in training: in bfloat16 sqrt(2048) is 45.25, not 45.2548.
        x = self.embed_tokens(input_ids)
        return x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype).to(x.device)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        masks: dict[int | None, Tensor],
        cache: KVCache | None = None,
        streams: list[Tensor] | None = None,
        last: int = 0,
    ) -> Tensor:
        """Embeddings [B, S, D] -> the stream after the final norm [B, S, D], or of the last positions only.

        position_ids: int64 [B, S]; masks: one [B, 1, S, T] per window size in use, None for no window. The stream is
        what the layers add their results to; into `streams`, where a list is given, goes the stream before every layer
        and, last, what is returned. last: how many positions are wanted, 0 for all. What the others would become in
        the last layer nobody reads; their keys and values there are still needed.
        """
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            if streams is not None:
                streams.append(x)
            wanted = last if index == len(self.layers) - 1 else 0
            x = layer(x, masks[self.config.window(index)], cos, sin, cache, wanted)
        x = self.norm(x)
        if streams is not None:
            streams.append(x)
        return x


class GemmaForCausalLM(nn.Module):
    """The language model with its head, which is the embedding matrix itself."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], soft-capped where the configuration says so. ids: int64 [n], of these tokens only."""
        logits = self.model.embed_tokens.logits(hidden, ids)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


# ---------------------------------------------------------------------------------------------- PaliGemma


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear layer from the width of the eye to the width of the mouth. No activation."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.linear(patches)


@dataclass
class PaliGemmaOutput:
    """logits: [B, S, V] in the model's dtype, None if not asked for. loss: float32 scalar, with labels only.
    hidden_states: on request, the stream before every layer and after the last norm, layers + 1 of [B, S, D]; of the
    last one only the positions that `hidden_to_keep` asks for."""

    logits: Tensor | None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class PaliGemmaForConditionalGeneration(nn.Module):
    """Image and prompt in, logits of the answer out. Parameter names equal those of the published checkpoints."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaForCausalLM(config.text_config)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    def set_explicit_attention(self, explicit: bool = True) -> None:
        """Writes attention out instead of using the fused kernel, everywhere. Soft-capped layers always do."""
        for module in self.modules():
            if isinstance(module, GemmaAttention | SiglipAttention):
                module.explicit = explicit

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Image features as the language model reads them: [n, 3, side, side] in [-1, 1] -> [n, P, D], not scaled.

        The expensive half of a short answer. Call it once per image and pass the result as `image_features` for as
        many prompts as there are.
        """
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Text embeddings with the image features in the places of the <image> tokens, in order. -> [B, S, D]

        image_features: [n, P, D], the images of all rows one after the other. Raises ValueError if the number of
        <image> tokens is not n * P.
        """
        is_image = input_ids == self.config.image_token_index
        tokens, features = int(is_image.sum()), 0
        if image_features is not None:
            features = image_features.shape[0] * image_features.shape[1]
        if tokens != features:
            raise ValueError(
                f"input_ids has {tokens} <image> tokens for {features} image features"
                + (": pass pixel_values or image_features" if image_features is None else "")
            )
        # The id of <image> may lie beyond the embedding (a vocabulary without it): look up any row, it is replaced.
        x = self.language_model.model.embed(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return x
        return x.masked_scatter(is_image[..., None], image_features.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | None = 0,
        output_hidden_states: bool = False,
        logits_of: Tensor | None = None,
        hidden_to_keep: int = 0,
    ) -> PaliGemmaOutput:
        """One pass over a batch of rows, or over the next tokens of cached rows.

        input_ids: int64 [B, S]. pixel_values: [n, 3, side, side] or image_features: [n, P, D], not both.
        attention_mask: [B, S], 0 on padding, default all 1; beside a cache it may also cover the cached columns.
        token_type_ids: int64 [B, S], 0 prefix and padding, 1 suffix. Left out: with labels, the suffix starts at a
            row's first label; beside a cache that holds the prefix, everything new is suffix; else all is prefix.
        labels: int64 [B, S], -100 where nothing is learned. The shift by one happens here.
        position_ids: int64 [B, S]; default: places among the real tokens of the row, counted from `position_offset`.
        cache: extended in place. The prefix must come in one piece, since it sees itself in both directions.
        logits_to_keep: 0 all positions, n the last n; None: no logits, and the loss is computed on the labelled
            positions alone. (The head is 257,216 wide: on every position of a batch it outweighs everything else.)
        logits_of: int64 [n], the tokens whose logits are wanted, [B, S, n] in their order; not together with labels.
        hidden_to_keep: beside `output_hidden_states` without logits and labels: of the stream after the last norm only
            so many positions, the last ones; 0 all. The last layer computes no others. Anywhere else it must be 0.

        The loss is the mean cross-entropy over all labelled tokens of the batch, in float32.
        Raises ValueError on shapes that do not fit together.
        """
        if labels is not None and logits_of is not None:
            raise ValueError("pass labels or logits_of, not both: the loss is over the whole vocabulary")
        alone = output_hidden_states and logits_to_keep is None and labels is None
        if hidden_to_keep < 0 or (hidden_to_keep and not alone):
            raise ValueError(
                f"hidden_to_keep is {hidden_to_keep}: it is at least 0, and more only with output_hidden_states=True, "
                "logits_to_keep=None and no labels"
            )
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("pass pixel_values or image_features, not both")
            image_features = self.encode_image(pixel_values)
        x = self.embed(input_ids, image_features)  # [B, S, D]
        valid, token_type_ids = self._rows(input_ids, attention_mask, token_type_ids, labels, cache)
        text = self.config.text_config
        windows = {text.window(layer) for layer in range(text.num_hidden_layers)}
        if cache is None or cache.used == 0:
            place = positions(valid) if cache is None else cache.extend(valid)
            masks = {window: prefix_lm_mask(token_type_ids, valid, window) for window in windows}
        else:
            place = cache.extend(valid)
            stored = cache.positions[:, : cache.used], cache.valid[:, : cache.used]
            masks = {window: cached_mask(place, *stored, window) for window in windows}
        if position_ids is None:
            position_ids = place + text.position_offset

        streams: list[Tensor] | None = [] if output_hidden_states else None
        if labels is not None:
            last = 0
        elif logits_to_keep is None:
            last = hidden_to_keep
        else:
            last = 0 if output_hidden_states else logits_to_keep
        x = self.language_model.model(x, position_ids, masks, cache, streams, last)
        if logits_to_keep is None:
            logits = None
        else:
            logits = self.language_model.logits(x[:, -logits_to_keep:], logits_of)  # -0 keeps all
        loss = None
        if labels is not None:
            loss = self._loss(x, logits if logits_to_keep == 0 else None, labels)
        return PaliGemmaOutput(logits, loss, None if streams is None else tuple(streams))

    def _rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        labels: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Which positions are real and which are suffix, with the defaults that can neither leak nor hide anything."""
        continues = cache is not None and cache.used > 0
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif cache is not None and continues and attention_mask.shape[1] == cache.used + input_ids.shape[1]:
            attention_mask = attention_mask[:, cache.used :]
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "labels": labels}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, input_ids {list(input_ids.shape)}")
        valid = attention_mask.bool()
        if token_type_ids is None:
            if continues:  # only a shape: `cached_mask` knows that all of them are suffix
                token_type_ids = torch.full_like(input_ids, SUFFIX)
            elif labels is not None:
                token_type_ids = token_types_from_labels(labels)
            else:
                token_type_ids = torch.zeros_like(input_ids)
        elif continues and bool(((token_type_ids != SUFFIX) & valid).any()):
            raise ValueError("the cache already holds a prefix: what follows must be suffix (token type 1)")
        return valid, token_type_ids

    def _loss(self, hidden: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        # Position t predicts token t + 1: the "\n" that ends the prompt predicts the first token of the answer.
        targets = labels[:, 1:]
        labelled = targets != -100
        if not labelled.any():
            raise ValueError("labels hold nothing to learn (all -100): give the processor a suffix")
        if logits is None:
            kept = self.language_model.logits(hidden[:, :-1][labelled])
        else:
            kept = logits[:, :-1][labelled]
        return F.cross_entropy(kept.float(), targets[labelled])
