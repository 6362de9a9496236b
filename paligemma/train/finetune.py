"""`paligemma train`: a model and rows -> a model that knows the rows' task, in a folder that everything opens.

    finetune(Options(model="tiny", data="my.jsonl", out="runs/mine"))

    paligemma evaluate --model runs/mine ...           paligemma.load("runs/mine")

What happens, in this order: the model is loaded; it and the options are compared with those of the run that may lie in
the folder; it is told which parts of it learn; every row is checked; an old run that is to be begun anew is removed,
now that nothing can be refused any more; what is going to happen is said; `loop.train` trains, with a look at generated
answers now and then (`sight.py`); the model is saved as checkpoints are published (an adapter with LoRA); its final
figures and a report are written.

Learning rates: what is right for a head that is new is too much for an eye that took a billion pictures to make, so it
may have a share of it (`vision_lr`). Muon takes AdamW's learning rates for the matrices between hidden layers, LoRA's
thin ones included; the rest (embedding, norms, biases), which AdamW trains beside it, gets a third of the rate, as when
the embedded model was made.

Numbers: what learns is kept in float32 whatever it is computed in, since a small step is lost in the eight bits of
bfloat16: a weight of 0.02 does not move by 1e-5. It is saved in the dtype it was loaded in, which is computed in, too;
but in float32 by a CPU that has no fast products of bfloat16, unless `dtype` names it. What LoRA is put beside may be
rounded to four bits (`quantize`: QLoRA, arXiv 2305.14314); the adapter then lies beside the whole weights.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from paligemma.data.check import check
from paligemma.data.checkpoint import codec_of
from paligemma.data.lengths import Lengths
from paligemma.data.options import DataOptions
from paligemma.data.rows import Row, Rows
from paligemma.devices import multiplies_bfloat16, pick_device
from paligemma.evaluate.output_folder import fingerprint
from paligemma.evaluate.own_rows import merge_captions, metric_of_prompt
from paligemma.evaluate.report import Report, rounded
from paligemma.fast.swap import is_quantized
from paligemma.files import write_json
from paligemma.inference import CODEC_FILE, PaliGemma, load
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.train import distributed, parts
from paligemma.train.allocator import give_back_freed_memory
from paligemma.train.batches import Ahead, Batch, RowBatches
from paligemma.train.loop import SCHEDULES, NotFinite, TrainConfig, train
from paligemma.train.optimizer import muon_and_adamw
from paligemma.train.run_folder import (
    FINISHED,
    append_to_log,
    clear,
    fingerprint_of_data,
    last_checkpoint,
    last_checkpoint_step,
    open_run,
    read_log,
    write_settings,
)
from paligemma.train.run_report import write_report
from paligemma.train.sight import Sight, TensorBoard, budget_for, chosen, figures_of
from paligemma.weights.adapters import base_of, is_adapter, save_adapter
from paligemma.weights.finding import resolve
from paligemma.weights.loading import default_dtype, parse_dtype
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained

if TYPE_CHECKING:
    from paligemma.train.plan import Plan

# What the check finds that need not keep a run from beginning, and what becomes of such rows.
BEARABLE = {
    "missing picture": "they are skipped",
    "box outside": "they are cut at its edge",
    "suffix too long": "the ends of their answers are cut off, as in the reference",
    "form of the prompt": "they are learned as they are written",
    "boxes not asked for": "they are learned as they are, and measured as text",
}


ROUNDED = ("nf4", "bnb-int8")  # modes of `paligemma.load` that let gradients through
MEASURING = ("validation_split", "validation_annotations", "metric", "validate_every", "validation_rows")


@dataclass(frozen=True)
class Options:
    """The options of the command. The help of `paligemma train` says what they mean."""

    model: str
    data: str
    out: str
    # what the data is: see `DataOptions`
    kind: str | None = None
    images: str | None = None
    annotations: str | None = None
    image_name: str | None = None
    split: str | None = None
    language: str = DataOptions.language
    every_label: bool = DataOptions.every_label
    max_length: int | None = None
    # how long
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    # how
    batch: int = 32
    accumulate: int = 1
    keep_together: bool = False  # rows of a picture
    lr: float | None = None  # 1e-5, with LoRA 1e-4
    vision_lr: float = 1.0  # the vision tower's share of it
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    optimizer: str = "adamw"
    seed: int = 0
    # what
    freeze: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    rank: int = 8
    alpha: float | None = None
    lora_dropout: float = 0.0
    quantize: str | None = None  # what LoRA does not change: nf4, bnb-int8
    checkpoint_gradients: bool = False
    shard: bool = False
    image_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    # what is looked at
    validation: str | None = None
    validation_split: str | None = None
    validation_annotations: str | None = None
    metric: str = "auto"
    validate_every: int = 0
    validation_rows: int = 256
    # going on
    resume: bool = True
    strict: bool = False
    save_every: float = 120.0

    def __post_init__(self) -> None:
        least = {"batch": 1, "accumulate": 1, "validation_rows": 1, "validate_every": 0, "steps": 1, "max_length": 1}
        least |= {"rank": 1, "image_size": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, expected at least {bound}")
        # Written so that nan is refused, with which every comparison is false.
        for name in ("epochs", "minutes", "lr", "clip", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}, expected a number above 0")
        for name in ("weight_decay", "save_every"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value:g}, expected a number from 0 on")
        for name in ("warmup", "label_smoothing", "dropout", "ema", "lora_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value:g}, expected a share in [0, 1)")
        if not 0 < self.vision_lr <= 1:
            raise ValueError(f"vision_lr is {self.vision_lr:g}, expected a share in (0, 1]; 0 is --freeze vision")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {self.optimizer!r}, expected adamw or muon")
        if parse_dtype(self.dtype) == torch.float16:
            raise ValueError("gradients underflow in float16: train in bfloat16 or float32")
        metric_of_prompt("", self.metric)

        # What does not go together, or would do nothing.
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say how long to train: give one of them")
        if self.optimizer == "muon" and self.shard:
            raise ValueError("muon needs whole matrices, and sharding cuts them up: choose adamw")
        if self.freeze and self.lora:
            raise ValueError("LoRA freezes all that it is not put beside: leave out --freeze")
        if self.lora and self.image_size is not None:
            raise ValueError("an adapter's base keeps its resolution: leave out --image-size, or train the whole model")
        if self.quantize not in (None, *ROUNDED):
            raise ValueError(
                f"quantize is {self.quantize!r}, expected {' or '.join(ROUNDED)}: through other rounded weights no "
                "gradient goes"
            )
        if self.quantize and not self.lora:
            raise ValueError("rounded weights cannot learn, LoRA beside them can: add --lora, or leave out --quantize")
        if self.quantize and self.shard:
            raise ValueError("rounded weights are not shared out among processes: leave out --shard")
        learns = set(self.lora) or {"vision", "projector", "decoder"}.difference(self.freeze)
        if self.vision_lr != 1 and "vision" not in learns:
            raise ValueError("vision_lr is for a vision tower that learns, and here it doesn't: leave out --vision-lr")
        if self.weight_decay and not learns & {"vision", "projector"}:
            raise ValueError(
                "weight_decay is, as in the reference, of vision tower and projector alone, and here neither learns: "
                "leave out --weight-decay"
            )
        for owner, names in {"lora": ("rank", "alpha", "lora_dropout"), "validation": MEASURING}.items():
            given = [name for name in names if getattr(self, name) != DEFAULTS[name]]
            if given and not getattr(self, owner):
                raise ValueError(f"{' and '.join(given)} would do nothing without --{owner}: add it, or leave them out")

    @property
    def source(self) -> DataOptions:
        """The rows to train on."""
        given = {field.name: getattr(self, field.name) for field in fields(DataOptions)}
        return DataOptions(**given)

    @property
    def validation_source(self) -> DataOptions | None:
        """The rows to measure answers on: the same kind of data."""
        if self.validation is None:
            return None
        return replace(
            self.source,
            data=self.validation,
            split=self.validation_split,
            annotations=self.validation_annotations,
        )

    @property
    def peak(self) -> float:
        return self.lr if self.lr is not None else 1e-4 if self.lora else 1e-5

    @property
    def peak_beside_muon(self) -> float:
        """Of what AdamW trains there."""
        return self.peak / 3


DEFAULTS = {field.name: field.default for field in fields(Options)}


def finetune(options: Options, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train, save, measure. Returns what `finished.json` holds: steps, seconds, rows that were skipped, figures, ...

    say: gets what is to be told, a line at a time; default: stderr.

    Run again with the same options it goes on where it was cut off, and does nothing when it was finished.

    ValueError for rows that cannot be trained on (naming them), for options that do not fit together, and for a folder
    that holds a run with others; FloatingPointError, naming step and rows, for a loss that is no number; OSError when
    something cannot be written: the last good checkpoint stays; ImportError for a package that is missing;
    KeyboardInterrupt after Ctrl-C, when all is saved.
    """
    check_base(options)
    check_packages(options)
    rank, world = distributed.start()
    say = quietly if rank else say or to_stderr
    out = Path(options.out)
    rows, measured = both_rows_of(options)
    device = options.device or own_device(world)
    pg = load(options.model, device, options.dtype, options.quantize, options.revision, options.image_size)

    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    facts = facts_of(pg, rows, measured) if rank == 0 else {}
    resumed = rank == 0 and open_run(out, settings, facts, options.resume)
    resumed = bool(distributed.from_the_first(float(resumed)))
    if distributed.from_the_first(float(resumed and (out / FINISHED).is_file())):
        say(f"{out} is finished already; --no-resume begins anew, another --out leaves it as it is")
        return json.loads((out / FINISHED).read_text(encoding="utf-8"))

    dtype = pg.model.dtype
    computed = computed_in(options, dtype, pg.model.device)
    prepare(pg.model, options)
    optimizers = optimizers_of(pg.model, options)
    limit = limit_of(options, pg.model.config)
    steps = steps_of(options, len(rows))
    sight = board = None
    if rank == 0:
        if resumed:
            say(f"going on in {out}: {last_checkpoint(out)}")
        else:
            check_rows(rows, pg, limit, options.strict, say)
            if measured is not None:
                check_rows(measured, pg, limit, options.strict, say)
            if not options.resume:
                clear(out)  # not before everything is checked: a command that is refused changes nothing
            write_settings(out, settings, facts)
        if options.shard and world == 1:
            say("note: --shard shares weights out among processes, and there is only one")
        for line in announcement(options, rows, pg, steps, dtype, computed):
            say(line)
        board = TensorBoard(out / "tensorboard", last_checkpoint_step(out), say)
        sight = look(options, pg, rows if measured is None else measured, out, say)
    distributed.wait_for_all()
    # All processes have to know when one looks: with a sharded model they all help to put it together.
    looks = measured is not None and bool(distributed.from_the_first(float(sight is not None)))

    def skip(step: int, source: str, error: Exception) -> None:
        """Into the log of the step, so that a run that goes on counts every row once."""
        to_stderr(f"skipped {source}: {error}")
        append_to_log(out, {"step": step + 1, "skipped": source, "error": str(error), "time": time.time()})

    batches = RowBatches(
        rows,
        pg.processor,
        options.batch,
        options.seed,
        limit,
        keep_together=options.keep_together,
        on_skip=None if options.strict else skip,
    )
    config = config_of(options, steps, computed)
    with told_what_to_do(out, batches):
        with cut_silently(), Ahead(batches, steps, world) as ahead:
            last = train(
                pg.model,
                ahead,
                config if looks else replace(config, validate_every=0),
                out,
                optimizers=optimizers,
                validate=sight or no_figures,
                on_log=board,
                resume=resumed,
            )
        if rank:
            return last
        check_learned(out)
        save_model(pg, options, out, dtype)
        if board is not None:
            board.close()
        return finish(options, pg, out, sight, measured is not None, say)


