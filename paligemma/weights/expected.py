"""Which tensors a model of some configuration has, and whether a file holds exactly these."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paligemma.devices import on_meta_device
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.safetensors_file import Shape


def empty_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """The model without memory for its weights: every parameter is on the meta device."""
    with on_meta_device():
        return PaliGemmaForConditionalGeneration(config)


def expected_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def check_tensors(
    where: str,
    found: Mapping[str, tuple[Shape, torch.dtype | str]],
    expected: dict[str, Shape],
    hint: str = "The download is incomplete, or it is another model's.",
    listed: int = 8,
) -> None:
    """One ValueError with all that keeps these tensors from being these parameters, by name."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {list(shape)}, expected {list(expected[name])}"
            for name, (shape, _) in found.items()
            if name in expected and shape != expected[name]
        ],
        "not floating point": [
            f"{name} is {dtype}" for name, (_, dtype) in found.items() if name in expected and isinstance(dtype, str)
        ],
    }
    lines = []
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - listed} more" if len(names) > listed else ""
            lines.append(f"\n  {len(names)} {problem}: {', '.join(names[:listed])}{more}")
    if lines:
        raise ValueError(
            f"{where}: these weights are not those of the model that its configuration describes"
            f" ({len(expected)} tensors).{''.join(lines)}\n{hint}"
        )
