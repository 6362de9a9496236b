"""The speed benchmark: models in turn, round after round, and a record on disk that is complete at every moment.

    record = benchmark("paligemma-3b-pt-224", ["bf16", "int8", "int4"])

The speed of a machine changes all the time: its clock frequency rises and falls, other programs come and go. So no
model is measured in one piece. In every round the limits of the machine are measured, and every model runs once, in a
process of its own. What is compared are medians over the rounds; minimum and maximum show how reliable they are.

In a record, the models ("transformers", "bf16", ...) are called contestants. A failure is noted in the record, and the
other models go on.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paligemma.bench.machine import measure_limits
from paligemma.bench.records import new_record, save
from paligemma.bench.shapes import TEXT_TOKENS, published_shape, work_in, write_random_checkpoint
from paligemma.bench.summary import summarise
from paligemma.bench.transformers_model import installed
from paligemma.bench.worker import TRANSFORMERS, Job, in_a_process
from paligemma.fast.swap import STORED
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.finding import resolve
from paligemma.weights.quantized import quantize_checkpoint, stored_mode

TIMEOUT = 900  # seconds for one model in one round: far more than any needs, so that nothing hangs forever

Say = Callable[[str], None]


def benchmark(
    model: str = "paligemma-3b-pt-224",
    precisions: Sequence[str] = ("bf16", "int8", "int4"),
    transformers: bool | None = None,
    rounds: int = 3,
    passes: int = 2,
    tokens: int = 16,
    grow: bool = False,
    quick: bool = False,
    threads: int | None = None,
    work: Path | None = None,
    out: Path | None = None,
    command: str = "",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measures a model and returns the record, a dictionary for JSON; with `out`, it is saved there after every run.

    model: a published name (its shapes with random weights, which are written to `work` and removed at the end), or
    whatever `load` takes. precisions: see `worker.Job`. transformers: None for "if it is installed". grow: also measure
    how the cost grows with length, batch, resolution, and in the other family. quick: less of everything, for a try.
    ValueError and OSError before anything is measured: for unknown names, missing files, and a quantised checkpoint
    that is asked for in another precision than its own.
    """
    jobs = _jobs(precisions, transformers, Job("plain", "", tokens=tokens, passes=passes, threads=threads))
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(checkpoint_of(model, work, say))
        _check_stored(folder, jobs)
        config = PaliGemmaConfig.from_pretrained(folder)
        recorder = _Recorder(_new_record(model, config, command), out, say)
        # Quantised once; from then on the workers load the files, as users do.
        stored = _quantized_folders(folder, jobs, work, recorder, stack)
        jobs = [replace(job, folder=str(stored.get(job.mode, folder))) for job in jobs]
        for number in range(1, rounds + 1):
            _run_round(f"round {number} of {rounds}", jobs if number % 2 else jobs[::-1], quick, recorder)
        if grow:
            for name, job in _growth(config, jobs[-len(precisions)], quick).items():
                recorder.run(job, recorder.growth(name), f"how it grows: {name}")
    if grow and model.removeprefix("google/").startswith("paligemma-3b"):
        other = "paligemma2-3b-pt-224"
        with checkpoint_of(other, work, say) as folder:
            for job in jobs[: len(jobs) - len(precisions) + 1]:  # transformers and the first precision
                job = replace(job, folder=str(folder), passes=1)  # for int8 and int4 it is quantised while it is loaded
                recorder.run(job, recorder.growth(other), f"{other}: {job.name}")
    recorder.save()
    return recorder.record


@dataclass
class _Recorder:
    """The record, saved after every run. out: its file; None to keep it in memory only."""

    record: dict[str, Any]
    out: Path | None
    say: Say

    def run(self, job: Job, results: list[Any], what: str) -> None:
        """Runs a worker and appends what it measured to `results`; what: the job in words."""
        self.say(what)
        try:
            results.append(in_a_process(job, TIMEOUT))
        except (RuntimeError, ValueError) as error:
            self.record["failed"].append({"what": what, "why": str(error)})
            self.say(f"failed: {what}: {error}")
        self.save()

    def growth(self, name: str) -> list[Any]:
        """The results of one experiment on how the cost grows."""
        return self.record["grow"].setdefault(name, [])

    def save(self) -> None:
        self.record["summary"] = summarise(self.record)
        save(self.record, self.out)