@contextmanager
def told_what_to_do(out: Path, batches: RowBatches) -> Iterator[None]:
    """What ends a run says what is left of it, and how to go on."""
    try:
        yield
    except NotFinite as error:
        named = ", ".join(batches.sources(error.step))
        raise FloatingPointError(
            f"{error}. Its rows: {named}; {last_checkpoint(out)}; begin anew with a lower --lr, or "
            "without these rows if it is their fault"
        ) from None
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{str(stop) or 'stopped at once: ' + last_checkpoint(out)}; the same command goes on from there"
        ) from None
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        for half in (out / "checkpoints").glob("*.part"):
            shutil.rmtree(half, ignore_errors=True)
        raise OSError(
            errno.ENOSPC, f"the disk is full ({out}); {last_checkpoint(out)}: make room, then the same command goes on"
        ) from error


# --- before -------------------------------------------------------------------------------------------------------


def both_rows_of(options: Options) -> tuple[Rows, Rows | None]:
    """Those to train on, and those to measure answers on. ValueError if there are none."""
    rows, measured = rows_of(options, options.source), None
    if options.validation_source is not None:
        measured = rows_of(options, options.validation_source)
    for path, found in ((options.data, rows), (options.validation, measured)):
        if found is not None and not len(found):
            raise ValueError(f"{path} has no rows")
    return rows, measured


