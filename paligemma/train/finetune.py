"""`paligemma train`: a model and rows -> a model that knows the rows' task, in a folder that everything opens.

    finetune(TrainOptions(model="tiny", data="my.jsonl", out="runs/mine"))

    paligemma evaluate --model runs/mine ...           paligemma.load("runs/mine")

What happens, in this order: the model is loaded and compared with the run that may lie in the folder (`run_folder.py`);
it is prepared for training (`setup.py`); all rows are checked (`checks.py`); an old run that is to be replaced is
removed, now that nothing can be refused any more; a few lines say what will happen (`announcement.py`); `loop.train`
trains, and generated answers are measured now and then (`validation.py`); the model is saved as checkpoints are
published (with LoRA: an adapter), and its final figures and a report are written (`results.py`).

With several processes (torchrun) only the first one checks, talks and writes.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from paligemma.data.rows import Rows
from paligemma.devices import is_out_of_memory
from paligemma.evaluate.output_folder import fingerprint
from paligemma.files import read_json
from paligemma.inference import PaliGemma, load
from paligemma.train import distributed
from paligemma.train.announcement import announcement, cuts_not_reported
from paligemma.train.batches import Prefetched, RowBatches
from paligemma.train.checks import check_model, check_packages, check_rows
from paligemma.train.loop import NotFinite, train
from paligemma.train.options import TrainOptions
from paligemma.train.results import check_learned, finish, save_model
from paligemma.train.run_folder import (
    FINISHED,
    append_to_log,
    clear,
    fingerprint_of_data,
    is_longer,
    last_checkpoint,
    last_checkpoint_minutes,
    last_checkpoint_step,
    locked_run,
    open_run,
    reopen,
    write_settings,
)
from paligemma.train.setup import (
    compute_dtype_of,
    config_of,
    max_length_of,
    open_rows,
    optimizers_of,
    prepare,
    steps_of,
)
from paligemma.train.tensorboard import TensorBoard
from paligemma.train.validation import check_metric, validation_of
from paligemma.utils import stored_dtype

Say = Callable[[str], None]


def finetune(options: TrainOptions, say: Say | None = None) -> dict[str, Any]:
    """Train, save, measure. Returns the content of `finished.json`: steps, seconds, rows that were skipped, figures ...

    say: is called with each line for the user; default: print it on stderr.

    Called again with the same options it continues where it was interrupted, and does nothing once it has finished.

    ValueError for rows that cannot be trained on (naming them), for options that do not fit together, and for a folder
    that holds a run with others; FloatingPointError, naming step and rows, for a loss that is not finite; OSError when
    something cannot be written: the last good checkpoint stays; ImportError for a package that is missing;
    KeyboardInterrupt after Ctrl-C (SIGTERM: its subclass Terminated), when all is saved.
    """
    check_model(options)
    check_packages(options)
    rank, world = distributed.start()
    say = (lambda line: None) if rank else say or to_stderr
    rows, validation_rows = open_rows(options)
    device = options.device or own_device(world)
    dtype = options.dtype or stored_dtype(options.model, options.revision)  # in which it is saved
    pg = load(options.model, device, dtype, options.quantize, options.revision, options.image_size)

    with locked_run(Path(options.out)) if rank == 0 else nullcontext():
        return run_in_folder(options, pg, rows, validation_rows, say)


def run_in_folder(
    options: TrainOptions, pg: PaliGemma, rows: Rows, validation_rows: Rows | None, say: Say
) -> dict[str, Any]:
    """`finetune` with the model and the rows it works on; on the first process the folder is locked."""
    rank, world = distributed.start()
    out = Path(options.out)
    facts = facts_of(pg, rows, validation_rows) if rank == 0 else {}
    resumed = rank == 0 and open_run(out, asdict(options), facts, options.resume, options.longer)
    resumed = bool(distributed.broadcast(float(resumed)))
    longer = bool(distributed.broadcast(float(rank == 0 and resumed and is_longer(out, asdict(options)))))
    if distributed.broadcast(float(resumed and not longer and (out / FINISHED).is_file())):
        say(
            f"{out} is finished already; --longer with more --steps, --epochs or --minutes trains it further, "
            "--no-resume begins anew, another --out leaves it as it is"
        )
        return read_json(out / FINISHED)

    dtype = pg.model.dtype
    compute_dtype = compute_dtype_of(options, dtype, pg.model.device)
    prepare(pg.model, options)
    optimizers = optimizers_of(pg.model, options)
    steps = steps_of(options, len(rows))
    validation = board = None
    if rank == 0:
        begin(options, pg, rows, validation_rows, facts, steps, resumed, longer, say)
        for line in announcement(options, rows, pg, steps, dtype, compute_dtype):
            say(line)
        board = TensorBoard(out / "tensorboard", last_checkpoint_step(out), say)
        validation = validation_of(options, pg, rows if validation_rows is None else validation_rows, say)
    distributed.barrier()

    batches = RowBatches(
        rows,
        pg.processor,
        options.batch,
        options.seed,
        max_length_of(options, pg.model.config),
        keep_together=options.keep_together,
        max_pixels=options.most_pixels,
        on_skip=None if options.strict else skip_logger(out),
    )
    config = config_of(options, steps, compute_dtype)
    # All processes have to know whether there is validation: they gather a sharded model together.
    if validation_rows is None or not distributed.broadcast(float(validation is not None)):
        config = replace(config, validate_every=0)
    with explained(out, batches):
        with cuts_not_reported(), Prefetched(batches, steps, world) as prefetched:
            last = train(
                pg.model,
                prefetched,
                config,
                out,
                optimizers=optimizers,
                validate=validation or (lambda model, step: {}),
                on_log=board,
                resume=resumed,
            )
        if rank:
            return last
        check_learned(out)
        save_model(pg, options, out, dtype)
        if board is not None:
            board.close()
        return finish(options, pg, out, validation, say)


def begin(
    options: TrainOptions,
    pg: PaliGemma,
    rows: Rows,
    validation_rows: Rows | None,
    facts: dict[str, Any],
    steps: int,
    resumed: bool,
    longer: bool,
    say: Say,
) -> None:
    """On the first process: check what has not been checked, and make the folder ready."""
    out = Path(options.out)
    if resumed:
        made = last_checkpoint_step(out)
        if longer and made >= steps:
            raise ValueError(f"{out} has made {made:,} steps already, and {steps:,} are no more: nothing is left to do")
        if longer and options.minutes is not None and (spent := last_checkpoint_minutes(out)) >= options.minutes:
            raise ValueError(
                f"{out} has trained for {spent:.3g} minutes already, and {options.minutes:g} are no more: nothing is "
                "left to do"
            )
        if longer:
            reopen(out, asdict(options), facts)
            say(f"longer than before: from step {made:,} on the learning rate follows the schedule of the new length")
        say(f"going on in {out}: {last_checkpoint(out)}")
    else:
        for each in (rows, validation_rows):
            if each is not None:
                most_tokens = max_length_of(options, pg.model.config)
                check_rows(each, pg, most_tokens, options.most_pixels, options.strict, say)
        if validation_rows is not None:
            check_metric(options, pg, validation_rows)
        if not options.resume:
            clear(out)  # not before everything is checked: a command that is refused changes nothing
        write_settings(out, asdict(options), facts)
    if options.shard and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        say("note: --shard splits the weights among processes, and there is only one")


def facts_of(pg: PaliGemma, rows: Rows, validation_rows: Rows | None) -> dict[str, Any]:
    """What the options stood for when a run began, whatever the files are called."""
    facts = {"data": fingerprint_of_data(rows), "weights": fingerprint(pg)}
    return facts if validation_rows is None else {**facts, "validation data": fingerprint_of_data(validation_rows)}


def own_device(world: int) -> str | None:
    """Each process its own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world > 1 and torch.cuda.is_available() else None


