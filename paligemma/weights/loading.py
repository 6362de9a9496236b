"""From an opened checkpoint to a model, in any dtype and at any resolution.

*Nothing is held twice.* The model is built without memory (on the meta device) and its tensors are put in one by one.
A safetensors file is memory-mapped (`safetensors_file.py`): a tensor that keeps its dtype stays a view of the file and
costs memory when it is first used. The map is private, so training in place changes the copy in memory and never the
file. A tensor that changes its dtype gets a map of its own, which goes away with it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.expected import empty_model
from paligemma.weights.extra import NO_EXTRA, Extra, put_extra
from paligemma.weights.layouts import POSITIONS
from paligemma.weights.opening import Checkpoint, open_checkpoint
from paligemma.weights.published import published_name

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch.dtype or its name. Raises ValueError for anything but bfloat16, float16 and float32."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return found


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
    extra: Extra = NO_EXTRA,
) -> PaliGemmaForConditionalGeneration:
    """A checkpoint, opened or by its path -> the model, in evaluation mode, its parameters trainable.

    dtype: default bfloat16 for the published sizes, the checkpoint's own for all others. image_size: another
    resolution than the checkpoint's; its position table is resampled. extra: parts that are not PaliGemma's own, the
    same with which the checkpoint was opened. Raises as `open_checkpoint` does.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, extra)
    if image_size is not None:
        checkpoint = at_image_size(checkpoint, image_size)
    if (dtype := parse_dtype(dtype)) is None:
        dtype = default_dtype(checkpoint)
    device = torch.device(device)
    model = empty_model(checkpoint.config)
    put_extra(model, extra, device, dtype)
    for name, (_, stored) in checkpoint.tensors.items():
        tensor = checkpoint.read(name, mapped=stored == dtype and device.type == "cpu")
        parent, _, leaf = name.rpartition(".")
        owner, tensor = model.get_submodule(parent), cast(name, tensor, dtype, device)
        if leaf in owner._buffers:  # only parts that are not PaliGemma's own have buffers in a checkpoint
            owner._buffers[leaf] = tensor
        else:
            setattr(owner, leaf, nn.Parameter(tensor))
    return model.eval()


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 for the published sizes, the checkpoint's own for all others."""
    return torch.bfloat16 if published_name(checkpoint.config) else checkpoint.dtype


def cast(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    result = tensor.to(device, dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and bool(result.isinf().any()):
        raise ValueError(f"{name} has values beyond 65504, the largest of float16: use bfloat16 or float32")
    return result


def config_at_image_size(config: PaliGemmaConfig, image_size: int) -> PaliGemmaConfig:
    """The same configuration for another resolution. ValueError for one that its patches or positions do not allow."""
    if type(image_size) is not int or image_size <= 0:
        raise ValueError(f"image_size is {image_size!r}, expected a positive whole number of pixels")
    vision = replace(config.vision_config, image_size=image_size)  # raises ValueError for an odd size
    limit = config.text_config.max_position_embeddings
    if vision != config.vision_config and vision.num_patches >= limit:
        raise ValueError(
            f"image_size {image_size:,} makes {vision.num_patches:,} image tokens, and the model has {limit:,} "
            "positions for image and text: choose a smaller one"
        )
    return replace(config, vision_config=vision)


def at_image_size(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    """The same checkpoint for another resolution: only its table of positions changes."""
    config = config_at_image_size(checkpoint.config, image_size)
    if config == checkpoint.config:
        return checkpoint
    if POSITIONS not in checkpoint.tensors:  # a vision tower that is not PaliGemma's own
        return replace(checkpoint, config=config)
    vision = config.vision_config
    shape, dtype = (vision.num_patches, vision.hidden_size), checkpoint.tensors[POSITIONS][1]

    def read(name: str, mapped: bool = False) -> Tensor:
        if name == POSITIONS:
            return resample_positions(checkpoint.read(name), vision.num_patches).to(dtype)
        return checkpoint.read(name, mapped)

    return replace(checkpoint, config=config, tensors=checkpoint.tensors | {POSITIONS: (shape, dtype)}, read=read)


def resample_positions(table: Tensor, num_patches: int) -> Tensor:
    """A table of positions [P, D] for a grid of another size: float32 [num_patches, D].

    Linear in both directions, corners on corners: what big_vision does with scipy.ndimage.zoom(order=1).
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(num_patches)
    grid = table.float().T.reshape(1, -1, old, old)  # [1, D, grid, grid]
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return grid.reshape(-1, new * new).T.contiguous()
