"""What several commands ask for: the options they share, and the limits of what may be given."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def one_of(*names: str) -> Any:
    """An option's callback: another value is wrong usage, told before torch is imported. "cuda:1" is a "cuda"."""

    def check(value: str | None) -> str | None:
        if value is not None and value.partition(":")[0] not in names:
            raise typer.BadParameter(f"{value!r}, expected {', '.join(names)}")
        return value

    return check


Model = Annotated[str, typer.Option("--model", "-m", help="'tiny', a hub id, a folder, or a big_vision .npz.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, mps or cpu. Default: the best there is.", callback=one_of("cuda", "mps", "cpu")),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32. Default: by the size of the model.",
        callback=one_of("bfloat16", "float16", "float32"),
    ),
]
Kind = Annotated[str | None, typer.Option(help="What the data is, where its content does not say.")]
Images = Annotated[str | None, typer.Option(help="The folder that names of pictures are relative to.")]
Annotations = Annotated[str | None, typer.Option(help="VQA: the file with the answers.")]
ImageName = Annotated[str | None, typer.Option(help="The picture's name by other fields: '{image_id}.jpg'.")]
Split = Annotated[str | None, typer.Option(help="Which one, in a folder with several.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same random choices.")]
Language = Annotated[str, typer.Option(help="In prompts made of questions and captions.")]
EveryLabel = Annotated[bool, typer.Option("--every-label", help="COCO: ask for all labels in every row.")]
Data = Annotated[str, typer.Argument(help="JSON lines, CSV, COCO, VQA, parquet, or a folder with one of them.")]
