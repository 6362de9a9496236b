"""Parts of a model that are not PaliGemma's own: another projector, a head for retrieval, and the like.

    extra = {"multi_modal_projector": TwoLayers(1152, 2304)}
    pg = paligemma.load("google/paligemma2-3b-pt-224", extra=extra)                       # to be trained
    paligemma.save_pretrained(pg.model, "mine", pg.processor, extra=list(extra))
    pg = paligemma.load("mine", extra={"multi_modal_projector": TwoLayers(1152, 2304)})   # as it was trained

A module takes the place of the model's own part of that name; a name that the model does not have is added to it. The
weights of the module are those of the checkpoint, where all of them have to be there. A checkpoint that holds nothing
under this name, or the weights of the part that is replaced, leaves the module as it is. `docs/changing.md` tells more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.weights.safetensors_file import Shape

Extra = Mapping[str, nn.Module]
NO_EXTRA: Extra = {}


def shapes_with_extra(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], extra: Extra
) -> tuple[dict[str, Shape], list[str]]:
    """The tensors that a checkpoint with these parts holds, and those of `found` that are of a replaced part."""
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra is {type(extra).__name__}, expected modules by their names: {{'name': module}}")
    shapes: dict[str, Shape] = dict(expected)
    unused: list[str] = []
    for name, module in extra.items():
        if not isinstance(module, nn.Module):
            raise ValueError(f"extra[{name!r}] is {type(module).__name__}, expected a torch.nn.Module")
        replaced = {key: shapes.pop(key) for key in list(shapes) if key.startswith(name + ".")}
        own = {f"{name}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        there = {key: shape for key, shape in found.items() if key.startswith(name + ".")}
        if there and (there == own or there != replaced):
            shapes |= own
        else:
            unused += there
    return shapes, unused


def put_extra(
    model: PaliGemmaForConditionalGeneration, extra: Extra, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Puts the modules into a model, in place. ValueError for a name that cannot be that of a module."""
    for name, module in extra.items():
        parent, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
        except AttributeError:
            raise ValueError(f"extra[{name!r}]: the model has no part {parent!r}") from None
        if not leaf.isidentifier() or (hasattr(owner, leaf) and not isinstance(getattr(owner, leaf), nn.Module)):
            raise ValueError(f"extra[{name!r}]: {leaf!r} is no name for a part of the model: choose another")
        setattr(owner, leaf, module.to(device, dtype))


def shapes_to_save(
    model: PaliGemmaForConditionalGeneration, expected: Mapping[str, Shape], extra: Iterable[str]
) -> dict[str, Shape]:
    """The tensors of a model in which the parts named by `extra` are not PaliGemma's own."""
    shapes = dict(expected)
    for name in extra:
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(name + ".")}
        try:
            part = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"extra names {name!r}, and the model has no such part") from None
        shapes |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in part.state_dict().items()}
    return shapes
