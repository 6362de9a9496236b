"""Which tensors a model of some configuration has, and whether a file holds exactly these."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch

from paligemma.devices import on_meta_device
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.safetensors_file import Shape


def empty_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """The model without memory for its weights: every parameter is on the meta device."""
    with on_meta_device():
        return PaliGemmaForConditionalGeneration(config)


def expected_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this configuration holds.

    The layers of a tower are alike, so one of each is built and repeated. To build all would take seconds for a
    configuration that claims a thousand layers, before the file is found to hold none of them.
    """
    text, vision = config.text_config, config.vision_config
    types = None if text.layer_types is None else text.layer_types[:1]
    one_layer = replace(
        config,
        text_config=replace(text, num_hidden_layers=1, layer_types=types),
        vision_config=replace(vision, num_hidden_layers=1),
    )
    counts = {"vision_tower": vision.num_hidden_layers, "language_model": text.num_hidden_layers}
    shapes: dict[str, Shape] = {}
    of_model = {name: tuple(tensor.shape) for name, tensor in empty_model(one_layer).state_dict().items()}
    for in_layer, group in itertools.groupby(of_model, key=lambda name: ".layers.0." in name):
        names = list(group)
        for i in range(counts[names[0].partition(".")[0]] if in_layer else 1):
            shapes |= {name.replace(".layers.0.", f".layers.{i}."): of_model[name] for name in names}
    return shapes


def check_tensors(
    where: str,
    found: Mapping[str, tuple[Shape, torch.dtype | str]],
    expected: dict[str, Shape],
    hint: str = "The download is incomplete, or it is another model's.",
) -> None:
    """Raises one ValueError with all that is missing, unexpected, of another shape or dtype, by name.

    where: whose tensors they are, for the message. hint: its last line.
    """
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
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"\n  {len(names)} {problem}: {', '.join(names[:8])}{more}")
    if lines:
        raise ValueError(
            f"{where}: these weights are not those of the model that its configuration describes"
            f" ({len(expected)} tensors).{''.join(lines)}\n{hint}"
        )
