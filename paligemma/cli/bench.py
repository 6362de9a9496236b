"""`paligemma bench`: how fast a model is."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from paligemma.cli.options import Threads, device_in
from paligemma.cli.output import note, notes, print_table, say

PRECISIONS = "bf16,int8,int4"


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A published name (random weights, no download), or a checkpoint.")
    ] = "paligemma-3b-pt-224",
    serve: Annotated[
        bool, typer.Option("--serve", help="Measure servers under load instead: paligemma serve.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Measure training steps instead, LoRA and all weights: paligemma train.")
    ] = False,
    precisions: Annotated[
        str,
        typer.Option(help="plain, bf16, int8, int4, separated by commas; bf16-torch and so on: without our kernels."),
    ] = PRECISIONS,
    transformers: Annotated[
        bool | None, typer.Option("--transformers/--no-transformers", help="Default: if it is installed.")
    ] = None,
    grow: Annotated[bool, typer.Option("--grow", help="Also how cost grows: length, batch, resolution.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Decoding only, eager and as one compiled graph, in float32 on the CPU.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One round of less, for a try.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of each timed answer; at least 128 on a GPU. Not with --train.")
    ] = 16,
    threads: Threads = None,
    work: Annotated[Path | None, typer.Option(help="Where random weights lie for the time of the run.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the record and the picture.")] = Path("benchmarks"),
    device: Annotated[
        str,
        typer.Option(help="cpu; or cuda: eager, compiled, and transformers.", callback=device_in("cpu", "cuda")),
    ] = "cpu",
) -> None:
    """Measure speed and memory on this machine, beside its limits and beside transformers.

    With --serve: requests a second, latency and time to the first token of servers with 1, 4 and 16 clients.
    With --train: seconds and memory of training steps, beside a bare loop and transformers with peft.
    """
    if serve and train:
        raise typer.BadParameter("--serve and --train measure different things: give one of them")
    if (serve or train) and compile:
        raise typer.BadParameter(f"{'--serve' if serve else '--train'} measures without --compile: leave one out")
    if serve and device != "cpu":
        raise typer.BadParameter("--serve measures on the CPU: leave --device out")
    if compile and device == "cpu" and transformers:
        raise typer.BadParameter("--transformers is not beside --compile on a CPU: it compiles by itself on a GPU only")
    if (serve or train or compile or device != "cpu") and (grow or precisions != PRECISIONS):
        raise typer.BadParameter(
            "--precisions and --grow are for the benchmark on a CPU without --serve, --train, --compile"
        )
    if train:
        bench_training(model, transformers, 1 if quick else rounds, 2 if quick else 5, device, threads, work, out)
        return
    if device != "cpu" or compile:
        tokens = tokens if device == "cpu" else max(tokens, 128)
        bench_decoding(model, device, transformers, 1 if quick else rounds, tokens, threads, work, out)
        return
    if serve:
        bench_serving(model, transformers, 1 if quick else rounds, 2 if quick else 8, tokens, threads, work, out)
        return
    from paligemma.bench.plot import draw
    from paligemma.bench.records import record_path
    from paligemma.bench.run import benchmark
    from paligemma.bench.tables import growth_lines, table

    path = record_path(out, "speed", model)
    with notes.status("") as status:
        record = benchmark(
            model,
            [name.strip() for name in precisions.split(",") if name.strip()],
            transformers=transformers,
            rounds=1 if quick else rounds,
            passes=1 if quick else 2,
            tokens=min(tokens, 8) if quick else tokens,
            grow=grow,
            quick=quick,
            threads=threads,
            work=work,
            out=path,
            command=command_line(),
            say=lambda text: status.update(Text(text)),
        )
    print_table(table(record))
    for line in growth_lines(record):
        say(line)
    try:
        draw(record, path.with_suffix(".png"))
        note(f"picture: {path.with_suffix('.png')}")
    except (ImportError, ValueError) as error:
        note(f"note: no picture: {error}")
    end(record, path)


def command_line() -> str:
    """What was typed, for the record."""
    return shlex.join(["paligemma", *sys.argv[1:]])


def end(record: dict[str, Any], path: Path) -> None:
    """Says what failed and where the record is. Exit code 1 if anything failed."""
    for failed in record["failed"]:
        note(f"failed: {failed['what']}: {failed['why']}")
    note(f"record: {path}")
    if record["failed"]:
        raise typer.Exit(1)


def bench_serving(
    model: str,
    transformers: bool | None,
    rounds: int,
    requests: int,
    tokens: int,
    threads: int | None,
    work: Path | None,
    out: Path,
) -> None:
    from paligemma.bench.records import record_path
    from paligemma.bench.serving import benchmark_serving, table

    path = record_path(out, "serving", model)
    with notes.status("") as status:
        record = benchmark_serving(
            model, transformers=transformers, rounds=rounds, requests=requests, tokens=tokens, threads=threads,
            work=work, out=path, command=command_line(),
            say=lambda text: status.update(Text(text)),
        )  # fmt: skip
    print_table(table(record))
    end(record, path)


def bench_training(
    model: str,
    transformers: bool | None,
    rounds: int,
    steps: int,
    device: str,
    threads: int | None,
    work: Path | None,
    out: Path,
) -> None:
    from paligemma.bench.decoding import check_device
    from paligemma.bench.records import record_path
    from paligemma.bench.training import benchmark_training, table

    check_device(device)
    path = record_path(out, "training", model, "" if device == "cpu" else f"-{device.replace(':', '')}")
    with notes.status("") as status:
        record = benchmark_training(
            model, transformers=transformers, rounds=rounds, steps=steps, device=device, threads=threads,
            work=work, out=path, command=command_line(),
            say=lambda text: status.update(Text(text)),
        )  # fmt: skip
    print_table(table(record))
    end(record, path)


def bench_decoding(
    model: str,
    device: str,
    transformers: bool | None,
    rounds: int,
    tokens: int,
    threads: int | None,
    work: Path | None,
    out: Path,
) -> None:
    """`--device cuda` and `--compile`: how fast decoding is, eager and compiled."""
    from paligemma.bench.decoding import benchmark_decoding, check_device, ratio_line, table
    from paligemma.bench.records import record_path
    from paligemma.bench.run import checkpoint_of
    from paligemma.bench.transformers_model import installed

    check_device(device)
    on_cpu = device == "cpu"
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if transformers is None:
        transformers = installed() and not on_cpu  # theirs compiles by itself on a GPU only
    path = record_path(out, "speed", model, "-compiled" if on_cpu else f"-{device.replace(':', '')}")
    with notes.status("") as status, checkpoint_of(model, work, lambda text: status.update(Text(text))) as folder:
        record = benchmark_decoding(
            folder,
            model,
            device,
            dtype="float32" if on_cpu else "bfloat16",
            transformers=transformers,
            rounds=rounds,
            tokens=tokens,
            out=path,
            command=command_line(),
            say=lambda text: status.update(Text(text)),
        )
    print_table(table(record))
    say(ratio_line(record))
    note(f"record: {path}")
