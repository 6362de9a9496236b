"""One model in a process of its own: load it, answer with it, time every stage, print the measurements as JSON.

    python -m paligemma.bench.worker '{"name": "bf16", "folder": "weights/", "tokens": 16}'

Load time and peak memory only mean something in a fresh process, and no model takes memory from another one. Hooks on
the running model take the times, the same hooks for our model and for transformers': what is timed is `generate`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration

START = time.perf_counter()

TRANSFORMERS = "transformers"
PRECISIONS = ("plain", "bf16", "int8", "int4", "bf16-torch", "int8-torch", "int4-torch")


@dataclass(frozen=True)
class Job:
    """What one worker does. (In a record it is called "spec".)

    name: "transformers"; "plain" (bfloat16, the model as it is); or a mode of `quantize`, with "-torch" to run without
    the compiled kernels. folder: a checkpoint, possibly quantised in that mode already. rows: sizes of the batches to
    run; all rows ask about one image, which is encoded once. tokens: of each answer. passes: measured runs of each
    batch. warm: run one unmeasured answer first; otherwise only a prompt without an image, which is cheaper.
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
                f"the model to time is {self.name!r}, expected one of {', '.join((TRANSFORMERS, *PRECISIONS))}"
            )

    @property
    def mode(self) -> str:
        """The precision without "-torch"."""
        return self.name.removesuffix("-torch")


def peak_memory_of_process() -> int | None:
    """The peak memory of this process in bytes (VmHWM); pages of memory-mapped files that were read count."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None  # not on Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


class Clock:
    """Takes the time inside `generate`: before and after the vision tower, and after every forward pass."""

    def __init__(self, model: Any):
        towers = getattr(model, "model", model)  # transformers keeps them one level down
        self.vision_start = self.vision_end = 0.0
        self.passes: list[float] = []
        towers.vision_tower.register_forward_pre_hook(lambda *_: self._set("vision_start"))
        towers.multi_modal_projector.register_forward_hook(lambda *_: self._set("vision_end"))
        model.register_forward_hook(lambda *_: self.passes.append(time.perf_counter()))

    def _set(self, name: str) -> None:
        setattr(self, name, time.perf_counter())

    def run(self, answer: Callable[[], None]) -> dict[str, Any]:
        """Seconds of one call: vision; prefill, the rest until the first logits; both together; each decode step."""
        self.vision_start = self.vision_end = 0.0
        self.passes.clear()
        begun = time.perf_counter()
        answer()
        first = self.passes[0] - begun
        vision = self.vision_end - self.vision_start
        decode = [round(after - before, 6) for before, after in zip(self.passes, self.passes[1:])]
        return {"vision_s": vision, "prefill_s": first - vision, "first_token_s": first, "decode_s": decode}


def make_inputs(config: Any, rows: int) -> dict[str, Any]:
    """<image> ... <bos> and a few random words, int64 [rows, P + 10]: another question in each row, about one image."""
    import torch

    from paligemma.bench.shapes import TEXT_TOKENS

    generator = torch.Generator().manual_seed(0)
    words_below = min(config.image_token_index, config.text_config.vocab_size, 256000)
    words = torch.randint(3, words_below, (rows, TEXT_TOKENS), generator=generator)
    words[:, 0] = config.bos_token_id
    image = torch.full((rows, config.vision_config.num_patches), config.image_token_index)
    ids = torch.cat([image, words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def run(job: Job) -> dict[str, Any]:
    """All measurements: load_s, first_answer, runs, weight_bytes, peak_bytes, ..."""
    if job.name.endswith("-torch"):
        os.environ["PALIGEMMA_KERNEL"] = "0"
    # Only the folder's own name goes into a record: where it lies is private.
    facts: dict[str, Any] = {"spec": asdict(replace(job, folder=Path(job.folder).name))}
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    facts["import_torch_s"], of_torch = time.perf_counter() - START, peak_memory_of_process()

    begun = time.perf_counter()
    model, config, answer = load(job)
    facts["load_s"] = time.perf_counter() - begun  # including the imports for it
    facts |= bytes_of(model)
    clock = Clock(model)
    side = config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if job.warm:
        facts["first_answer"] = clock.run(lambda: answer({**make_inputs(config, 1), "pixel_values": pixels}, 4))
    else:
        inputs = {name: ids[:, config.vision_config.num_patches :] for name, ids in make_inputs(config, 1).items()}
        answer(inputs, 2)

    facts["runs"] = []
    for rows in job.rows:
        inputs = make_inputs(config, rows)
        if rows == 1:
            inputs["pixel_values"] = pixels
        else:
            with torch.inference_mode():
                inputs["image_features"] = model.encode_image(pixels).expand(rows, -1, -1)
        facts["runs"] += [{"rows": rows, **clock.run(lambda: answer(inputs, job.tokens))} for _ in range(job.passes)]  # noqa: B023
    if (peak := peak_memory_of_process()) is not None and of_torch is not None:
        facts["peak_bytes"], facts["torch_bytes"] = peak, of_torch
    return facts


def load(job: Job) -> tuple[Any, PaliGemmaConfig, Callable[[dict[str, Any], int], Any]]:
    """The model, its configuration, and the function `answer(inputs, tokens)`, which calls its `generate`."""
    if job.name == TRANSFORMERS:
        from paligemma.bench.transformers_model import answer_transformers, load_transformers
        from paligemma.modeling_gemma import PaliGemmaConfig

        if job.rows != (1,) or job.image_size is not None or not job.warm:
            raise ValueError("transformers is timed on one row at the checkpoint's own resolution")
        model = load_transformers(job.folder)
        return model, PaliGemmaConfig.from_pretrained(job.folder), partial(answer_transformers, model)

    from paligemma.engine import generate

    model = load_ours(job)
    no_end = [model.config.eos_token_id]  # every answer has the same length
    return model, model.config, lambda inputs, n: generate(model, inputs, max_new_tokens=n, suppress_tokens=no_end)


def load_ours(job: Job) -> PaliGemmaForConditionalGeneration:
    """As `paligemma.load` loads a model. A checkpoint that is not quantised yet becomes so, by the job's mode."""
    from paligemma.fast.swap import quantize
    from paligemma.weights.loading import load_model
    from paligemma.weights.quantized import open_quantized, stored_mode

    folder = Path(job.folder)
    if stored_mode(folder) is not None:
        return open_quantized(folder).load(job.mode, None, job.image_size)
    model = load_model(folder, dtype="bfloat16", image_size=job.image_size)
    return model if job.mode == "plain" else quantize(model, job.mode)


def in_a_process(job: Any, timeout: float) -> dict[str, Any]:
    """What the module of the job's class measures when it is run with the job, in a process of its own.

    RuntimeError with the last line of stderr where it fails, and after `timeout` seconds.
    """
    command = [sys.executable, "-m", type(job).__module__, json.dumps(asdict(job))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {timeout:g} seconds") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def bytes_of(model: Any) -> dict[str, int]:
    """weight_bytes: all weights with their scales. token_bytes: what is read for each token, the language model's."""
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
    print(json.dumps(run(Job(**{**given, "rows": tuple(given.get("rows", (1,)))}))))
