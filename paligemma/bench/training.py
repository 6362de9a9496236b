"""The benchmark of training: seconds and memory of a step, beside a bare loop and beside transformers with peft.

    record = benchmark_training("tiny")

Three contestants take the same steps on the same batch, each in a process of its own, in turns:

    paligemma      `train.loop.train`, as `paligemma train` calls it: log, progress bar, clipping, checks of every loss
    bare loop      the same model and loss, and nothing but forward, backward and torch's AdamW
    transformers   its model (LoRA: by peft) in such a bare loop

The dtype is the one that `paligemma train` chooses on this machine, for all of them. Their first losses must agree; the
record holds them. The first step is not counted: it allocates what all others use again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.bench.worker import TRANSFORMERS, in_a_process, peak_memory_of_process

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from paligemma.train.batches import Batch
    from paligemma.train.options import TrainOptions

PALIGEMMA, BARE = "paligemma", "bare loop"
TIMEOUT = 3600  # seconds for one contestant in one round
ANSWER_TOKENS = 16  # of each row, after the prompt

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingJob:
    """What one process does. lora: the decoder gets LoRA of rank 8; otherwise all weights learn."""

    name: str
    folder: str
    lora: bool
    batch: int
    steps: int
    device: str = "cpu"
    threads: int | None = None


def benchmark_training(
    model: str = "tiny",
    transformers: bool | None = None,
    rounds: int = 3,
    steps: int = 5,
    device: str = "cpu",
    threads: int | None = None,
    work: Path | None = None,
    out: Path | None = None,
    command: str = "",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measures training steps of a model and returns the record, saved at `out` after every run.

    model: as for `benchmark`. LoRA is always measured; training of all weights only where weights, gradients and the
    optimizer's state in float32 take less than half of the free memory. A step has 16 rows, and one of the published
    shapes. transformers: None for "if it and peft are installed". Raises what `benchmark` raises.
    """
    from importlib.util import find_spec

    from paligemma.bench.records import new_record, save
    from paligemma.bench.run import checkpoint_of
    from paligemma.bench.shapes import published_shape, work_in
    from paligemma.bench.transformers_model import installed
    from paligemma.devices import free_memory, pick_device
    from paligemma.modeling_gemma import PaliGemmaConfig

    if min(rounds, steps) < 1:
        raise ValueError("rounds and steps are at least 1")
    there = installed() and find_spec("peft") is not None
    if transformers and not there:
        raise ImportError("transformers or peft is not installed: pip install transformers peft, or leave them out")
    names = [TRANSFORMERS, BARE, PALIGEMMA] if there and transformers is not False else [BARE, PALIGEMMA]
    batch = 1 if published_shape(model) else 16
    with checkpoint_of(model, work, say) as folder:
        needed = 16 * work_in(PaliGemmaConfig.from_pretrained(folder)).parameters
        whole = needed < free_memory(pick_device(device)) / 2
        what = "seconds, seconds of the processor and bytes of training steps; every run is in `runs`"
        record: dict[str, Any] = {
            **new_record(what, model, command, threads),
            "training_device": device, "batch": batch, "steps": steps,
            "runs": [], "failed": [],
        }  # fmt: skip
        for number in range(1, rounds + 1):
            for lora in (True, False) if whole else (True,):
                for name in names if number % 2 else names[::-1]:
                    run = f"round {number} of {rounds}: {name}, {'LoRA' if lora else 'all weights'}"
                    say(run)
                    try:
                        job = TrainingJob(name, str(folder), lora, batch, steps, device, threads)
                        record["runs"].append(in_a_process(job, TIMEOUT))
                        if (why := other_loss(record["runs"])) is not None:
                            record["failed"].append({"what": run, "why": why})
                    except RuntimeError as error:
                        record["failed"].append({"what": run, "why": str(error)})
                    record["summary"] = summary(record["runs"])
                    save(record, out)
    return record


