"""One contestant in a process of its own: load a model, answer with it, time every stage, print the facts as JSON.

    python -m paligemma.bench.worker '{"name": "bf16", "folder": "weights/", "tokens": 16}'

A fresh process is what makes load time and peak memory mean something, and no contestant keeps another from its memory.
The clock hangs on the running model by hooks, the same for ours and for transformers': what is timed is `generate`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

START = time.perf_counter()

TRANSFORMERS = "transformers"
PRECISIONS = ("plain", "bf16", "int8", "int4", "bf16-torch", "int8-torch", "int4-torch")


@dataclass(frozen=True)
class Spec:
    """What one process does.

    name: "transformers"; "plain" (bfloat16, nothing done to the model); or a mode of `quantize`, with "-torch" to do
    without the compiled kernels. folder: a checkpoint, which may be quantised in that mode already. rows: sizes of the
    batches to run, all rows about one image, encoded once. tokens: of each answer. passes: measured runs of each.
    warm: one unmeasured answer first; else the prompt alone, which is cheaper.
    """

    name: str
    folder: str
    tokens: int = 16
    passes: int = 2
    rows: tuple[int, ...] = (1,)
    image_size: int | None = None
    warm: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.name not in (TRANSFORMERS, *PRECISIONS):
            raise ValueError(
                f"the contestant is {self.name!r}, expected one of {', '.join((TRANSFORMERS, *PRECISIONS))}"
            )


def peak_memory_of_process() -> int | None:
    """The most memory this process ever held, in bytes: VmHWM, mapped files that were touched included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None  # not on Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


class Clock:
    """Stops the time inside `generate`: around the eye, and after every pass through the model."""

    def __init__(self, model: Any):
        towers = getattr(model, "model", model)  # transformers keeps them one level down
        self.seeing = self.seen = 0.0
        self.passes: list[float] = []
        towers.vision_tower.register_forward_pre_hook(lambda *_: self._set("seeing"))
        towers.multi_modal_projector.register_forward_hook(lambda *_: self._set("seen"))
        model.register_forward_hook(lambda *_: self.passes.append(time.perf_counter()))

    def _set(self, name: str) -> None:
        setattr(self, name, time.perf_counter())

    def run(self, answer: Callable[[], None]) -> dict[str, Any]:
        """Seconds of one call: vision, prefill (the rest up to the first logits), first token, and of each decode."""
        self.seeing = self.seen = 0.0
        self.passes.clear()
        begun = time.perf_counter()
        answer()
        first = self.passes[0] - begun
        vision = self.seen - self.seeing
        decode = [round(after - before, 6) for before, after in zip(self.passes, self.passes[1:])]
        return {"vision_s": vision, "prefill_s": first - vision, "first_token_s": first, "decode_s": decode}


def make_inputs(config: Any, rows: int, seed: int = 0) -> dict[str, Any]:
    """<image> ... <bos> and a few random words, int64 [rows, P + 10]; the row's question differs, the image is one."""
    import torch

    from paligemma.bench.shapes import TEXT_TOKENS

    generator = torch.Generator().manual_seed(seed)
    words_below = min(config.image_token_index, config.text_config.vocab_size, 256000)
    words = torch.randint(3, words_below, (rows, TEXT_TOKENS), generator=generator)
    words[:, 0] = config.bos_token_id
    image = torch.full((rows, config.vision_config.num_patches), config.image_token_index)
    ids = torch.cat([image, words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def run(spec: Spec) -> dict[str, Any]:
    if spec.name.endswith("-torch"):
        os.environ["PALIGEMMA_KERNEL"] = "0"
    facts: dict[str, Any] = {"spec": asdict(replace(spec, folder=Path(spec.folder).name))}  # where it lies is private
    import torch

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    facts["import_torch_s"], of_torch = time.perf_counter() - START, peak_memory_of_process()

    begun = time.perf_counter()
    model: Any
    if spec.name == TRANSFORMERS:
        from paligemma.bench.transformers_model import answer_transformers, load_transformers
        from paligemma.modeling_gemma import PaliGemmaConfig

        if spec.rows != (1,) or spec.image_size is not None or not spec.warm:
            raise ValueError("transformers is timed on one row at the checkpoint's own resolution")
        model = load_transformers(spec.folder)
        config = PaliGemmaConfig.from_pretrained(spec.folder)

        def answer(inputs: dict[str, Any], tokens: int) -> None:
            answer_transformers(model, inputs, tokens)
    else:
        from paligemma.generation import generate

        model = load(spec)
        config = model.config

        def answer(inputs: dict[str, Any], tokens: int) -> None:
            generate(model, inputs, max_new_tokens=tokens, suppress_tokens=[config.eos_token_id])

    facts["load_s"] = time.perf_counter() - begun  # imports of what loads it included
    facts |= bytes_of(model)
    clock = Clock(model)
    side = config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if spec.warm:
        facts["first_answer"] = clock.run(lambda: answer({**make_inputs(config, 1), "pixel_values": pixels}, 4))
    else:
        inputs = {name: ids[:, config.vision_config.num_patches :] for name, ids in make_inputs(config, 1).items()}
        answer(inputs, 2)

    facts["runs"] = []
    for rows in spec.rows:
        inputs = make_inputs(config, rows)
        if rows == 1:
            inputs["pixel_values"] = pixels
        else:
            with torch.inference_mode():
                inputs["image_features"] = model.encode_image(pixels).expand(rows, -1, -1)
        facts["runs"] += [{"rows": rows, **clock.run(lambda: answer(inputs, spec.tokens))} for _ in range(spec.passes)]  # noqa: B023
    if (peak := peak_memory_of_process()) is not None and of_torch is not None:
        facts["peak_bytes"], facts["torch_bytes"] = peak, of_torch
    return facts


def load(spec: Spec) -> Any:
    """Ours, as `paligemma.load` loads it: a quantised checkpoint as it is, any other by the contestant's name."""
    from paligemma.fast.swap import quantize
    from paligemma.weights.loading import load_model
    from paligemma.weights.quantized import open_quantized, stored_mode

    mode = spec.name.removesuffix("-torch")
    folder = Path(spec.folder)
    if stored_mode(folder) is not None:
        return open_quantized(folder).load(None, None, spec.image_size)
    model = load_model(folder, dtype="bfloat16", image_size=spec.image_size)
    return model if mode == "plain" else quantize(model, mode)


def bytes_of(model: Any) -> dict[str, int]:
    """weight_bytes: of all weights, scales included. token_bytes: of what a decoded token reads: the decoder's."""
    sizes = {"weight_bytes": 0, "token_bytes": 0}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue  # a tied head is listed twice by transformers
        seen.add(tensor.data_ptr())
        sizes["weight_bytes"] += tensor.nbytes
        if "language_model." in name:
            sizes["token_bytes"] += tensor.nbytes
    return sizes


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(run(Spec(**{**given, "rows": tuple(given.get("rows", (1,)))}))))