def rows_of(options: Options, source: DataOptions) -> Rows:
    return source.open(codec_of(options.model, options.revision, options.kind))


def check_base(options: Options) -> None:
    """ValueError for LoRA beside an adapter: what would come out could not be opened, since the base of an adapter is a
    whole model. And for a model that lies where the run is to be: beginning anew would remove it."""
    path = resolve(options.model, options.revision, options.dtype, weights=False)
    places = [path, path / base_of(path)] if is_adapter(path) else [path]
    for place in places:
        if place.resolve().is_relative_to(Path(options.out).resolve()):
            raise ValueError(
                f"the model to begin with ({place}) lies in {options.out}, where the run would put its own: choose "
                "another --out"
            )
    if options.lora and is_adapter(path):
        raise ValueError(
            f"{options.model} is an adapter, and LoRA needs a whole model: fold it into its base, with 'paligemma "
            f"merge {options.model} FOLDER', and give that folder as --model; or train all of it, without --lora"
        )


def check_packages(options: Options) -> None:
    """ImportError for one that is missing: now, and not when gigabytes were read."""
    if options.quantize and find_spec("bitsandbytes") is None:
        raise ImportError(f"--quantize {options.quantize} needs bitsandbytes: pip install bitsandbytes")
    if options.lora and find_spec("peft") is None:
        raise ImportError("--lora needs peft: pip install peft")


