"""Gemma, a decoder-only language model, and PaliGemma, which lets it read images.

    pixels [n, 3, side, side] --SigLIP--> [n, P, 1152] --projector--> image features [n, P, D]
                                                                       |  replaces the <image> tokens
    ids [B, S] --embedding x sqrt(D)--> [B, S, D] ---------------------+--> Gemma layers, norm, head -> logits [B, S, V]

A row of ids is laid out like this; `<image>` stands P times per image, and `<bos>` comes after the images:

    <image> <image> ... <image> <bos> caption en (newline)   a cat <eos>
    '--------------------- prefix -----------------------'   '- suffix -'

What is unusual, compared with other decoders:
- RMSNorm multiplies by `1 + weight`, in float32;
- the prefix (images and prompt) is not causal, see `attention_mask.py`;
- text embeddings are scaled by sqrt(D), image features are not;
- the head is the embedding table again (tied), so it has no parameter of its own;
- positions count from 1, as in transformers. (Rotary positions only depend on distances, so 0 would do as well.)

Gemma 1 (PaliGemma 1) and Gemma 2 (PaliGemma 2) differ in four places:
- Gemma 2 also normalises what attention and MLP return, before it is added (`Gemma2DecoderLayer`);
- it limits attention scores to +-50 and logits to +-30 (by default; soft-capping: `cap * tanh(x / cap)`);
- every other layer sees a sliding window of 4096 tokens only;
- its query scale is a setting of its own (the 27B has heads of 128 but scales by 144^-0.5).

Follows arXiv 2403.08295 (Gemma), 2408.00118 (Gemma 2), 2407.07726 (PaliGemma), 2412.03555 (PaliGemma 2).

Letters: B batch, S tokens (the length of x), Q queries, T keys, D hidden, H query heads, K key/value heads,
G = H / K query heads per key/value head, E head size, P image patches, V vocabulary, n images.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma import configuration
from paligemma.attention_mask import (
    PREFIX,
    SUFFIX,
    cached_mask,
    positions,
    prefix_lm_mask,
    token_types_from_labels,
    windowed,
)
from paligemma.kv_cache import KVCache
from paligemma.modeling_siglip import SiglipAttention, SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class GemmaConfig:
    """`text_config` of a checkpoint. The defaults are Gemma 2B, the language model of PaliGemma 1."""

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
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: by sqrt(head_dim)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # "sliding_attention" or "full_attention" for each layer; None: all full

    def __post_init__(self) -> None:
        configuration.check_text_config(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> GemmaConfig:
        """From the `text_config` object of a `config.json`. Raises ValueError, see `configuration.py`."""
        return cls(**configuration.read_text_config(cls, given))

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything."""
        slides = self.layer_types is not None and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def query_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5


# ---------------------------------------------------------------------------------------------- parts


