"""Which weights learn, and how: parts that stay as they are, LoRA, dropout, gradient checkpointing.

    freeze(model, ["vision"])                 # the vision tower stays as it is
    add_lora(model, ["decoder"], rank=8)      # or: everything stays, beside each linear layer two small ones learn
    set_dropout(model, 0.1)                   # in the decoder's layers
    checkpoint_gradients(model)               # less memory, a third more time
    suit_cpu(model)                           # what is faster there

All of it changes a built model from outside, by `requires_grad`, by forward hooks and by swapped layers: the model's
own files know nothing of training. The parts have these names:

    vision       SigLIP
    projector    the linear layer between vision tower and language model
    decoder      Gemma, with its embedding
    embedding    the embedding alone, which is the output layer too (so: not by itself a part that LoRA could go to)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

PARTS = {
    "vision": "vision_tower",
    "projector": "multi_modal_projector",
    "decoder": "language_model",
    "embedding": "language_model.model.embed_tokens",
}

# All linear layers of a part, as a pattern that means the same in every layout of names that transformers has had.
# Without the part, a name such as q_proj would match in the vision tower as well.
LINEAR_LAYERS = {
    "vision": r"(.*\.)?vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "projector": r"(.*\.)?multi_modal_projector\.linear",
    "decoder": r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}


def freeze(model: PaliGemmaForConditionalGeneration, parts: str | Sequence[str]) -> None:
    """The named parts stop learning; the others are left as they are.

    Raises ValueError for a name that is no part, and when nothing would be left to learn.
    """
    names = _names(parts, PARTS, "can be frozen")
    frozen = {id(p) for part in names for p in model.get_submodule(PARTS[part]).parameters()}
    if not any(p.requires_grad and id(p) not in frozen for p in model.parameters()):
        raise ValueError(f"with {', '.join(names)} frozen nothing is left to learn: leave a part out")
    for part in names:
        model.get_submodule(PARTS[part]).requires_grad_(False)


def add_lora(
    model: PaliGemmaForConditionalGeneration,
    parts: str | Sequence[str] = ("decoder",),
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> PaliGemmaForConditionalGeneration:
    """Puts LoRA beside every linear layer of the named parts, in place: W x becomes W x + alpha / rank * B (A x).

    A is random, B zero, so at first the model answers as before. From now on A and B alone learn; they are float32
    whatever the model is. alpha: default `rank`, a factor of 1. dropout: of what A reads, in training. Returns the
    model. `adapters.save_adapter` writes what was learned. A model loaded with quantize="nf4" (bitsandbytes) is taken
    too: QLoRA, arXiv 2305.14314.

    Follows arXiv 2106.09685, through the library `peft`. Raises ValueError for a name that is no part with linear
    layers, for numbers that make no sense, for a model that has LoRA already, and for one whose layers are rounded in a
    way that lets no gradient through; ImportError without `peft`.
    """
    names = _names(parts, LINEAR_LAYERS, "can be given LoRA")
    if not names:
        raise ValueError(f"no part is named for LoRA: choose of {', '.join(LINEAR_LAYERS)}")
    alpha = rank if alpha is None else alpha
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"LoRA with rank {rank}, alpha {alpha} and dropout {dropout}: expected a rank of 1 or more, an alpha above "
            "0 and a dropout in [0, 1)"
        )
    if hasattr(model, "peft_config"):
        raise ValueError("the model has LoRA already: load it anew to start again")
    pattern = "|".join(LINEAR_LAYERS[name] for name in names)
    for name, layer in model.named_modules():
        if re.fullmatch(pattern, name) and not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{name} is {type(layer).__name__}, which is for answering alone: load the model without quantize, or "
                "with quantize='nf4' or 'bnb-int8'"
            )
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs the package peft: pip install 'paligemma[train]'") from None

    strength: Any = alpha  # peft says int, and divides
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=strength,
        lora_dropout=dropout,
        target_modules=pattern,
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, model)  # also freezes all the rest
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A step of the optimizer is far below the rounding of bfloat16.
            parameter.data = parameter.data.float()
    return model


def set_dropout(model: PaliGemmaForConditionalGeneration, p: float) -> None:
    """Dropout in the decoder where the reference has it; active in training mode only. Again with another p replaces.

    After attention and after the MLP of every layer. Of Gemma 2's norms behind these two, dropout stands after the one
    and before the other: x + drop(norm(attention)), x + norm(drop(mlp)). Source: big_vision, models/ppp.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout is {p}, expected a share in [0, 1)")
    norm_after_attention = model.config.text_config.model_type == "gemma2"
    layers: Any = model.language_model.model.layers
    for layer in layers:
        # A trap: Gemma 1 has a post_attention_layernorm too, and it is the norm before the MLP.
        attention = layer.post_attention_layernorm if norm_after_attention else layer.self_attn
        for place in (attention, layer.mlp):
            if not hasattr(place, "dropout"):
                place.register_forward_hook(_drop)
            place.dropout = p


def _drop(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return F.dropout(output, float(module.dropout), module.training)


def checkpoint_gradients(model: PaliGemmaForConditionalGeneration) -> None:
    """Every layer of decoder and vision tower keeps only its input, and is computed again when its gradient is due.

    Losses and gradients stay the same, dropout included: its random numbers are the same the second time. Without
    gradients, or in evaluation mode, nothing is computed twice.
    """
    for layer in (*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers):
        if not isinstance(layer.forward, partial):
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *inputs: Any) -> Tensor:
    # The bound method knows its layer, and finds the right one in a copy of the model as well.
    if forward.__self__.training and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)


def suit_cpu(model: PaliGemmaForConditionalGeneration) -> None:
    """Attention written out, where a CPU trains a small model at a low resolution.

    The backward pass of PyTorch's fused attention is slow there: of the 414 ms in which the first embedded model's
    gradients of 16 rows were computed it took 140, and 297 ms are enough without it. Its advantage, never to hold all
    attention scores, matters where there are many: for 8 pictures of 256 patches they are 34 MB in each vision layer.
    """
    if is_small(model) and model.config.vision_config.num_patches <= 256:
        model.set_explicit_attention()


def is_small(model: nn.Module) -> bool:
    return sum(parameter.nbytes for parameter in model.parameters()) <= 10**9


def count(parameter: Tensor) -> int:
    """How many numbers a parameter holds. Of those in four bits a byte holds two."""
    rounded = getattr(parameter, "quant_state", None)  # of bitsandbytes
    return parameter.numel() if rounded is None else math.prod(rounded.shape)


def _names(parts: str | Sequence[str], known: dict[str, str], what: str) -> list[str]:
    names = [parts] if isinstance(parts, str) else list(parts)
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"no part {', '.join(map(repr, strange))} of the model {what}: choose of {', '.join(known)}")
    return names