def facts_of(pg: PaliGemma, rows: Rows, measured: Rows | None) -> dict[str, Any]:
    """What the options stood for, when a run began."""
    facts = {"data": fingerprint_of_data(rows), "weights": fingerprint(pg)}
    return facts if measured is None else {**facts, "validation data": fingerprint_of_data(measured)}


def own_device(world: int) -> str | None:
    """Each process its own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world > 1 and torch.cuda.is_available() else None


def computed_in(options: Options, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of the matrix products of a model in `dtype`: float32 instead of bfloat16 on a CPU that has no products
    of bfloat16, unless it was asked for by name. Weights rounded by bitsandbytes keep to what they were loaded in."""
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16(device)
    return torch.float32 if slow and options.dtype is None and options.quantize is None else dtype


def prepare(model: Any, options: Options) -> None:
    """Which weights learn, and how."""
    if is_quantized(model) and not options.lora:
        raise ValueError(
            f"{options.model} has rounded weights, which cannot learn: begin with the checkpoint that it was made of"
        )
    torch.manual_seed(options.seed)  # what LoRA begins with
    if options.lora:
        if not options.quantize:
            model.to(computed_in(options, model.dtype, model.device))
        parts.add_lora(model, options.lora, options.rank, options.alpha, options.lora_dropout)
    else:
        model.float()
        if options.freeze:
            parts.freeze(model, options.freeze)
    if options.dropout:
        parts.set_dropout(model, options.dropout)
    if options.checkpoint_gradients:
        parts.checkpoint_gradients(model)
    if model.device.type == "cpu":
        parts.suit_cpu(model)
        if not parts.is_small(model):
            give_back_freed_memory()  # small models would be a tenth slower with it


def optimizers_of(model: Any, options: Options) -> list[torch.optim.Optimizer] | None:
    """None for AdamW as in the reference, which the loop makes itself."""
    if options.optimizer == "adamw":
        return None
    return muon_and_adamw(
        model,
        options.peak,
        options.peak_beside_muon,
        options.weight_decay,
        slower=("vision_tower", options.vision_lr),
        decay_as_reference=True,
    )


def config_of(options: Options, steps: int, computed: torch.dtype) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=options.peak,
        vision_lr=options.vision_lr,
        warmup=options.warmup,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        clip=options.clip,
        accumulate=options.accumulate,
        label_smoothing=options.label_smoothing,
        autocast=computed if computed != torch.float32 else None,
        ema=options.ema,
        seed=options.seed,
        save_every=options.save_every,
        log_every=1,
        validate_every=options.validate_every,
        validate_last=False,  # but once the model is as it is saved
        minutes=options.minutes,
        shard=options.shard,
    )


