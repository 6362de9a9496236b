"""`paligemma train`: fine-tune a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paligemma.cli.options import Device, EveryLabel, Language, Model, Revision, Seed
from paligemma.cli.output import note
from paligemma.data.options import DataOptions


def finetune(
    data: Annotated[str, typer.Option(help="JSON lines, CSV, COCO, VQA, parquet, or a folder with one of them.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; in the end the model itself.")],
    model: Model = "tiny",
    validation: Annotated[str | None, typer.Option(help="Rows to measure answers on; the same kind of data.")] = None,
    validation_split: Annotated[str | None, typer.Option(help="Which one, as --split.")] = None,
    validation_annotations: Annotated[str | None, typer.Option(help="VQA: the file with its answers.")] = None,
    metric: Annotated[str, typer.Option(help="auto (by prompt), exact, vqa, anls, caption, detect, ...")] = "auto",
    validate_every: Annotated[int, typer.Option(min=0, help="Steps. Default: only at the end.")] = 0,
    validation_rows: Annotated[int, typer.Option(min=1, help="How many of them, drawn by lot.")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="How long, in batches.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How long, in times through the data. Default 1.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long at most; the schedule ends with them.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Work through a batch in so many pieces.")] = 1,
    keep_together: Annotated[
        bool,
        typer.Option("--keep-together", help="Shuffle pictures, not rows: one with several rows is encoded once."),
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default 1e-5; with LoRA 1e-4.")] = None,
    vision_lr: Annotated[float, typer.Option(help="The vision tower's share of the learning rate, e.g. 0.1.")] = 1.0,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[
        float,
        typer.Option(help="As torch's, times the learning rate; of eye and projector alone, as in the reference."),
    ] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target given to all other tokens.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="In the decoder.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Most that the norm of the gradient may be.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Measure and save a running average with this decay, e.g. 0.999.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or muon (a third of the rate for all but matrices).")] = "adamw",
    freeze: Annotated[str, typer.Option(help="Parts that stay: vision, projector, decoder, embedding (a,b).")] = "",
    lora: Annotated[str, typer.Option(help="Train LoRA in these parts alone: decoder, vision, projector (a,b).")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Of LoRA. Default: its rank.")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.0,
    quantize: Annotated[
        str | None, typer.Option(help="Round what LoRA leaves as it is: nf4 (QLoRA), bnb-int8; by bitsandbytes, CUDA.")
    ] = None,
    checkpoint_gradients: Annotated[
        bool, typer.Option("--checkpoint-gradients", help="Less memory, a third more time.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: share weights and optimizer out among the processes.")
    ] = False,
    seed: Seed = 0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row, pictures included; longer answers are cut.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Another resolution than the checkpoint's.")] = None,
    kind: Annotated[str | None, typer.Option(help="What the data is, where its content does not say.")] = None,
    images: Annotated[str | None, typer.Option(help="The folder that names of pictures are relative to.")] = None,
    annotations: Annotated[str | None, typer.Option(help="VQA: the file with the answers.")] = None,
    image_name: Annotated[
        str | None, typer.Option(help="The picture's name by other fields: '{image_id}.jpg'.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which one, in a folder with several.")] = None,
    language: Language = DataOptions.language,
    every_label: EveryLabel = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="To compute and save in. Default: the checkpoint's; float32 to compute in where bfloat16 is slow."
        ),
    ] = None,
    revision: Revision = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, or remove it.")] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at rows that are otherwise skipped (a picture that cannot be read) or cut (a box that reaches "
            "out of it, an answer that is too long).",
        ),
    ] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 120.0,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how much memory it would need.")] = False,
) -> None:
    """Fine-tune a model on your rows: pictures, prompts, answers.

    The same command again goes on where it was cut off. Ctrl-C saves first.
    """
    given = dict(locals())
    from paligemma.train.finetune import Options, plan_of
    from paligemma.train.finetune import finetune as run_finetune

    del given["plan"]
    named = {
        name: tuple(part.strip() for part in given[name].split(",") if part.strip()) for name in ("freeze", "lora")
    }
    try:
        options = Options(**{**given, **named, "out": str(out)})
    except ValueError as error:  # out of range, unknown, or without effect; nothing was looked at yet
        raise typer.BadParameter(str(error)) from None
    if plan:
        Console().print(plan_of(options).table())
        return
    try:
        run_finetune(options)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        raise typer.Exit(130) from None