def other_loss(runs: Sequence[dict[str, Any]]) -> str | None:
    """What is wrong where the last run's first loss is not that of the run before it with the same weights learning.

    bfloat16 products in another order differ by some tenths of a per cent.
    """
    *before, last = [run for run in runs if run["job"]["lora"] == runs[-1]["job"]["lora"]]
    if not before or math.isclose(before[-1]["losses"][0], last["losses"][0], rel_tol=0.01):
        return None
    found = [f"{run['losses'][0]:.4f} ({run['job']['name']})" for run in (before[-1], last)]
    return f"first losses differ: {' and '.join(found)}, so these are not the same steps"


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For LoRA and all weights, of each contestant: medians over all steps of all rounds, and ratios of these.

    times_bare: of the processor's seconds, which other programs disturb less; above 1 the loop costs time.
    times_transformers: how many times faster than transformers. memory_of_transformers: below 1 it takes less.
    """
    figures: list[dict[str, Any]] = []
    for lora in (True, False):
        found: dict[str, dict[str, Any]] = {}
        for name in (TRANSFORMERS, BARE, PALIGEMMA):
            same = [run for run in runs if run["job"]["name"] == name and run["job"]["lora"] == lora]
            if not same:
                continue
            peaks = [run["peak_bytes"] for run in same if run["peak_bytes"] is not None]
            step = statistics.median(second for run in same for second in run["step_s"])
            found[name] = {
                "lora": lora,
                "name": name,
                "step_s": step,
                "step_cpu_s": statistics.median(second for run in same for second in run["step_cpu_s"]),
                "tokens_s": same[0]["tokens"] / step,
                "peak_bytes": statistics.median(peaks) if peaks else None,
                "first_loss": same[0]["losses"][0],
            }
        for one in found.values():
            if bare := found.get(BARE):
                one["times_bare"] = one["step_cpu_s"] / max(bare["step_cpu_s"], 1e-9)
            if theirs := found.get(TRANSFORMERS):
                one["times_transformers"] = theirs["step_s"] / one["step_s"]
                if one["peak_bytes"] and theirs["peak_bytes"]:
                    one["memory_of_transformers"] = one["peak_bytes"] / theirs["peak_bytes"]
        figures += found.values()
    return figures


def table(record: dict[str, Any]) -> Table:
    """The summary of a record, to print."""
    from rich.table import Table
    from rich.text import Text

    title = f"{record['model']}: training steps of {record['batch']} rows, medians"
    shown = Table(title=Text(title, "table.title"))
    columns = ("", "learns", "step, s", "of the bare loop", "times transformers", "tokens/s", "peak, GB", "first loss")
    for name in columns:
        shown.add_column(name, justify="left" if name in columns[:2] else "right")
    for one in record["summary"]:
        shown.add_row(
            one["name"], "LoRA" if one["lora"] else "all weights", f"{one['step_s']:.3g}",
            f"{one['times_bare']:.0%}" if "times_bare" in one else "-",
            f"{one['times_transformers']:.2f}" if "times_transformers" in one else "-",
            f"{one['tokens_s']:,.0f}",
            f"{one['peak_bytes'] / 1e9:.2f}" if one["peak_bytes"] else "-",
            f"{one['first_loss']:.4f}",
        )  # fmt: skip
    return shown


# ------------------------------------------------------------------------------------------------ one contestant


class Clock:
    """The times at which steps began, and the losses that they had."""

    def __init__(self, device: str) -> None:
        self.device, self.wall, self.cpu = device, list[float](), list[float]()
        self.losses: list[float] = []

    def tick(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def steps(self) -> dict[str, list[float]]:
        """Seconds from tick to tick, without those of the first step."""
        return {
            name: [round(after - before, 6) for before, after in pairwise(ticks[1:])]
            for name, ticks in (("step_s", self.wall), ("step_cpu_s", self.cpu))
        }


def run(job: TrainingJob) -> dict[str, Any]:
    """Takes the steps of a job, and one or two before them. Their times, losses and the peak memory of this process."""
    import torch

    from paligemma.modeling_gemma import PaliGemmaConfig

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    import_what_is_measured(job)
    of_libraries = peak_memory_of_process()
    batch = make_batch(PaliGemmaConfig.from_pretrained(job.folder), job.batch)
    clock = Clock(job.device)
    loops = {PALIGEMMA: run_ours, BARE: run_bare, TRANSFORMERS: run_transformers}
    loops[job.name](job, batch, clock)
    peak = peak_memory_of_process()
    memory = peak - of_libraries if peak is not None and of_libraries is not None else None
    if job.device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated(job.device)
    return {
        # Only the folder's own name goes into a record: where it lies is private.
        "job": asdict(replace(job, folder=Path(job.folder).name)),
        **clock.steps(),
        "losses": clock.losses,
        "tokens": batch["input_ids"].numel(),
        "peak_bytes": memory,
    }


def import_what_is_measured(job: TrainingJob) -> None:
    """The code of libraries takes memory too. It is loaded before memory is counted, for every contestant alike."""
    if job.name == TRANSFORMERS:
        from paligemma.bench.transformers_model import import_its_code

        import_its_code()
    if job.lora:
        import peft  # noqa: F401


def make_batch(config: Any, rows: int) -> Batch:
    """Random pictures, prompts and answers: int64 [rows, P + 10 + ANSWER_TOKENS], float32 [rows, 3, side, side]."""
    import torch

    from paligemma.bench.worker import make_inputs

    prompt = make_inputs(config, rows)
    generator = torch.Generator().manual_seed(2)
    below = min(config.image_token_index, config.text_config.vocab_size, 256000)
    answer = torch.randint(3, below, (rows, ANSWER_TOKENS), generator=generator)
    ids = torch.cat([prompt["input_ids"], answer], dim=1)
    is_answer = torch.arange(ids.shape[1]).expand_as(ids) >= ids.shape[1] - ANSWER_TOKENS
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": is_answer.long(),
        "labels": ids.masked_fill(~is_answer, -100),
        "pixel_values": torch.rand(rows, 3, side, side, generator=generator) * 2 - 1,
    }


def prepared(job: TrainingJob) -> tuple[Any, TrainOptions, torch.dtype]:
    """Our model as `paligemma train` prepares it, the options, and the dtype of its matrix products."""
    from paligemma.train.setup import prepare
    from paligemma.weights.loading import load_model

    options, dtype = choices(job)
    model = load_model(Path(job.folder), device=job.device)
    prepare(model, options)
    return model, options, dtype


def choices(job: TrainingJob) -> tuple[TrainOptions, torch.dtype]:
    """The options of `paligemma train`, and the dtype of the matrix products that it chooses for this checkpoint."""
    from paligemma.train.options import TrainOptions
    from paligemma.train.setup import compute_dtype_of
    from paligemma.utils import stored_dtype

    options = TrainOptions(model=job.folder, data="", out="", lora=("decoder",) if job.lora else ())
    stored = stored_dtype(job.folder)
    if stored is None:
        raise ValueError(f"{Path(job.folder).name} is quantised, and rounded weights cannot learn: name another model")
    return options, compute_dtype_of(options, stored, job.device)


def run_ours(job: TrainingJob, batch: Batch, clock: Clock) -> None:
    from paligemma.train.loop import train
    from paligemma.train.setup import config_of

    model, options, dtype = prepared(job)

    def batches(step: int, part: int, parts: int) -> Batch:
        clock.tick()
        return batch

    # One step more than is measured: the last one ends with a checkpoint.
    config = replace(config_of(options, job.steps + 2, dtype), save_every=1e9, schedule="constant", warmup=0.0)
    with tempfile.TemporaryDirectory() as out:
        train(model, batches, config, out, on_log=lambda entry: clock.losses.append(entry["loss"]), resume=False)


def run_bare(job: TrainingJob, batch: Batch, clock: Clock) -> None:
    from paligemma.train.loss import suffix_loss

    model, options, dtype = prepared(job)
    loss = suffix_loss()

    def mean_loss(batch: Batch) -> torch.Tensor:
        total, weight, _ = loss(model, batch)
        return total / weight

    bare_loop(model, mean_loss, options.peak_lr, dtype, job, batch, clock)


def run_transformers(job: TrainingJob, batch: Batch, clock: Clock) -> None:
    from paligemma.bench.transformers_model import load_to_train

    options, dtype = choices(job)
    model = load_to_train(job.folder, dtype, job.lora).to(job.device)
    bare_loop(model, lambda batch: model(**batch).loss, options.peak_lr, dtype, job, batch, clock)


def bare_loop(
    model: Any,
    loss: Callable[[Batch], torch.Tensor],
    lr: float,
    dtype: torch.dtype,
    job: TrainingJob,
    batch: Batch,
    clock: Clock,
) -> None:
    import torch

    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
    for _ in range(job.steps + 1):
        clock.tick()
        on_device = {name: value.to(job.device) for name, value in batch.items()}
        optimizer.zero_grad()
        with torch.autocast(job.device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            value = loss(on_device)
        value.backward()
        optimizer.step()
        clock.losses.append(float(value.detach()))
    clock.tick()


if __name__ == "__main__":
    print(json.dumps(run(TrainingJob(**json.loads(sys.argv[1])))))