def plan_of(options: Options) -> Plan:
    """What memory the run would need, from the configuration and the lengths of all rows; weights are not loaded (nor
    downloaded). ValueError as in `finetune` for options, and for the first row whose length cannot be told."""
    from paligemma.train.plan import estimate

    check_base(options)
    path = resolve(options.model, options.revision, options.dtype, weights=False)
    try:
        checkpoint = open_checkpoint(path)
        config, dtype = checkpoint.config, default_dtype(checkpoint)
    except FileNotFoundError:  # of a hub id there are the settings alone
        config, dtype = PaliGemmaConfig.from_pretrained(path), torch.bfloat16
    if options.image_size is not None:
        config = replace(config, vision_config=replace(config.vision_config, image_size=options.image_size))
    dtype = parse_dtype(options.dtype) or dtype
    computed = computed_in(options, dtype, pick_device(options.device))
    rows = rows_of(options, options.source)
    folder = path if path.is_dir() else path.parent
    vision = config.vision_config
    processor = PaliGemmaProcessor(load_tokenizer(folder), vision.num_patches, vision.image_size)
    return estimate(
        config,
        batch=options.batch,
        **sizes_of(rows, processor, limit_of(options, config)),
        accumulate=options.accumulate,
        freeze=options.freeze,
        lora=options.lora,
        rank=options.rank,
        lora_dropout=options.lora_dropout,
        quantize=options.quantize,
        dropout=options.dropout,
        stored=computed if options.lora else torch.float32,
        compute=computed,
        optimizer=options.optimizer,
        checkpoint_gradients=options.checkpoint_gradients,
        ema=bool(options.ema),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        shard=options.shard,
        foreach=torch.cuda.is_available(),
    )


def limit_of(options: Options, config: PaliGemmaConfig) -> int:
    """Most tokens of a row."""
    return options.max_length or config.text_config.max_position_embeddings


def sizes_of(rows: Rows, processor: PaliGemmaProcessor, limit: int) -> dict[str, int]:
    """What `plan.estimate` asks of rows. Of all of them: the longest makes the peak, however rare it is."""
    lengths = Lengths(processor)
    length = answer = images = 0
    shortest_prefix = limit
    with Console(stderr=True).status(f"measuring {len(rows):,} rows"):
        for row in rows:
            prefix, suffix = lengths(row)
            if prefix >= limit:
                raise ValueError(f"{row.source}: pictures and prompt take {prefix} tokens, and {limit} is the most")
            suffix = min(suffix, limit - prefix)
            length, answer = max(length, prefix + suffix), max(answer, suffix)
            images, shortest_prefix = max(images, len(row.pictures)), min(shortest_prefix, prefix)
    return {"length": length, "answer": answer, "images": images, "shortest_prefix": shortest_prefix}