class GemmaRMSNorm(nn.Module):
    """Divides by the root of the mean square. Unlike LayerNorm it subtracts no mean and has no bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))  # stored as the difference from 1

    def forward(self, x: Tensor) -> Tensor:
        # float32 throughout, rounded once at the end: in bfloat16 `1 + weight` alone would lose most of the weight.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [B, 1, S, E/2] each, computed in float32 and then cast to `dtype`.

    Rotary positions: at position p, pair i of a query or key, (x[i], x[i + E/2]), is rotated by the angle
    p * theta^(-2i / E): fast for the first pairs and slowly for the last. The product of a query and a key then depends
    on their distance alone.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[..., None] * theta**-exponent  # [B, S, E/2]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + E/2]) by its angle: the halves are split, not interleaved. x: [B, H, S, E]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention written out: q [B, H, Q, E], k and v [B, K, T, E], mask bool [B, 1, Q, T] -> [B, H, Q, E].

    Every query needs a key that it may look at; the functions of `attention_mask.py` see to it.
    """
    B, K, T, E = k.shape
    G = q.shape[1] // K
    grouped = q.reshape(B, K, G * q.shape[2], E)  # the G heads that share a key head are more queries to it
    scores = (grouped @ k.transpose(-1, -2)) * scale  # [B, K, G * Q, T]
    if softcap is not None:
        # Before the mask: capped afterwards, masked scores would be raised to -cap and no longer be masked.
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(B, K, G, mask.shape[2], T).masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # [B, K, G, Q, T]
    return (weights.flatten(2, 3) @ v).reshape(q.shape)


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions. Query head h reads key/value head h // G."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.query_scale
        self.softcap = config.attn_logit_softcapping
        self.explicit = False  # True: attention written out in Gemma 1 as well (Gemma 2 needs it for the cap)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D], mask bool [B, 1, Q, T], cos and sin [B, 1, S, E/2] -> [B, Q, D].

        The mask says how many queries there are: the last Q positions. Q is S, except in the final layer, where the
        other positions are not wanted (see `GemmaModel.forward`).
        """
        Q = mask.shape[2]
        q = self.q_proj(x[:, -Q:]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, Q, E]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, S, E]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = self.rotate(q, cos[:, :, -Q:], sin[:, :, -Q:]), self.rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, K, T, E]: those of all tokens so far
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(-2))  # [B, Q, D]

    rotate = staticmethod(apply_rotary)  # `fast/fast_layers.py` has a kernel for it

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Shapes as in `explicit_attention`."""
        if self.explicit or self.softcap is not None:
            return attention_in_chunks(q, k, v, mask, self.scale, self.softcap)
        return fused_attention(q, k, v, mask, self.scale)


class GemmaMLP(nn.Module):
    """GeGLU: one projection goes through GELU and becomes the gate of another."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaDecoderLayer(nn.Module):
    """Gemma 1: normalise before attention, normalise before the MLP. x [B, S, D] -> [B, Q, D]

    A trap in the published names: here `post_attention_layernorm` comes after attention in reading order, but it is
    the norm *before the MLP*. In Gemma 2 the same name is what it says.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x[:, -mask.shape[2] :] + self.self_attn(self.input_layernorm(x), mask, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma2DecoderLayer(nn.Module):
    """Gemma 2: normalise before *and after* attention, before and after the MLP. x [B, S, D] -> [B, Q, D]"""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)
        self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), mask, cos, sin, cache)
        x = x[:, -mask.shape[2] :] + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# ---------------------------------------------------------------------------------------------- the language model


class GemmaEmbedding(nn.Embedding):
    """The table of tokens, [V, D], used in both directions: it embeds ids, and it is the head."""

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V]: the product with every token's row. With ids, int64 [n]: with these rows, [..., n]."""
        return F.linear(hidden, self.weight if ids is None else self.weight[ids])