def _new_record(model: str, config: PaliGemmaConfig, command: str) -> dict[str, Any]:
    what = "seconds, bytes and tokens a second; every run is in `rounds`, `summary` is made of them"
    return {
        **new_record(what, model, command),
        "image_tokens": config.vision_config.num_patches,
        "text_tokens": TEXT_TOKENS,
        "work": asdict(work_in(config)),
        "rounds": [],
        "grow": {},
        "failed": [],
    }


def _jobs(precisions: Sequence[str], transformers: bool | None, job: Job) -> list[Job]:
    """One for each model: transformers first, if it takes part. ValueError for an unknown precision, or none."""
    jobs = [replace(job, name=name) for name in precisions]  # checks the names
    if not jobs:
        raise ValueError("no precision is named, expected one or more, as in bf16,int8")
    if transformers is None:
        transformers = installed()
    elif transformers and not installed():
        raise ImportError("transformers is not installed: pip install transformers, or leave it out")
    return [replace(job, name=TRANSFORMERS), *jobs] if transformers else jobs


def _check_stored(folder: Path, jobs: Sequence[Job]) -> None:
    """ValueError where the checkpoint holds rounded weights, and a job asks for others."""
    held = stored_mode(folder)
    if held is not None and (others := [job.name for job in jobs if job.mode != held]):
        raise ValueError(
            f"{folder} holds {held} weights, which cannot be timed as {', '.join(others)}: ask for --precisions {held} "
            f"(or {held}-torch) and --no-transformers"
        )


def _quantized_folders(
    folder: Path, jobs: Sequence[Job], work: Path | None, recorder: _Recorder, stack: contextlib.ExitStack
) -> dict[str, Path]:
    """{mode: folder with a quantised checkpoint}, for the modes that can be stored; removed when `stack` ends. {} for a
    checkpoint that is quantised already."""
    stored: dict[str, Path] = {}
    for mode in {job.mode for job in jobs} & set(STORED):
        if stored_mode(folder) is None:
            recorder.say(f"writing {mode} weights")
            begun = time.perf_counter()
            stored[mode] = Path(stack.enter_context(temporary(work))) / mode
            quantize_checkpoint(folder, stored[mode], mode, dtype="bfloat16")
            recorder.record.setdefault("quantize_s", {})[mode] = round(time.perf_counter() - begun, 2)
    return stored


def _run_round(name: str, jobs: Sequence[Job], quick: bool, recorder: _Recorder) -> None:
    """The limits of the machine, then every model once. The order of `jobs` is reversed from round to round, so that no
    model always runs after the same other one."""
    recorder.say(f"{name}: the machine's limits")
    done: dict[str, Any] = {"limits": measure_limits(quick), "contestants": []}
    recorder.record["rounds"].append(done)
    for job in jobs:
        recorder.run(job, done["contestants"], f"{name}: {job.name}")


def _growth(config: PaliGemmaConfig, job: Job, quick: bool) -> dict[str, Job]:
    """What runs once, at one precision: a long answer, batches, and the resolutions that the positions allow."""
    limit, vision = config.text_config.max_position_embeddings, config.vision_config
    job = replace(job, passes=1, warm=False)
    few = replace(job, tokens=8)
    runs = {
        "length": replace(job, tokens=64 if quick else 512),
        "batch": replace(few, rows=(1, 2, 4) if quick else (1, 2, 4, 8, 16)),
    }
    for times in (1, 2, 4):
        side = times * vision.image_size
        if (side // vision.patch_size) ** 2 + TEXT_TOKENS + few.tokens <= limit:
            runs[f"{side} pixels"] = replace(few, image_size=side)
    return runs


def temporary(work: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder in `work`, which is made if necessary, or where the system keeps such folders."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="paligemma-bench-", dir=work)


@contextlib.contextmanager
def checkpoint_of(model: str, work: Path | None, say: Say) -> Iterator[Path]:
    """The folder of a checkpoint: the user's own, or random weights in a published shape, removed at the end."""
    config = published_shape(model) if not Path(model).exists() else None
    if config is None:
        path = resolve(model)
        if not path.is_dir():
            raise ValueError(f"{model} is a file: the benchmark wants a folder, a hub id or a published name")
        yield path
        return
    with temporary(work) as folder:
        say(f"writing random weights in the shape of {model}")
        write_random_checkpoint(config, Path(folder))
        yield Path(folder)
