"""`paligemma export`: the model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from paligemma.cli.options import Revision, one_of
from paligemma.cli.output import note, notes, say

WEIGHTS = ("fp32", "fp16", "q8", "q4")


def export(
    source: Annotated[str, typer.Argument(help="'tiny', a hub id, a folder (an adapter's too) or an .npz.")],
    target: Annotated[Path, typer.Argument(help="The new folder to write.")],
    format: Annotated[str, typer.Option(help="Of the files: onnx.", callback=one_of("onnx"))] = "onnx",
    weights: Annotated[
        str,
        typer.Option(help="How weights are stored: fp32, fp16, q8 (8 bits), q4 (4 bits); several with commas."),
    ] = "fp32",
    check: Annotated[
        bool, typer.Option("--check", help="Run the files and compare them with PyTorch; prints the differences.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a model as ONNX files, for onnxruntime, OpenVINO and, in a browser or Node, transformers.js."""
    names = [name.strip() for name in weights.split(",") if name.strip()]
    if not names or (unknown := [name for name in names if name not in WEIGHTS]):
        raise typer.BadParameter(
            f"--weights is {weights!r}, expected {', '.join(WEIGHTS)}"
            + (f"; {unknown[0]!r} is none of them" if names else "")
        )
    try:
        from paligemma.export.exporting import export as export_model

        if check:
            import onnxruntime  # noqa: F401  # before the files are written, if it is missing
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'paligemma[export]'") from None
    from paligemma.weights.info import in_units

    with notes.status("") as status:
        files = export_model(source, target, names, revision, say=lambda text: status.update(Text(text)))
    size = in_units(sum(file.stat().st_size for file in files))
    note(f"written: {target}, {size} in {len(files)} files")
    if check:
        from paligemma.export.checking import check as check_difference
        from paligemma.export.checking import differences, in_pytorch
        from paligemma.export.exporting import opened

        pg = in_pytorch(*opened(source, names, revision))  # the weights that were exported, and not downloaded again
        for name in dict.fromkeys(names):
            found = differences(pg, target, name)
            say(str(found))
            check_difference(found)
