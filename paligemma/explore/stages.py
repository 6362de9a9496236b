"""Every tensor on the way from a picture to the first two words, in order: what it is, where it is made, how long."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from paligemma import attention_mask, generation, images
from paligemma.images import ImageInput
from paligemma.inference import PaliGemma
from paligemma.modeling_gemma import GemmaForCausalLM, GemmaModel, PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.weights.published import published_name

ROOT = Path(images.__file__).parent


@dataclass(repr=False)
class Stage:
    """One step. file: "path:line" of the code that does it, from the package's folder. calls: what is called, by name.
    shapes: {name of a tensor: its shape}. ms: milliseconds that it took this time."""

    name: str
    file: str
    calls: list[str]
    shapes: dict[str, tuple[int, ...]]
    ms: float

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        return f"Stage({self.name}: {shapes}, {self.ms:.1f} ms, {self.file})"


@torch.no_grad()
def flow(pg: PaliGemma, image: ImageInput, prompt: str) -> list[Stage]:
    """Runs the model step by step, as `pg.generate` does, up to the second token. Raises what `pg.generate` raises.

    image: one picture, or a tuple that the row sees together; the shapes of several are picture_1, picture_2, ...
    """
    model, processor, stages = pg.model, pg.processor, list[Stage]()
    tower, decoder = model.vision_tower.vision_model, model.language_model.model

    def wait() -> None:  # a GPU works on while the host goes on
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    def step(name: str, made: Callable[..., Any], function: Callable[[], Any], **shapes: Callable[[Any], Any]) -> Any:
        wait()
        start = time.perf_counter()
        result = function()
        wait()
        ms = 1000 * (time.perf_counter() - start)
        found = {key: tuple(shape(result)) for key, shape in shapes.items()}
        stages.append(Stage(name, _place_of(made), [made.__qualname__], found, ms))
        return result

    given = image if isinstance(image, tuple) else (image,)
    names = ["picture"] if len(given) == 1 else [f"picture_{k}" for k in range(1, len(given) + 1)]
    pictures = step(
        "open the picture", images.load_image, lambda: [images.load_image(one) for one in given],
        **{name: partial(_shape_of_picture, k) for k, name in enumerate(names)},
    )  # fmt: skip
    pixels = step(
        "resize, scale to [-1, 1]", images.preprocess,
        lambda: torch.stack([images.preprocess(one, processor.image_size) for one in pictures]),
        pixel_values=_shape,
    ).to(model.device, model.dtype)  # fmt: skip
    ids = step(
        "text to ids, <image> in front", PaliGemmaProcessor.lay_out, lambda: processor.lay_out([prompt], [len(given)]),
        input_ids=lambda inputs: inputs["input_ids"].shape,
    )["input_ids"].to(model.device)  # fmt: skip
    x = step("cut into patches", type(tower.embeddings).forward, lambda: tower.embeddings(pixels), patches=_shape)
    x = step("vision layers", type(tower.encoder).forward, lambda: tower.encoder(x), patches=_shape)
    projector = model.multi_modal_projector  # any module may stand here: `load(extra=)`
    features = step(
        "norm and projector", type(projector).forward, lambda: projector(tower.post_layernorm(x)),
        image_features=_shape,
    )  # fmt: skip
    x = step(
        "embed, put the picture in", PaliGemmaForConditionalGeneration.embed, lambda: model.embed(ids, features),
        inputs_embeds=_shape,
    )  # fmt: skip
    valid = torch.ones_like(ids, dtype=torch.bool)
    step(
        "the prefix mask", attention_mask.prefix_lm_mask,
        lambda: attention_mask.prefix_lm_mask(torch.zeros_like(ids), valid), mask=_shape,
    )  # fmt: skip
    cache = generation.KVCache(model.config.text_config, 1, ids.shape[1] + 1, model.dtype, model.device)
    hidden = step(
        "decoder layers (prefill)", GemmaModel.forward,
        lambda: model.read(inputs_embeds=x, cache=cache, num_outputs=1),
        hidden=_shape, keys=lambda _: cache.keys[0][:, :, : cache.used].shape,
    )  # fmt: skip
    logits = step("head", GemmaForCausalLM.logits, lambda: model.logits(hidden[:, -1]), logits=_shape)
    token = step("choose", generation.choose, lambda: logits.argmax(-1), token=_shape)
    step(
        "one more token", generation.decode_one_token, lambda: generation.decode_one_token(model, token, cache),
        logits=_shape, keys=lambda _: cache.keys[len(decoder.layers) - 1][:, :, : cache.used].shape,
    )  # fmt: skip
    return stages


def _place_of(made: Callable[..., Any]) -> str:
    """ "path:line", from the package's folder. Of code from elsewhere (a part that was replaced) its module's path."""
    code = inspect.unwrap(made).__code__
    path = Path(code.co_filename)
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else made.__module__.replace(".", "/") + ".py"
    return f"{name}:{code.co_firstlineno}"


def duration(stages: list[Stage], passes: int) -> str:
    """About how long some passes of the decoder take, by the one among the stages: "about 40 min"."""
    seconds = passes * next(stage.ms for stage in stages if stage.name == "decoder layers (prefill)") / 1000
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def many_passes_are_quick(pg: PaliGemma) -> bool:
    """Whether knock-outs and routes, hundreds of passes, are computed unasked: not for a published size on a CPU, where
    they take hours."""
    return published_name(pg.model.config) is None or pg.model.device.type == "cuda"


def _shape(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _shape_of_picture(k: int, pictures: list[Image.Image]) -> tuple[int, int, int]:
    return pictures[k].height, pictures[k].width, 3