class GemmaModel(nn.Module):
    """Embedding, layers and the final norm. embedding: False for a model that reads no tokens, only vectors."""

    def __init__(self, config: GemmaConfig, embedding: bool = True):
        super().__init__()
        self.config = config
        if embedding:
            self.embed_tokens = GemmaEmbedding(config.vocab_size, config.hidden_size)
        layer_class = Gemma2DecoderLayer if config.model_type == "gemma2" else GemmaDecoderLayer
        self.layers = nn.ModuleList(layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings times sqrt(D): int64 [B, S] -> [B, S, D]. The head uses them unscaled."""
        # The factor is rounded to the weights' dtype, as in training: in bfloat16 sqrt(2048) is 45.25, not 45.2548.
        x = self.embed_tokens(input_ids)
        return x * torch.full((), math.sqrt(self.config.hidden_size), dtype=x.dtype, device=x.device)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        masks: dict[int | None, Tensor],
        cache: KVCache | None = None,
        num_outputs: int | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings [B, S, D] -> hidden states after the final norm, [B, S, D], or [B, num_outputs, D].

        position_ids: int64 [B, S]. masks: for each window size in use (None: no window) bool [B, 1, S, T], True where
        a query may look at a key, at least at one. num_outputs: only the last positions, so many of them.
        hidden_states: a list to which the input of every layer is appended, and then what is returned.
        """
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(x)
            mask = masks[self.config.window(index)]
            if num_outputs is not None and index == len(self.layers) - 1:
                # The final layer computes only the positions that are wanted: nothing reads the others after it. The
                # layer sees this from the mask, which has no rows for them. Their keys and values are still computed.
                mask = mask[:, :, -num_outputs:]
            x = layer(x, mask, cos, sin, cache)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


class GemmaForCausalLM(nn.Module):
    """The language model with its head, which is the embedding table itself."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], soft-capped in Gemma 2. ids: int64 [n], the logits of these tokens only, [..., n]."""
        logits = self.model.embed_tokens.logits(hidden, ids)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


# ---------------------------------------------------------------------------------------------- PaliGemma


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
        fields = configuration.read_config(given)
        text, vision = fields.pop("text_config"), fields.pop("vision_config")
        return cls(GemmaConfig.from_dict(text), SiglipVisionConfig.from_dict(vision), **fields)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PaliGemmaConfig:
        """Reads `config.json` in a folder. Raises FileNotFoundError or ValueError, naming the file."""
        return configuration.read_config_file(folder, cls.from_dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that this project, transformers and what builds on it read alike."""
        return configuration.write_config(self)


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear layer from the width of the vision tower to that of the language model. No activation."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.linear(patches)


@dataclass
class PaliGemmaOutput:
    """logits: [B, S, V] in the model's dtype; [B, n, V] with logits_to_keep=n. loss: float32 scalar, with
    labels only. hidden_states: on request, the input of every layer and the output of the final norm, layers + 1 of
    [B, S, D]."""

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class PaliGemmaForConditionalGeneration(nn.Module):
    """Images and prompt in, logits of the answer out. Parameter names equal those of the published checkpoints."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        if not isinstance(config, PaliGemmaConfig):
            raise TypeError(f"config is {type(config).__name__}, expected a PaliGemmaConfig (it has a `from_dict`)")
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

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Image features as the language model reads them: [n, 3, side, side] in [-1, 1] -> [n, P, D], not scaled.

        For a short answer this is most of the work. Call it once per image and pass the result as `image_features`
        for as many prompts as there are. Raises TypeError for anything but a tensor.
        """
        _check_tensor("pixel_values", pixel_values, "a tensor [n, 3, side, side]: the processor makes it of pictures")
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Text embeddings, with the image features in the places of the <image> tokens, in order. -> [B, S, D]

        image_features: [n, P, D], the images of all rows one after the other. Raises ValueError if the number of
        <image> tokens is not n * P (not checked while compiling).
        """
        is_image = input_ids == self.config.image_token_index
        check_image_tokens(is_image, image_features)
        # The id of <image> may lie beyond the embedding (a vocabulary without it): look up any row, it is replaced.
        x = self.language_model.model.embed(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return x
        return x.masked_scatter(is_image[..., None], image_features.to(x.dtype))

    def read(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        num_outputs: int | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs everything but the head: the hidden states after the final norm, [B, S, D]. Parameters as in `forward`.

        num_outputs: only the last positions, so many of them, [B, num_outputs, D]; None: all.
        hidden_states: a list to which the input of every layer is appended, and then what is returned.
        """
        if input_ids is not None:
            _check_tensor("input_ids", input_ids, "a tensor of token ids [B, S]: the processor makes it of prompts")
        continues = cache is not None and cache.used > 0  # the cache holds the prefix: what comes now is suffix
        images = [given for given in (pixel_values, image_features) if given is not None]
        if len(images) > 1:
            raise ValueError("pass pixel_values or image_features, not both")
        if images and continues:
            raise ValueError("the cache already holds a prefix, which must come in one piece: no image can follow")
        if num_outputs is not None and num_outputs < 1:
            raise ValueError(f"num_outputs is {num_outputs}, expected at least 1, or None for all")
        if inputs_embeds is not None and input_ids is None:
            if images:
                raise ValueError("inputs_embeds stand in place of input_ids and images: leave the images out")
            x = inputs_embeds  # [B, S, D]
        elif input_ids is None or inputs_embeds is not None:
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        elif continues:
            x = self.language_model.model.embed(input_ids)  # an answer holds no <image>, so there is none to look for
        else:
            x = self.embed(input_ids, image_features if pixel_values is None else self.encode_image(pixel_values))

        B, S = x.shape[:2]
        if position_ids is not None and [*position_ids.shape] not in ([B, S], [1, S]):
            raise ValueError(f"position_ids has shape {[*position_ids.shape]}, expected {[B, S]}, or one row for all")
        rows = "inputs_embeds" if input_ids is None else "input_ids"
        valid, token_type_ids = _valid_and_types(rows, x, attention_mask, token_type_ids, cache)
        place = positions(valid) if cache is None else cache.extend(valid)  # int64 [B, S], counts real tokens from 0
        key_place, key_valid = place, valid  # [B, T]
        if cache is not None:
            key_place, key_valid = cache.positions[:, : cache.used], cache.valid[:, : cache.used]
        text = self.config.text_config
        windows = {text.window(layer) for layer in range(text.num_hidden_layers)}
        if mask is not None:
            masks = {window: windowed(mask, place, key_place, window) for window in windows}
        elif continues:
            masks = {window: cached_mask(place, key_place, key_valid, window) for window in windows}
        else:
            masks = {window: prefix_lm_mask(token_type_ids, valid, window) for window in windows}
        if position_ids is None:
            position_ids = place + text.position_offset
        return self.language_model.model(x, position_ids, masks, cache, num_outputs, hidden_states)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """The head: hidden states [..., D] -> [..., V]. ids: int64 [n], the logits of these tokens only, [..., n]."""
        return self.language_model.logits(hidden, ids)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over all labelled tokens of the batch, float32. hidden: [B, S, D] from `read`.

        The head is computed at the labelled positions alone: it is 257,216 wide, so at every position of a batch it
        would take most of the memory of a training step. Raises ValueError if nothing is labelled.
        """
        # Position t predicts token t + 1: the newline that ends the prompt predicts the first token of the answer.
        targets = labels[:, 1:]
        labelled = targets != -100
        if not labelled.any():
            raise ValueError("labels hold nothing to learn (all -100): give the processor a suffix")
        return F.cross_entropy(self.logits(hidden[:, :-1][labelled]).float(), targets[labelled])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> PaliGemmaOutput:
        """One pass over a batch of rows, or over the next tokens of cached rows: `read`, then `loss` and `logits`.

        To train, call `read` and `loss`: they leave out the logits of all positions.

        input_ids: int64 [B, S]. pixel_values: [n, 3, side, side] or image_features: [n, P, D], not both.
        attention_mask: [B, S], 0 on padding, default all 1; with a cache it may also cover the cached columns, whose
            part is then ignored.
        token_type_ids: int64 [B, S], 0 prefix and padding, 1 suffix. Left out: with labels, the suffix starts at a
            row's first label; with a cache that holds the prefix, everything new is suffix; else all is prefix.
        labels: int64 [B, S], -100 where nothing is learned. The shift by one happens here.
        position_ids: int64 [B, S], or [1, S] for all rows; default: places among the real tokens of the row, counted
            from `position_offset`.
        cache: extended in place. The prefix must come in one piece, since it sees itself in both directions.
        logits_to_keep: n for the logits of the last n positions, 0 for all.
        inputs_embeds: [B, S, D], in place of input_ids and images; they are not scaled.
        mask: bool [B, 1, S, T], True where a query may look at a key, in place of the prefix rule and of padding.
            Sliding windows still apply, to the prefix too: such a mask does not say what is prefix. A query that is
            left without a key attends to itself.

        Raises ValueError on shapes that do not fit together, TypeError for ids or pixels that are no tensor.
        """
        rows, given = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
        if labels is not None and given is not None:
            _check_shape("labels", labels, rows, given)
            if token_type_ids is None and (cache is None or cache.used == 0):
                token_type_ids = token_types_from_labels(labels)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}, expected 0 for all positions, or how many")
        states: list[Tensor] | None = [] if output_hidden_states else None
        only_the_last = logits_to_keep > 0 and labels is None and not output_hidden_states
        hidden = self.read(
            input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            image_features=image_features,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mask=mask,
            num_outputs=logits_to_keep if only_the_last else None,
            hidden_states=states,
        )
        loss = None if labels is None else self.loss(hidden, labels)
        logits = self.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return PaliGemmaOutput(logits, loss, None if states is None else tuple(states))

    def set_explicit_attention(self, explicit: bool = True) -> None:
        """Writes attention out everywhere, instead of using the fused kernel. Soft-capped layers always do so."""
        for module in self.modules():
            if isinstance(module, GemmaAttention | SiglipAttention):
                module.explicit = explicit


def check_image_tokens(is_image: Tensor, image_features: Tensor | None) -> None:
    """ValueError if the <image> tokens (True in `is_image`) are not as many as the features [n, P, D] of the images."""
    if torch.compiler.is_compiling():
        return  # int() waits for the device, and no graph can hold that
    tokens = int(is_image.sum())
    features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
    if tokens != features:
        raise ValueError(
            f"input_ids has {tokens} <image> tokens for {features} image features"
            + (": pass pixel_values or image_features" if image_features is None else "")
        )


def _valid_and_types(
    rows: str,
    given: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, Tensor]:
    """Which positions are real (bool [B, S]) and which are suffix (int64 [B, S]), with the defaults of `forward`.

    rows: the name of the argument that the rows are `given` in, [B, S, ...].
    """
    shape, device = given.shape[:2], given.device
    continues = cache is not None and cache.used > 0
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool, device=device)
    elif cache is not None and continues and attention_mask.shape[1] == cache.used + shape[1]:
        attention_mask = attention_mask[:, cache.used :]
    _check_shape("attention_mask", attention_mask, rows, given)
    valid = attention_mask.bool()
    if token_type_ids is None:
        return valid, torch.full(shape, SUFFIX if continues else PREFIX, device=device)
    _check_shape("token_type_ids", token_type_ids, rows, given)
    if continues and bool(((token_type_ids != SUFFIX) & valid).any()):
        raise ValueError("the cache already holds a prefix: what follows must be suffix (token type 1)")
    return valid, token_type_ids


def _check_tensor(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected {expected}")


def _check_shape(name: str, tensor: Tensor, rows: str, given: Tensor) -> None:
    if tensor.shape != given.shape[:2]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, {rows} {list(given.shape[:2])}")


# ---------------------------------------------------------------------------------------------- the same, faster


def attention_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, max_scores: int = 2**24
) -> Tensor:
    """`explicit_attention`, a few queries at a time: about `max_scores` scores (64 MB in float32) at once.

    At 896 pixels all of them would be 4096 x 4096 x 8 heads, half a gigabyte in float32, and several copies are made.
    """
    B, H, Q, _ = q.shape
    rows = max(1, max_scores // max(1, B * H * k.shape[2]))
    if torch.compiler.is_compiling() or rows >= Q:  # a loop would fix the length in an exported graph
        return explicit_attention(q, k, v, mask, scale, softcap)
    chunks = zip(q.split(rows, dim=2), mask.split(rows, dim=2))
    return torch.cat([explicit_attention(some, k, v, seen, scale, softcap) for some, seen in chunks], dim=2)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same through PyTorch's fused kernel, which never holds the scores. Shapes as in `explicit_attention`."""
    if q.shape[2] == 1:
        # One new token: its G query heads become G queries to the one key head they share, so no key is repeated.
        grouped = q.view(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[3])  # [B, K, G, E]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    # Views where K = 1, as in all of PaliGemma 1. (`enable_gqa=True` says the same, but not every backend has a fused
    # kernel that takes it together with a mask; without one all scores would be held at once.)
    G = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))  # [B, H, T, E]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
