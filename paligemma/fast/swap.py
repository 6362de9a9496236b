"""Swapping rounded and faster layers into a finished model. The model's files know nothing of this.

    quantize(model, "int8")                          a built model, in place
    load_hf_model(..., quantize="int8")              rounded while it is read (`weights/quantized.py`)
    paligemma quantize official/ small/ --int8       rounded on disk, once; loading then reads the rounded files

    mode   language model   vision tower, projector, head   bytes of a 3b   arithmetic
    bf16   unchanged        unchanged                       5.8 GB          exact products, float32 sums, rounded once
    int8   8 bits           8 bits                          2.9 GB          8-bit activations, exact integer sums
    int4   4 bits           8 bits                          2.0 GB          8-bit activations, exact integer sums

`rounding.py` says what 8 and 4 bits mean. Norms, softmax, residuals, biases and the patch embedding keep the model's
dtype. In all three modes what stands between the linear layers is computed faster as well: see FAST_CLASSES.

The modes "bnb-int8" and "nf4" are those of bitsandbytes, for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from paligemma.arguments import check_model
from paligemma.fast.decoder_layers import FastGemma2DecoderLayer, FastGemmaDecoderLayer
from paligemma.fast.fast_layers import (
    FastConv2d,
    FastEmbedding,
    FastGemmaAttention,
    FastGemmaMLP,
    FastLinear,
    FastRMSNorm,
    FastSiglipAttention,
    FastSiglipMLP,
)
from paligemma.fast.rounded_layers import Int4Linear, Int8Embedding, Int8Linear
from paligemma.fast.rounding import GROUP, check_finite, round_groups, round_rows
from paligemma.modeling_gemma import (
    Gemma2DecoderLayer,
    GemmaAttention,
    GemmaDecoderLayer,
    GemmaEmbedding,
    GemmaMLP,
    GemmaRMSNorm,
    PaliGemmaForConditionalGeneration,
)
from paligemma.modeling_siglip import SiglipAttention, SiglipMLP

STORED = ("int8", "int4")  # modes that a checkpoint on disk can have
WITH_BITSANDBYTES = ("bnb-int8", "nf4")
MODES = ("bf16", *STORED, *WITH_BITSANDBYTES)

# What stands between the linear layers, and the class that takes its place.
FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    GemmaDecoderLayer: FastGemmaDecoderLayer,
    Gemma2DecoderLayer: FastGemma2DecoderLayer,
    GemmaAttention: FastGemmaAttention,
    SiglipAttention: FastSiglipAttention,
    GemmaRMSNorm: FastRMSNorm,
    GemmaMLP: FastGemmaMLP,
    SiglipMLP: FastSiglipMLP,
    nn.Conv2d: FastConv2d,
}
FAST_LINEAR_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, GemmaEmbedding: FastEmbedding}


def check_mode(mode: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """ValueError for a mode that does not exist, or not on this device or in this dtype."""
    if mode not in MODES:
        raise ValueError(f"quantize is {mode!r}, expected one of {', '.join(MODES)}")
    if mode in ("bf16", *STORED) and device.type != "cpu":
        raise ValueError(f"quantize={mode!r} is for the CPU, not for {device}: use bnb-int8 or nf4 there")
    check_compute_dtype(mode, dtype)


def check_compute_dtype(mode: str, dtype: torch.dtype | None) -> None:
    """ValueError for a dtype in which layers with rounded weights do not compute."""
    if mode in STORED and dtype == torch.float16:
        raise ValueError(f"{mode} layers compute in bfloat16 or float32, not in float16: choose one of these as dtype")


def check_package(mode: str) -> None:
    """ImportError for a mode of bitsandbytes where that is not installed."""
    if mode in WITH_BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantize={mode!r} is for CUDA (int8 and int4 are for the CPU), and needs bitsandbytes: "
            "pip install 'paligemma[quantize]'"
        )


def quantize(model: PaliGemmaForConditionalGeneration, mode: str) -> PaliGemmaForConditionalGeneration:
    """Swaps the linear layers of a built model, in place, one after the other. Returns the model.

    mode: "bf16" changes how bfloat16 layers are computed, not what; "int8" and "int4" round the weights (see the head
    of this file); "bnb-int8" and "nf4" use bitsandbytes. Rounded weights can't be trained. (LoRA beside those of
    bitsandbytes can.)
    Raises ValueError for an unknown mode, for a model that is quantised already, and, but for bitsandbytes, for one
    that is not on the CPU or (int8, int4) is in float16; ImportError without bitsandbytes.
    """
    check_model(model)
    check_mode(mode, model.device, model.dtype)
    if is_quantized(model):
        raise ValueError("the model is quantised already: load it anew to choose another mode")
    check_package(mode)
    if mode in WITH_BITSANDBYTES:
        return _quantize_with_bitsandbytes(model, mode)
    if mode == "bf16":
        _change_classes(model, FAST_LINEAR_CLASSES)
        use_fast_layers(model)
        return model
    dtype = model.dtype
    for name, kind in rounded_kinds(model, mode).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        put_rounded(model, name, kind, round_weight(name, weight.detach(), kind), dtype)
    use_fast_layers(model)
    return model.requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    """Whether some layers hold rounded weights, ours or those of bitsandbytes."""
    ours = (Int8Linear, Int4Linear)
    return any(isinstance(m, ours) or type(m).__module__.startswith("bitsandbytes") for m in model.modules())


def use_fast_layers(model: nn.Module) -> None:
    """Makes everything between the linear layers fast."""
    _change_classes(model, FAST_CLASSES)


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Only the class of a module changes: its parameters, their names and its hooks stay what and where they are."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


# ------------------------------------------------------------------------------------------------ rounded layers


def rounded_kinds(model: nn.Module, mode: str) -> dict[str, str]:
    """What each module with a rounded weight becomes, by name: "int8" or "int4" linear layers, and the "embedding".

    4 bits are for the language model, whose weights are read for every token; the vision tower reads an image once. A
    layer whose inputs don't divide by 128 (no published language model has one) keeps 8 bits.
    """
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            small = mode == "int4" and name.startswith("language_model.") and module.in_features % (2 * GROUP) == 0
            kinds[name] = "int4" if small else "int8"
        elif isinstance(module, GemmaEmbedding):
            kinds[name] = "embedding"
    return kinds


def rounded_names(name: str, kind: str) -> list[str]:
    """The names of the tensors that the weight of module `name` becomes."""
    stem = f"{name}.head" if kind == "embedding" else name
    return [f"{stem}.{part}" for part in (("weight", "steps", "scale") if kind == "int4" else ("weight", "scale"))]


def round_weight(name: str, weight: Tensor, kind: str) -> tuple[Tensor, ...]:
    """These tensors. ValueError for a weight with NaN or infinity, for which there is no scale."""
    check_finite(f"{name}.weight", weight)
    return round_groups(weight) if kind == "int4" else round_rows(weight)


def rounded_shapes(shape: tuple[int, ...], kind: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of these tensors, for a weight of the given shape."""
    N, K = shape
    if kind == "int4":
        return [((N, K // 2), torch.uint8), ((N, K // GROUP), torch.int8), ((N,), torch.float32)]
    return [((N, K), torch.int8), ((N,), torch.float32)]


def put_rounded(model: nn.Module, name: str, kind: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Puts a layer with these rounded tensors in the place of module `name`; it keeps the bias."""
    old = model.get_submodule(name)
    new: Int8Embedding | Int8Linear | Int4Linear
    if kind == "embedding":
        new = Int8Embedding(dtype, *tensors)
    else:
        new = Int4Linear(*tensors) if kind == "int4" else Int8Linear(*tensors)
        new.bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
    model.set_submodule(name, new.train(old.training))


# ------------------------------------------------------------------------------------------------ bitsandbytes


def _quantize_with_bitsandbytes(
    model: PaliGemmaForConditionalGeneration, mode: str
) -> PaliGemmaForConditionalGeneration:
    """LLM.int8() (arXiv 2208.07339) or nf4 (arXiv 2305.14314), for every linear layer; the tied embedding stays."""
    import bitsandbytes

    device, dtype = model.device, model.dtype
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, old in linears.items():
        sizes, bias = (old.in_features, old.out_features), old.bias is not None
        weight = old.weight.detach().cpu()  # they are rounded when they are moved to the device
        new: Any
        if mode == "nf4":
            new = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
            new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        model.set_submodule(name, new.to(device).train(old.training))
    return model.requires_grad_(False)
