"""Options that several commands share: their help texts, and the values they accept."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from paligemma.cli.output import note
from paligemma.files import MAX_PIXELS, is_data_url
from paligemma.tasks import asks_for_items, split_labels, task_of

if TYPE_CHECKING:
    from PIL import Image


def world_of(world: int | None) -> int:
    """The value of --world."""
    from paligemma.tiny.world import SHIPPED

    return SHIPPED if world is None else world


def one_of(*names: str) -> Callable[[str | None], str | None]:
    """A callback that accepts these values only. It runs before torch is imported, so wrong usage is told at once."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r}, expected {', '.join(names)}")
        return value

    return check


def device_in(*names: str) -> Callable[[str | None], str | None]:
    """The same for devices, "cuda" among them, which may have a number: "cuda:1"."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names and not re.fullmatch("cuda:[0-9]+", value):
            raise typer.BadParameter(f"{value!r}, expected {', '.join(names)} or a numbered one such as cuda:1")
        return value

    return check


def checked_loc_scale(value: int) -> int:
    if value not in (1023, 1024):
        raise typer.BadParameter(f"--loc-scale is {value}, expected 1024 or 1023")
    return value


def check_order(prompt: str, images: Sequence[str], command: str, folders: bool = False) -> None:
    """An error of usage where the prompt is a file and no picture is: they have changed places. folders: pictures may
    also come from a folder, a pattern or stdin."""
    is_there = os.path.exists if folders else os.path.isfile
    if is_there(prompt) and not any(
        name == "-" or is_data_url(name) or os.path.exists(name) or any(glob.iglob(name, recursive=True))
        for name in images
    ):
        raise typer.BadParameter(
            f"the prompt comes first, then the picture: paligemma {command} {images[0]!r} {prompt}"
        )


def check_labels(prompt: str, free: bool) -> None:
    """An error of usage for `detect` and `segment` without labels: their grammar cannot begin."""
    if asks_for_items(prompt) and not free and not all(split_labels(prompt)):
        task = task_of(prompt)
        raise typer.BadParameter(
            f"{task} has to name at least one thing to look for, and no empty ones: '{task} dog', '{task} dog ; cat'"
        )


def checked_max_pixels(value: float) -> float:
    if not 1e-6 <= value < float("inf"):
        raise typer.BadParameter(f"--max-pixels is {value:g}, expected millions of pixels, such as 40")
    return value


def within_cores(threads: int | None) -> int | None:
    """--threads, at most one for each core. More of them wait for each other: a thousand took a minute on two cores."""
    if threads is None:
        return None
    from paligemma.devices import cpu_count

    cores = cpu_count()
    if threads <= cores:
        return threads
    note(f"note: --threads is {threads}, this process may use {cores} cores, so {cores} are used")
    return cores


def pixels(millions: float) -> int:
    """--max-pixels as the functions take it."""
    return round(millions * 1e6)


def picture_named(name: str, max_pixels: int) -> Image.Image:
    """The picture that a command names; '-' is the one on stdin."""
    from paligemma.images import load_image

    if name == "-" and sys.stdin is None:
        raise ValueError("'-' stands for a picture on stdin, and stdin is closed")
    return load_image(sys.stdin.buffer if name == "-" else name, max_pixels)


Model = Annotated[str, typer.Option("--model", "-m", help="'tiny', a hub id, a folder, or a big_vision .npz.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cuda, mps or cpu. Default: the first of them that this machine has.",
        callback=device_in("cuda", "mps", "cpu"),
    ),
]
DTYPES = "bfloat16", "float16", "float32"
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32. Default: bfloat16 for the published sizes, else the checkpoint's own "
        "(float32 where the CPU multiplies bfloat16 slowly).",
        callback=one_of(*DTYPES),
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Round the weights while they are loaded: int8, int4; on CUDA also bnb-int8, nf4. bf16 rounds "
        "nothing further, but is read faster.",
        callback=one_of("int8", "int4", "bnb-int8", "nf4", "bf16"),
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="'auto': layers that do not fit on the device stay in memory or on disk (needs accelerate).",
        callback=one_of("auto"),
    ),
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the pictures in pixels, if not the checkpoint's.")]
LocScale = Annotated[
    int,
    typer.Option(
        help="Steps that location tokens divide a side into: 1024 or 1023.",
        callback=checked_loc_scale,
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of an answer at most. Default 128; 512 for detect and segment.")
]
MaxPixels = Annotated[
    float,
    typer.Option(
        help="Million pixels of a picture at most, from its header, before it is decoded.", callback=checked_max_pixels
    ),
]
DEFAULT_MAX_PIXELS = MAX_PIXELS // 10**6
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the CPU. Default: PyTorch's choice.", callback=within_cores)
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Draw tokens at random, with this temperature above 0. Default: the likeliest ones."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens. Default: all.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens that have the probability p together, 0 < p <= 1.")
]
Beams = Annotated[int, typer.Option(min=1, help="Beam search of this width.")]
ForbidRepeats = Annotated[
    bool, typer.Option("--forbid-repeats", help="Let no box of detect and segment repeat an earlier one.")
]
Free = Annotated[bool, typer.Option("--free", help="Decode detect and segment without the grammar.")]
# How rows are made of data.
Kind = Annotated[str | None, typer.Option(help="What the data is, where its content does not say.")]
Images = Annotated[str | None, typer.Option(help="The folder that the names of pictures are relative to.")]
Annotations = Annotated[str | None, typer.Option(help="VQA: the file with the answers.")]
ImageName = Annotated[
    str | None, typer.Option(help="How the name of a picture is made of other fields: '{image_id}.jpg'.")
]
Split = Annotated[str | None, typer.Option(help="The split to read, in a folder with several.")]
Seed = Annotated[int, typer.Option(help="Start of all random numbers: the same seed gives the same result.")]
World = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2,
        help="Of the small world: 1, or 2 with more artists, variety and degradations. Default: that of the model "
        "that ships.",
    ),
]
Language = Annotated[str, typer.Option(help="The language in prompts that are made of questions and captions.")]
EveryLabel = Annotated[bool, typer.Option("--every-label", help="Boxes and masks: ask for all labels in every row.")]
Data = Annotated[
    str, typer.Argument(help="JSON lines, CSV, parquet, COCO, VQA, YOLO, VOC, LabelMe, or a folder of these.")
]
