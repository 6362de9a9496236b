"""The benchmark: contestants in turn, round after round, and a record that is whole at every moment.

    record = benchmark("paligemma-3b-pt-224", ["bf16", "int8", "int4"])

A machine is never the same twice: its clock rises and falls, neighbours come and go. So nobody is measured in one piece
and then compared. In every round the machine's limits are measured and every contestant runs once, in a process of its
own; medians over the rounds are compared, minimum and maximum say how much they are worth.

What fails is noted in the record, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from paligemma.bench.machine import describe_machine, measure_limits
from paligemma.bench.shapes import TEXT_TOKENS, published_shape, work_in, write_random_checkpoint
from paligemma.bench.summary import summarise
from paligemma.bench.transformers_model import installed
from paligemma.bench.worker import TRANSFORMERS, Spec
from paligemma.fast.swap import STORED
from paligemma.files import write_text
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.finding import resolve
from paligemma.weights.quantized import quantize_checkpoint, stored_mode

TIMEOUT = 900  # seconds for one contestant in one round: far more than any needs, so that nothing hangs for ever

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
    """Measures a model and returns the record, a dictionary for JSON; with `out`, it is kept there as it grows.

    model: a published name (its shapes, with random weights, written to `work` for the time of the run) or what `load`
    takes. precisions: see `contestant.Spec`. transformers: None for "if it is installed". grow: also how the cost grows
    with length, batch, resolution, and in the other family. quick: less of everything, for a try.
    Raises ValueError and OSError before anything is measured, on names and places that are not there.
    """
    specs = [Spec(name, "", tokens=tokens, passes=passes, threads=threads) for name in precisions]  # checks the names
    if not specs:
        raise ValueError("no precision is named, expected one or more, as in bf16,int8")
    if transformers is None:
        transformers = installed()
    elif transformers and not installed():
        raise ImportError("transformers is not installed: pip install transformers, or leave it out")
    if transformers:
        specs.insert(0, replace(specs[0], name=TRANSFORMERS))
    if threads is not None:
        torch.set_num_threads(threads)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_weights(model, work, say))
        config = PaliGemmaConfig.from_pretrained(folder)
        record: dict[str, Any] = {
            "what": "seconds, bytes and tokens a second; every run is in `rounds`, `summary` is made of them",
            "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "command": command,
            "model": model,
            **describe_machine(),
            "image_tokens": config.vision_config.num_patches,
            "text_tokens": TEXT_TOKENS,
            "work": asdict(work_in(config)),
            "rounds": [],
            "grow": {},
            "failed": [],
        }

        def keep() -> None:
            record["summary"] = summarise(record)
            if out is not None:
                write_text(out, json.dumps(record, indent=1) + "\n")

        def compete(spec: Spec, into: list[Any], what: str) -> None:
            say(what)
            try:
                into.append(_in_its_own_process(spec))
            except (RuntimeError, ValueError) as error:
                record["failed"].append({"what": what, "why": str(error)})
                say(f"failed: {what}: {error}")
            keep()

        # Rounded once, and from then on loaded as a user loads them. (A mode that cannot be written fails by itself.)
        stored: dict[str, Path] = {}
        for mode in {spec.name.removesuffix("-torch") for spec in specs} & set(STORED):
            if stored_mode(folder) is None:
                say(f"writing {mode} weights")
                begun = time.perf_counter()
                stored[mode] = Path(stack.enter_context(_temporary(work))) / mode
                quantize_checkpoint(folder, stored[mode], mode, dtype="bfloat16")
                record.setdefault("quantize_s", {})[mode] = round(time.perf_counter() - begun, 2)
        specs = [replace(spec, folder=str(stored.get(spec.name.removesuffix("-torch"), folder))) for spec in specs]

        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: the machine's limits")
            done: dict[str, Any] = {"limits": measure_limits(quick), "contestants": []}
            record["rounds"].append(done)
            # There and back, so that nobody always runs behind the same neighbour.
            for spec in specs if number % 2 == 0 else specs[::-1]:
                what = f"round {number + 1} of {rounds}: {spec.name}"
                compete(spec, done["contestants"], what)

        if grow:
            for name, spec in _growth(config, specs[-len(precisions)], quick).items():
                compete(spec, record["grow"].setdefault(name, []), f"how it grows: {name}")
    if grow and model.removeprefix("google/").startswith("paligemma-3b"):
        other = "paligemma2-3b-pt-224"
        with _weights(other, work, say) as folder:
            for spec in specs[: 2 if transformers else 1]:  # an int8 or int4 one is rounded as it is loaded
                spec = replace(spec, folder=str(folder), passes=1)
                compete(spec, record["grow"].setdefault(other, []), f"{other}: {spec.name}")
    keep()
    return record


def record_path(folder: Path, model: str) -> Path:
    """benchmarks/speed-paligemma-3b-pt-224-2026-11-24.json"""
    return folder / f"speed-{Path(model).name}-{datetime.date.today().isoformat()}.json"


def _growth(config: PaliGemmaConfig, spec: Spec, quick: bool) -> dict[str, Spec]:
    """What is run once each, for one precision: a long answer, batches, resolutions as far as the positions reach."""
    limit, vision = config.text_config.max_position_embeddings, config.vision_config
    spec = replace(spec, passes=1, warm=False)
    few = replace(spec, tokens=8)
    runs = {
        "length": replace(spec, tokens=64 if quick else 512),
        "batch": replace(few, rows=(1, 2, 4) if quick else (1, 2, 4, 8, 16)),
    }
    for times in (1, 2, 4):
        side = times * vision.image_size
        if (side // vision.patch_size) ** 2 + TEXT_TOKENS + few.tokens <= limit:
            runs[f"{side} pixels"] = replace(few, image_size=side)
    return runs


def _in_its_own_process(spec: Spec) -> dict[str, Any]:
    command = [sys.executable, "-m", "paligemma.bench.worker", json.dumps(asdict(spec))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {TIMEOUT} seconds") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _temporary(work: Path | None) -> tempfile.TemporaryDirectory[str]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="paligemma-bench-", dir=work)


@contextlib.contextmanager
def _weights(model: str, work: Path | None, say: Say) -> Iterator[Path]:
    """The folder of a checkpoint: the user's own, or random weights in a published shape, gone at the end."""
    config = published_shape(model) if not Path(model).exists() else None
    if config is None:
        path = resolve(model)
        if not path.is_dir():
            raise ValueError(f"{model} is a file: the benchmark wants a folder, a hub id or a published name")
        yield path
        return
    with _temporary(work) as folder:
        say(f"writing random weights in the shape of {model}")
        write_random_checkpoint(config, Path(folder))
        yield Path(folder)
