"""`paligemma train`: fine-tune a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from paligemma.cli.options import (
    Annotations,
    Device,
    EveryLabel,
    ImageName,
    Images,
    ImageSize,
    Kind,
    Language,
    MaxPixels,
    Model,
    Revision,
    Seed,
    Split,
)
from paligemma.cli.output import note, print_table
from paligemma.train.options import TrainOptions

HEADINGS = {  # in --help, each before the option named
    "data": "Model, data and result",
    "kind": "How the data is read",
    "validation": "Validation",
    "steps": "How long",
    "batch": "Batches",
    "lr": "Optimisation",
    "freeze": "What is trained",
    "quantize": "Memory and hardware",
    "resume": "Interruptions and bad rows",
    "help": "Other",
}


class WithHeadings(TyperCommand):
    """Fifty options in one list would be hard to read."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # click's types, which typer now brings itself
        sections: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for parameter in self.get_params(ctx):
            heading = HEADINGS.get(parameter.name or "", heading)
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def finetune(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="JSON lines, CSV, parquet, COCO, VQA, YOLO, VOC, LabelMe, or a folder of these.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run; in the end the model itself.")],
    model: Model = "tiny",
    revision: Revision = TrainOptions.revision,
    # How the data is read
    kind: Kind = TrainOptions.kind,
    images: Images = TrainOptions.images,
    annotations: Annotations = TrainOptions.annotations,
    image_name: ImageName = TrainOptions.image_name,
    split: Split = TrainOptions.split,
    language: Language = TrainOptions.language,
    every_label: EveryLabel = TrainOptions.every_label,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row, pictures included; longer answers are cut.")
    ] = TrainOptions.max_length,
    max_pixels: MaxPixels = TrainOptions.max_pixels,
    # Validation
    validation: Annotated[
        str | None, typer.Option(help="Rows to measure answers on; the same kind of data.")
    ] = TrainOptions.validation,
    validation_split: Annotated[
        str | None, typer.Option(help="The split of --validation to read.")
    ] = TrainOptions.validation_split,
    validation_annotations: Annotated[
        str | None, typer.Option(help="VQA: the file with its answers.")
    ] = TrainOptions.validation_annotations,
    metric: Annotated[
        str, typer.Option(help="auto (by prompt), exact, vqa, anls, caption, detect, ...")
    ] = TrainOptions.metric,
    validate_every: Annotated[
        int, typer.Option(min=0, help="Steps between validations. Default: only at the end.")
    ] = TrainOptions.validate_every,
    validation_rows: Annotated[
        int, typer.Option(min=1, help="Rows to measure, chosen at random.")
    ] = TrainOptions.validation_rows,
    # How long
    steps: Annotated[int | None, typer.Option(min=1, help="How long, in batches.")] = TrainOptions.steps,
    epochs: Annotated[
        float | None, typer.Option(help="How long, in passes over the data. Default 1.")
    ] = TrainOptions.epochs,
    minutes: Annotated[
        float | None, typer.Option(help="How long at most; the schedule ends with them.")
    ] = TrainOptions.minutes,
    # Batches
    batch: Annotated[int, typer.Option(min=1, help="Rows a step, over all processes.")] = TrainOptions.batch,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Split each batch into this many pieces, one after another.")
    ] = TrainOptions.accumulate,
    keep_together: Annotated[
        bool,
        typer.Option("--keep-together", help="Shuffle pictures, not rows: one with several rows is encoded once."),
    ] = TrainOptions.keep_together,
    seed: Seed = TrainOptions.seed,
    # Optimisation
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default 1e-5; with LoRA 1e-4.")
    ] = TrainOptions.lr,
    vision_lr: Annotated[
        float, typer.Option(help="Learning rate of the vision tower as a share of --lr, e.g. 0.1.")
    ] = TrainOptions.vision_lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = TrainOptions.warmup,
    schedule: Annotated[
        str, typer.Option(help="How the rate falls: cosine, linear or constant.")
    ] = TrainOptions.schedule,
    optimizer: Annotated[
        str, typer.Option(help="adamw or muon (for the layers' matrices; AdamW at a third of --lr for all else).")
    ] = TrainOptions.optimizer,
    weight_decay: Annotated[
        float,
        typer.Option(help="Weight decay of vision tower and projector, times the learning rate as in PyTorch."),
    ] = TrainOptions.weight_decay,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target given to all other tokens.")
    ] = TrainOptions.label_smoothing,
    dropout: Annotated[
        float, typer.Option(help="Share of numbers set to 0 at random in the decoder.")
    ] = TrainOptions.dropout,
    clip: Annotated[float, typer.Option(help="A gradient of a larger norm is scaled down to it.")] = TrainOptions.clip,
    ema: Annotated[
        float, typer.Option(help="Measure and save a running average of the weights with this decay, e.g. 0.999.")
    ] = TrainOptions.ema,
    # What is trained
    freeze: Annotated[
        str, typer.Option(help="Parts that stay: vision, projector, decoder, embedding (a,b).")
    ] = ",".join(TrainOptions.freeze),
    lora: Annotated[
        str, typer.Option(help="Train LoRA in these parts alone: decoder, vision, projector (a,b).")
    ] = ",".join(TrainOptions.lora),
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's matrices.")] = TrainOptions.rank,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA is multiplied by alpha / rank. Default: the rank.")
    ] = TrainOptions.alpha,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before LoRA's matrices.")] = TrainOptions.lora_dropout,
    image_size: ImageSize = TrainOptions.image_size,
    # Memory and hardware
    quantize: Annotated[
        str | None, typer.Option(help="Round what LoRA leaves as it is: nf4 (QLoRA), bnb-int8; by bitsandbytes, CUDA.")
    ] = TrainOptions.quantize,
    checkpoint_gradients: Annotated[
        bool, typer.Option("--checkpoint-gradients", help="Less memory, a third more time.")
    ] = TrainOptions.checkpoint_gradients,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: split weights and optimizer among the processes.")
    ] = TrainOptions.shard,
    device: Device = TrainOptions.device,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="To compute and save in. Default: the checkpoint's; float32 to compute in where bfloat16 is slow."
        ),
    ] = TrainOptions.dtype,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how much memory it would need.")] = False,
    # Interruptions and bad rows
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, or remove it.")] = TrainOptions.resume,
    longer: Annotated[
        bool,
        typer.Option(
            "--longer", help="Go on with a run, finished or not, for more --steps, --epochs or --minutes than before."
        ),
    ] = TrainOptions.longer,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = TrainOptions.save_every,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at rows that are otherwise skipped (a picture that cannot be read) or cut (a box that reaches "
            "out of it, an answer that is too long).",
        ),
    ] = TrainOptions.strict,
) -> None:
    """Fine-tune a model on your rows: pictures, prompts, answers.

    The same command again goes on where it was cut off. Ctrl-C saves first. See also: paligemma train compare.
    """
    given = {**context.params, "out": str(out), "freeze": names(freeze), "lora": names(lora)}
    del given["plan"]  # all others are fields of `TrainOptions`
    try:
        options = TrainOptions(**given)
    except ValueError as error:  # out of range, unknown, or without effect; nothing was read yet
        raise typer.BadParameter(str(error)) from None
    if plan:
        from paligemma.train.planning import plan_of

        print_table(plan_of(options).table())
        return
    try:
        from paligemma.train.finetune import finetune as run

        run(options)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None


def names(listed: str) -> tuple[str, ...]:
    """ "vision, decoder" -> ("vision", "decoder")"""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def compare(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another.")],
) -> None:
    """Compare two runs of `train`: the options that differ, and their figures."""
    from paligemma.train.compare import compare as compare_runs

    print_table(compare_runs(run, other))
