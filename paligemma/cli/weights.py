"""Checkpoints: info, convert, merge, quantize, download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paligemma.cli.options import DTYPES, Revision, one_of
from paligemma.cli.output import echo_json, note, say

Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: the checkpoint's own.", callback=one_of(*DTYPES)),
]
DtypeBeside = Annotated[
    str | None,
    typer.Option(
        help="Of what is not rounded: bfloat16, float16 or float32. Default: bfloat16 for the published sizes, the "
        "checkpoint's own for others.",
        callback=one_of(*DTYPES),
    ),
]


def info(
    model: Annotated[str, typer.Argument(help="'tiny', a hub id, a folder, or a big_vision .npz.")] = "tiny",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The facts as one JSON object; sizes in bytes.")] = False,
) -> None:
    """What a checkpoint is and what it needs, without loading its weights."""
    from paligemma.weights.info import describe as describe_checkpoint
    from paligemma.weights.info import render

    facts = describe_checkpoint(model, revision)
    echo_json(facts) if as_json else say(render(facts))


def convert(
    source: Annotated[str, typer.Argument(help="'tiny', a hub id, a folder or an .npz.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, or a file that ends in .npz.")],
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Rewrite a checkpoint in another format or dtype: safetensors as transformers reads it, or big_vision's .npz.

    The other files of a checkpoint (config.json, the tokenizer, preprocessor_config.json, generation_config.json,
    mask_codec.npz, calibration.json) are written into the same folder, beside an .npz too. A command that would replace
    a different file there is refused.
    """
    from paligemma.weights.converting import convert as convert_checkpoint

    note_written(target, convert_checkpoint(source, target, dtype=dtype, revision=revision))


def merge(
    adapter: Annotated[str, typer.Argument(help="The folder (or hub id) of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Add a LoRA adapter to the weights it was trained on, and write one checkpoint as transformers reads it."""
    from paligemma.weights.converting import merge as merge_adapter

    note_written(out, merge_adapter(adapter, out, dtype=dtype, revision=revision))


def quantize(
    source: Annotated[str, typer.Argument(help="'tiny', a hub id, a folder (an adapter's too) or an .npz.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="8 bits for each weight: half the size, almost the same answers.")
    ] = False,
    int4: Annotated[
        bool, typer.Option("--int4", help="4 bits in the decoder, 8 elsewhere: a third of the size.")
    ] = False,
    dtype: DtypeBeside = None,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with rounded weights: smaller, and several times faster on a CPU."""
    if int8 == int4:
        raise typer.BadParameter("choose one of --int8 and --int4")
    if target.suffix == ".npz":
        raise typer.BadParameter(f"{target} is the name of an .npz, which cannot hold rounded weights: name a folder")

    from paligemma.fast.swap import check_compute_dtype
    from paligemma.weights.finding import open_model, resolve
    from paligemma.weights.loading import parse_dtype
    from paligemma.weights.quantized import quantize_checkpoint

    mode = "int8" if int8 else "int4"
    try:
        check_compute_dtype(mode, parse_dtype(dtype))  # before a download
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    checkpoint, folders = open_model(resolve(source, revision, dtype), dtype)
    note_written(target, quantize_checkpoint(checkpoint, target, mode, dtype, folders=folders))


def download(
    model: Annotated[str, typer.Argument(help="A hub id, e.g. google/paligemma2-3b-mix-224.")],
    revision: Revision = None,
) -> None:
    """Fetch a checkpoint into the hub's cache and print where it lies."""
    from paligemma.weights.finding import resolve

    say(str(resolve(model, revision=revision)))


def note_written(target: Path, files: list[Path]) -> None:
    """One line on stderr. The files beside an .npz are named, because the command did not ask for them."""
    from paligemma.weights.info import in_units

    if target in files:
        beside = ", ".join(file.name for file in files if file != target)
        note(f"written: {target}, {in_units(target.stat().st_size)}; beside it {beside}")
    else:
        size = in_units(sum(file.stat().st_size for file in files))
        note(f"written: {target}, {size} in {len(files)} files")
