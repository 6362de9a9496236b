"""Decoding: eager, compiled, and transformers with its static cache and compilation, in turns. Meant for GPUs.

Each model answers with one token and with many; the difference, for each further token, is what decoding takes. The
least that it can take is what the card needs to read the language model's weights once. All models are in memory at the
same time, and the order changes from round to round, so that a card that gets warm is unfair to none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.bench.records import new_record, save
from paligemma.bench.transformers_model import answer_compiled, load_transformers
from paligemma.bench.worker import bytes_of, make_inputs
from paligemma.engine import generate
from paligemma.weights.loading import load_model

if TYPE_CHECKING:
    from rich.table import Table

GIGABYTE = 2**30  # what `read_rate` reads

Answer = Callable[[dict[str, Any], int], object]


def check_device(device: str) -> None:
    """RuntimeError where there is no such device: the figures of another one say nothing."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("this machine has no GPU that PyTorch can use (CUDA): nothing was measured")


def benchmark_decoding(
    folder: Path,
    model: str,
    device: str = "cuda",
    dtype: str = "bfloat16",
    transformers: bool = True,
    rounds: int = 3,
    tokens: int = 128,
    out: Path | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures a checkpoint and returns the record; with `out` it is saved there. model: its name in the record.

    Raises RuntimeError where there is no such device.
    """
    check_device(device)
    say("loading")
    loaded = load_model(folder, device=device, dtype=dtype)
    no_end = [loaded.config.eos_token_id]  # every answer has the same length

    def ours(compile: bool) -> Answer:
        return lambda inputs, count: generate(
            loaded, inputs, max_new_tokens=count, suppress_tokens=no_end, compile=compile
        )

    answers: dict[str, Answer] = {"eager": ours(False), "compiled": ours(True)}
    if transformers:
        theirs = load_transformers(str(folder)).to(device)
        answers["transformers, compiled"] = lambda inputs, count: answer_compiled(theirs, inputs, count)
    side = loaded.config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    inputs = {name: x.to(device) for name, x in {**make_inputs(loaded.config, 1), "pixel_values": pixels}.items()}
    for name, answer in answers.items():
        say(f"{name}: compiling, and a first answer")
        answer(inputs, tokens)
    what = "seconds of an answer with one token and with `tokens`; and what the device can do at best"
    record: dict[str, Any] = {
        **new_record(what, model, command),
        "decoding_device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": dtype,
        "tokens": tokens,
        "token_bytes": bytes_of(loaded)["token_bytes"],
        "read_gb_s": read_rate(device),
        "runs": [],
    }
    for number in range(rounds):
        for name, answer in list(answers.items())[:: 1 if number % 2 else -1]:
            say(f"round {number + 1} of {rounds}: {name}")
            first, whole = (seconds_of(partial(answer, inputs, count), device) for count in (1, tokens))
            record["runs"].append({"name": name, "first_token_s": first, "answer_s": whole})
    record["summary"] = summary(record)
    save(record, out)
    return record


def seconds_of(run: Callable[[], object], device: str) -> float:
    """The device works on while the host goes on: both are waited for."""
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def ratio_line(record: dict[str, Any]) -> str:
    """How long a further token takes compiled, as a share of eager, in each round."""
    steps: dict[str, list[float]] = {}
    for run in record["runs"]:
        steps.setdefault(run["name"], []).append(run["answer_s"] - run["first_token_s"])
    ratios = [compiled / eager for compiled, eager in zip(steps["compiled"], steps["eager"])]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return (
        f"a token compiled takes {middle:.2f} times as long as eager ({low:.2f} - {high:.2f} in {len(ratios)} rounds)"
    )


def read_rate(device: str) -> float:
    """GB/s: summing up a gigabyte, in the fastest of a few runs."""
    numbers = torch.ones(GIGABYTE // 4, device=device)  # float32; less would fit into the caches of large CPUs
    numbers.sum()
    return numbers.nbytes / min(seconds_of(numbers.sum, device) for _ in range(5)) / 1e9


def summary(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians: milliseconds to the first token and for each further one, and the share of the limit of reading."""
    limit_ms = record["token_bytes"] / record["read_gb_s"] / 1e6
    found = {}
    for name in dict.fromkeys(run["name"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["name"] == name]
        steps = [1000 * (run["answer_s"] - run["first_token_s"]) / (record["tokens"] - 1) for run in runs]
        ms = statistics.median(steps)
        found[name] = {
            "first_token_ms": round(1000 * statistics.median(run["first_token_s"] for run in runs), 2),
            "token_ms": round(ms, 3),
            "token_ms_min": round(min(steps), 3),
            "token_ms_max": round(max(steps), 3),
            "share_of_reading": round(limit_ms / ms, 3),
        }
    return found


def table(record: dict[str, Any]) -> Table:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(f"{record['model']}: {record['decoding_device']}, {record['dtype']}", "table.title"),
        caption=f"the device reads {record['read_gb_s']:.0f} GB/s: {record['token_bytes'] / 1e9:.2f} GB for each token",
    )
    for name in ("", "first token, ms", "each token, ms (min - max)", "of the reading limit"):
        drawn.add_column(name, justify="right" if name else "left")
    for name, figures in record["summary"].items():
        spread = f"{figures['token_ms']:.2f} ({figures['token_ms_min']:.2f} - {figures['token_ms_max']:.2f})"
        drawn.add_row(name, f"{figures['first_token_ms']:.1f}", spread, f"{figures['share_of_reading']:.0%}")
    return drawn
