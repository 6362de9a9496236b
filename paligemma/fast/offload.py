"""A model larger than its device: layers that do not fit stay in memory or on disk, and are copied when they compute.

    load_hf_model(..., device_map="auto")
    offload(model, torch.device("cuda"), {"cuda": 8 * 10**9, "cpu": 16 * 10**9})

One device computes everything. So the cache and the masks are whole, and the model's files know nothing of this: the
hooks are accelerate's (https://huggingface.co/docs/accelerate/concept_guides/big_model_inference), added to a finished
model. Layers stay on the device by how often they are read: those of the decoder for every token, those of the vision
tower once an image. Any other layer is copied over the bus each time it is used.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

# Always on the device: the embedding, which is the head as well, and what is small. The model takes its `device` and
# `dtype` from its last norm.
KEPT = (
    "language_model.model.embed_tokens",
    "language_model.model.norm",
    "multi_modal_projector",
    "vision_tower.vision_model.embeddings",
    "vision_tower.vision_model.post_layernorm",
)
FREE_SHARE = 0.9  # of the device's free memory; the rest is for the cache and what is computed


def check_device_map(device_map: str | None, quantize: str | None) -> None:
    """Raises ValueError for a map that is not offered or not with this `quantize`, ImportError without accelerate."""
    if device_map is None:
        return
    if device_map != "auto":
        raise ValueError(f"device_map is {device_map!r}, expected 'auto' or None")
    if quantize is not None:
        raise ValueError(
            f"device_map='auto' moves whole weights, quantize={quantize!r} rounds them: choose one of both"
        )
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ImportError("device_map='auto' needs accelerate: pip install accelerate") from None


def offload(
    model: PaliGemmaForConditionalGeneration,
    device: torch.device,
    max_memory: Mapping[str, int | str] | None = None,
) -> PaliGemmaForConditionalGeneration:
    """Spreads a model that lies on the CPU over `device`, memory and disk, in place. Returns the model.

    max_memory: bytes, or text like "8GB", for the device (by its type or name, "cuda" or "cuda:1") and for "cpu".
    Default: most of what is free on the device, and any amount of memory, because weights that keep the dtype of their
    safetensors file are memory-mapped. Layers beyond both limits go to a temporary folder, removed with the model.
    Raises ValueError where the device can't hold the embedding and one layer, or for a key that names neither.
    """
    from accelerate import dispatch_model

    model.requires_grad_(False)  # a layer that is copied in and dropped again can't be trained
    places = device_map_of(model, device, _limits(device, max_memory))
    if set(places.values()) == {str(device)}:
        return model.to(device)
    folder = None
    if "disk" in places.values():
        folder = tempfile.mkdtemp(prefix="paligemma-offload-")
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    logger = logging.getLogger("accelerate.big_modeling")  # it warns of parameters elsewhere, which is intended
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        dispatch_model(model, places, main_device=str(device), offload_dir=folder)
    finally:
        logger.setLevel(level)
    return model


def device_map_of(
    model: PaliGemmaForConditionalGeneration, device: torch.device, limits: Mapping[str, float]
) -> dict[str, str]:
    """Name of a module -> str(device), "cpu" or "disk". limits: bytes for str(device) and "cpu"."""
    in_order = re.compile(r"(language_model\.model\.layers|vision_tower\.vision_model\.encoder\.layers)\.\d+")
    layers = [name for name, _ in model.named_modules() if in_order.fullmatch(name)]
    layers.sort(key=lambda name: name.startswith("vision"))  # those of the decoder first
    sizes = {name: _bytes(model.get_submodule(name)) for name in layers}
    # All else stays: KEPT, and modules that are not PaliGemma's own.
    stay: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(name.startswith(f"{layer}.") for layer in layers):
            kept_with = next((kept for kept in KEPT if name.startswith(f"{kept}.")), name.rpartition(".")[0] or name)
            stay[kept_with] += tensor.nbytes
    kept, largest, here = stay.total(), max(sizes.values()), str(device)
    free = limits[here] - kept
    if free < largest:
        raise ValueError(
            f"{here} may hold {limits[here] / 1e9:.2f} GB, and the embedding with one layer at a time takes "
            f"{(kept + largest) / 1e9:.2f} GB: allow more, or take a smaller or quantised model"
        )
    places = dict.fromkeys(stay, here)
    if sum(sizes[name] for name in layers) > free:
        free -= largest  # room for the layer that is copied in
    left = {here: free, **({} if here == "cpu" else {"cpu": limits["cpu"]})}
    for name in layers:
        places[name] = next((place for place, room in left.items() if sizes[name] <= room), "disk")
        if places[name] in left:
            left[places[name]] -= sizes[name]
    return places


def _limits(device: torch.device, max_memory: Mapping[str, int | str] | None) -> dict[str, float]:
    from accelerate.utils import convert_file_size_to_int

    limits = {"cpu": float("inf")}
    if device.type == "cuda":
        limits[str(device)] = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        limits[str(device)] = FREE_SHARE * torch.mps.recommended_max_memory()
    if not isinstance(max_memory, (Mapping, type(None))):
        raise TypeError(f"max_memory is {max_memory!r}, expected sizes by device: {{'cpu': '20GB'}}")
    for name, size in (max_memory or {}).items():
        key = str(device) if name in (device.type, str(device)) else name
        if key not in limits:
            raise ValueError(f"max_memory has {name!r}, expected {' and '.join(limits)}")
        try:
            limits[key] = float(convert_file_size_to_int(size))
        except ValueError:
            raise ValueError(f"max_memory[{name!r}] is {size!r}, expected bytes or a size such as '20GB'") from None
    return limits


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