def lay_out_some(rows: Rows, processor: PaliGemmaProcessor, limit: int, count: int = 200) -> tuple[list[Row], Batch]:
    """About `count` rows from all over the data, and their tokens."""
    some = [rows[i] for i in range(0, len(rows), max(1, len(rows) // count))]
    prefixes, suffixes = [row.prefix for row in some], [row.suffix for row in some]
    with cut_silently():
        return some, processor.lay_out(prefixes, [len(row.pictures) for row in some], suffixes, max_length=limit)


def steps_of(options: Options, rows: int) -> int:
    if options.steps is not None:
        return options.steps
    if options.epochs is None and options.minutes is not None:
        return 10**9  # the minutes end it
    return max(1, math.ceil((options.epochs or 1.0) * rows / options.batch))


def check_rows(rows: Rows, pg: PaliGemma, limit: int, strict: bool, say: Callable[[str], None]) -> None:
    """ValueError, naming the rows, for what cannot be trained on."""
    with Console(stderr=True).status(f"checking {len(rows):,} rows"):
        report = check(rows, pg.processor, max_length=limit)
    bad = {name: count for name, count in report.counts.items() if strict or name not in BEARABLE}
    if bad:
        report.counts, report.not_checked = bad, []  # which are options of another command
        raise ValueError(f"these rows cannot be trained on as they are:\n{report}")
    if report.counts.get("missing picture") and not any(map(has_its_pictures, rows)):
        first = report.first["missing picture"][0]
        raise ValueError(
            f"none of the pictures is there: {first.source}: {first.message}. Names are relative to the file they "
            "stand in, or to the folder given as --images: is that the right one?"
        )
    for text in report.notes():
        say(f"note: {text}")
    for name, count in report.counts.items():
        first = report.first[name][0]
        rows_of_them = f"{name}: {count:,} of {len(rows):,} rows, {BEARABLE[name]}"
        say(f"note: {rows_of_them}; the first is {first.source}: {first.message}")


def has_its_pictures(row: Row) -> bool:
    """Whether a row has pictures, and all of them are there."""
    return bool(row.pictures) and all(isinstance(one, bytes) or os.path.isfile(one) for one in row.pictures)


def announcement(
    options: Options, rows: Rows, pg: PaliGemma, steps: int, dtype: torch.dtype, computed: torch.dtype
) -> list[str]:
    """What is going to happen."""
    some, sample = lay_out_some(rows, pg.processor, limit_of(options, pg.model.config))
    tokens, answer = (float(sample[name].sum()) / len(some) for name in ("attention_mask", "token_type_ids"))
    longest = int(sample["attention_mask"].sum(-1).max())

    learned: dict[str, int] = {}  # parameters by part
    total: dict[str, int] = {}
    for name, parameter in pg.model.named_parameters():
        part = next(part for part, prefix in parts.PARTS.items() if name.startswith(prefix))
        total[part] = total.get(part, 0) + parts.count(parameter)
        if parameter.requires_grad:
            learned[part] = learned.get(part, 0) + parameter.numel()
    listed = ", ".join(f"{part} {count:,}" for part, count in learned.items())
    how = f"LoRA of rank {options.rank} in " if options.lora else ""
    rounded = f", the weights beside it rounded to {options.quantize}" if options.quantize else ""
    epochs = steps * options.batch / len(rows)
    rates = f"{options.peak:g}"
    if options.optimizer == "muon":
        rates += f" ({options.peak_beside_muon:.2g} for embedding, norms and biases, by AdamW)"
    if options.vision_lr != 1:
        rates += f", {options.vision_lr:g} of it for the vision tower"
    slow = "" if computed == dtype else f" (this CPU has no fast products of {name_of(dtype)})"
    warmup = f"{options.warmup:.0%} warm-up" if options.warmup * steps >= 1 else "no warm-up"
    counted = "1 step" if steps == 1 else f"{steps:,} steps"
    long = f"{options.minutes:g} minutes" if steps == 10**9 else f"{counted} ({epochs:.2g} epochs)"
    if options.minutes is not None and steps != 10**9:
        long += f", at most {options.minutes:g} minutes"
    return [
        f"data    {rows.note}; a row has {tokens:.0f} tokens, {answer:.1f} of them the answer, the longest {longest} "
        f"({len(some):,} rows looked at)",
        f"learns  {how}{listed}: {sum(learned.values()):,} of {sum(total.values()):,} parameters{rounded}",
        f"steps   {long} of {options.batch} rows; {options.optimizer}, learning rate {rates}, "
        f"{warmup}, then {options.schedule}",
        f"numbers computed in {name_of(computed)}{slow}, what learns is kept in float32 and saved in "
        f"{'float32' if options.lora else name_of(dtype)}; on {pg.model.device}",
    ]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- after --------------------------------------------------------------------------------------------------------


def check_learned(out: Path) -> None:
    """OSError if no row of any step could be read: the model is as it was, and no result."""
    log = read_log(out)
    skipped = [entry for entry in log if "skipped" in entry]
    if skipped and not any("loss" in entry for entry in log):
        last = skipped[-1]
        raise OSError(
            f"nothing was learned, since no picture could be read; the last of {len(skipped):,} rows that were left "
            f"out: {last['skipped']}: {last['error']}. Once they are there, begin anew with --no-resume"
        )


def save_model(pg: PaliGemma, options: Options, out: Path, dtype: torch.dtype) -> None:
    """The model as checkpoints are published, with its processor and, if it has its own, its mask codec."""
    if options.lora:
        network: Any = pg.model  # with what peft has put into it
        network.peft_config["default"].revision = options.revision
        save_adapter(pg.model, out, options.model, pg.processor)
    else:
        pg.model.to(dtype)
        save_pretrained(pg.model, out, pg.processor)
    if pg._codec is not None:
        pg._codec.save(out / CODEC_FILE)


def look(options: Options, pg: PaliGemma, rows: Rows, out: Path, say: Callable[[str], None]) -> Sight | None:
    """Validation by generation: of the validation rows, or (for the examples of the report) of a few trained on."""
    count = options.validation_rows if options.validation is not None else 12
    some = [row for row in chosen(rows, count) if row.pictures]
    if options.validation is not None:
        some = merge_captions(some, rows, options.metric)
    if not some:
        say("note: no picture in the rows to look at, so no answers are generated and measured")
        return None
    return Sight(pg, some, options.metric, out / "validation", min(16, options.batch), budget_for(some, pg), say)


def finish(
    options: Options,
    pg: PaliGemma,
    out: Path,
    sight: Sight | None,
    measured: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Final figures, report.html, finished.json."""
    pg.model.eval()
    log = read_log(out)
    report: Report | None = None
    examples: list[Any] = []
    if sight is not None:
        report, examples = sight.measure("final")
    steps = [entry for entry in log if "loss" in entry]
    if measured and report is not None and steps:  # the end of the curve
        entry = {"step": steps[-1]["step"], "validation": figures_of(report), "time": time.time()}
        append_to_log(out, entry)
        log.append(entry)
    trained = sum(entry["seconds"] for entry in steps)
    summary = {
        "steps": steps[-1]["step"] if steps else 0,
        "rows seen": (steps[-1]["step"] if steps else 0) * options.batch,
        "last loss": round(steps[-1]["loss"], 4) if steps else None,
        "seconds of training": round(trained, 1),
        "rows skipped": sum("skipped" in entry for entry in log),
        "peak memory": f"{peak_memory_of_device() / 1e9:.2f} GB",
    }
    about = "validation" if measured else "rows it was trained on"
    note = "There was no validation data; the examples are rows it was trained on."
    if measured and sight is not None:
        what = "adapter" if options.lora else "model"
        note = f"Figures and examples are of the {what} as it was saved: greedy answers to {len(sight.rows)} rows of "
        note += f"{options.validation}."
        if options.quantize:
            note += f" The weights beside it were rounded to {options.quantize}; beside whole ones answers may differ."
    write_report(
        out / "report.html",
        f"{options.model} fine-tuned on {Path(options.data).name}",
        {key: f"{value:,}" if isinstance(value, (int, float)) else str(value) for key, value in summary.items()},
        log,
        report.figures if report is not None and measured else [],
        examples,
        asdict(options),
        note,
    )
    figures = [vars(figure) for figure in report.figures] if report is not None else []
    content = {"summary": summary, "figures of": about, "figures": figures}
    write_json(out / FINISHED, content)
    if report is not None and measured:
        for line in in_words(report):
            say(line)
    say(f"the {'adapter' if options.lora else 'model'} is in {out}; look at {out / 'report.html'}")
    return content


def in_words(report: Report) -> list[str]:
    """A line for each measure: "validation, 6 rows by exact: share of exact answers 1.000 (95%: 0.610 … 1.000)"."""
    lines = []
    for task, counts in report.counts.items():
        figures = []
        for figure in report.figures:
            if figure.task == task and figure.value is not None:
                name = "share of exact answers" if figure.name == "exact" else figure.name
                interval = "" if figure.low is None else f" (95%: {rounded(figure.low)} … {rounded(figure.high)})"
                figures.append(f"{name} {rounded(figure.value)}{interval}")
        rows = "1 row" if counts.rows == 1 else f"{counts.rows:,} rows"
        lines.append(f"validation, {rows} by {task}: {', '.join(figures)}")
    return lines


def peak_memory_of_device() -> float:
    """Bytes: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


# --- small things -------------------------------------------------------------------------------------------------


def to_stderr(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


@contextmanager
def cut_silently() -> Iterator[None]:
    """Inside, the processor does not warn of answers that it cuts: `check_rows` has told of all of them at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* suffixes were cut")
        yield


def no_figures(model: Any, step: int) -> dict[str, Any]:
    return {}


def quietly(text: str) -> None:
    pass


def is_full(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower()