def skip_logger(out: Path) -> Callable[[int, str, Exception], None]:
    """For `RowBatches(on_skip=)`. The entry belongs to its step, so that a run that is resumed counts each row once."""

    def skip(step: int, source: str, error: Exception) -> None:
        to_stderr(f"skipped {source}: {error}")
        append_to_log(out, {"step": step + 1, "skipped": source, "error": str(error), "time": time.time()})

    return skip


@contextmanager
def explained(out: Path, batches: RowBatches) -> Iterator[None]:
    """An error that ends the run says what is left of it and how to continue."""
    try:
        yield
    except NotFinite as error:
        named = ", ".join(batches.sources(error.step))
        raise FloatingPointError(
            f"{error}. Its rows: {named}; {last_checkpoint(out)}; begin anew with a lower --lr, or "
            "without these rows if it is their fault"
        ) from None
    except KeyboardInterrupt as stop:
        raise type(stop)(
            f"{str(stop) or 'stopped at once: ' + last_checkpoint(out)}; the same command goes on from there"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'}); {last_checkpoint(out)}. "
            "--accumulate, --checkpoint-gradients, --lora and a smaller --batch or --max-length need less; --plan says "
            "how much"
        ) from error
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        for half in (out / "checkpoints").glob("*.part"):
            shutil.rmtree(half, ignore_errors=True)
        raise OSError(
            errno.ENOSPC, f"the disk is full ({out}); {last_checkpoint(out)}: make room, then the same command goes on"
        ) from error


def is_full(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    text = str(error).lower()
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "no space left" in text or "file too large" in text


def to_stderr(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
