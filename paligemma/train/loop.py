"""The training loop: the same for fine-tuning an official checkpoint and for the model that ships.

    batches = RowBatches(rows, pg.processor, batch_size=32)
    train(pg.model, batches, TrainConfig(steps=1000, lr=1e-5), out="runs/mine")

Run the same line again after an interruption and it goes on where it was, with the losses it would have had. Under
`torchrun --nproc-per-node N` every process takes its part of each batch, and with `shard` keeps only its part of the
model as well.

What is unusual:
- a batch is a function of the step (`batches(step, part, parts)`), and so is what dropout draws: resuming needs
  neither a sampler's state nor a generator's;
- parts of a batch add up *sums* of losses and gradients, and the total is divided by the number of answer tokens of
  the whole batch. The mean of the means of parts would weigh short answers more; so accumulation and processes change
  nothing;
- the loss is computed on answer tokens alone: the head is 257,216 wide, and on every position it would need more
  memory than everything else together.

Follows the fine-tuning recipe of big_vision (`configs/proj/paligemma/transfers`): Adam, clipping at 1, 5% warm-up,
cosine to 0.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import rich.console
import rich.progress
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.devices import multiplies_bfloat16
from paligemma.files import write_text
from paligemma.train import checkpointing, distributed, sharding
from paligemma.train.batches import Batch
from paligemma.train.optimizer import decays_in_reference
from paligemma.train.run_folder import LOG, append_to_log, read_log
from paligemma.train.schedule import SCHEDULES, learning_rate_factor


def bfloat16_where_fast() -> torch.dtype | None:
    """For `TrainConfig.autocast` on a CPU: bfloat16, or None (float32) where it has no fast products of it."""
    return torch.bfloat16 if multiplies_bfloat16() else None


class NotFinite(FloatingPointError):
    """A loss or gradient that is no number, in step `step` (counted from 0)."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} of step {step} is {value}: try a lower learning rate")
        self.step = step


class Batches(Protocol):
    def __call__(self, step: int, part: int, parts: int) -> Batch | None: ...


# (model, batch) -> sum of the losses, how many tokens (or what else it is the sum of), and figures for the log, sums
# too
LossFunction = Callable[[Any, Batch], tuple[Tensor, float, dict[str, float]]]


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    lr: float = 1e-5
    vision_lr: float = 1.0  # the vision tower's share of it
    warmup: float = 0.05  # share of all steps
    schedule: str = "cosine"  # to 0 at the end; or "linear", "constant"
    decay_from: float = 0.0  # share of all steps at which "cosine" and "linear" begin to fall
    weight_decay: float = 0.0  # as torch's AdamW: times the learning rate, whatever `vision_lr`
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0  # of the gradient's norm
    accumulate: int = 1  # pieces in which each process works through its part of a batch
    label_smoothing: float = 0.0  # the reference's s: the true token gets 1 - s
    autocast: torch.dtype | None = torch.bfloat16  # of the matrix products; parameters keep their own
    ema: float = 0.0  # decay of a running average of the parameters; 0: none
    seed: int = 0
    save_every: float = 120.0  # seconds
    log_every: int = 10  # steps
    validate_every: int = 0  # steps; 0: only at the end
    validate_last: bool = True  # at the end too
    minutes: float | None = None  # a budget of time: the schedule and the run end with it, if not with the steps
    shard: bool = False  # each of several processes keeps its part of weights, gradients and optimizer (`sharding.py`)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}")
        if self.minutes is not None and self.minutes <= 0:  # the share of it that is spent would never reach 1
            raise ValueError(f"minutes must be more than 0, got {self.minutes:g}")


def suffix_loss(label_smoothing: float = 0.0) -> LossFunction:
    """The prefix-LM loss: cross-entropy of every suffix token and the end, given all before it."""

    def loss(model: Any, batch: Batch) -> tuple[Tensor, float, dict[str, float]]:
        targets = batch["labels"][:, 1:]
        labelled = targets != -100
        first = int(labelled.any(0).int().argmax())  # position that predicts anything; 0 if none does
        hidden = model.read(
            batch["input_ids"],
            **vision_inputs(model, batch),
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            num_outputs=batch["labels"].shape[1] - first,
        )
        targets, labelled = targets[:, first:], labelled[:, first:]
        logits = model.logits(hidden[:, :-1][labelled]).float()  # [tokens, V]
        targets = targets[labelled]
        # The reference shares s among the *other* V - 1 tokens, torch shares it among all V.
        V = logits.shape[-1]
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing * V / (V - 1))
        right = float((logits.argmax(-1) == targets).sum())
        return total, float(len(targets)), {"accuracy": right}

    return loss


def vision_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The pictures of a batch for `model.forward`. One that several rows see is encoded once, and its gradient is the
    sum of theirs."""
    if "pictures" not in batch:
        return {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}
    if distributed.is_sharded(next(model.parameters())):  # whose weights are not there outside of `forward`
        return {"pixel_values": batch["pixel_values"][batch["pictures"]]}
    features = model.encode_image(batch["pixel_values"])  # [pictures, P, D]
    return {"image_features": features.index_select(0, batch["pictures"])}


def decayed_apart(
    model: nn.Module, weight_decay: float, lr: float = 1e-5, vision_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW with weight decay as in the reference (`optimizer.decays_in_reference`).

    vision_lr: the vision tower's share of the learning rate. It decays as without it: there decay is added to the step
    behind its `lr_mults`. Torch multiplies it with the group's own rate, so here it is divided by the share.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = vision_lr if name.startswith("vision_tower") else 1.0
            groups.setdefault((decays_in_reference(name, parameter), share), []).append(parameter)
    return [
        {"params": group, "lr": lr * share, "weight_decay": weight_decay / share if decays else 0.0}
        for (decays, share), group in groups.items()
    ]


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    loss: LossFunction | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    validate: Callable[[nn.Module, int], dict[str, Any]] | None = None,
    resume: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train `model` in place; returns what was last logged.

    batches:    see `Batches`; None for a part that has nothing to do.
    out:        folder for `checkpoints/` and `log.jsonl` (one line every `log_every` steps).
    loss:       default `suffix_loss`.
    optimizers: with their peak learning rates; default AdamW as in the reference.
    validate:   is called with the model (averaged, if `ema`) in evaluation mode; its figures go to the log.
    resume:     go on from the last checkpoint in `out`, if there is one; otherwise what is there is removed.
    on_log:     is called with everything that goes to the log, on the first process.

    Checkpoints hold what is trained; frozen parameters are as the caller has them, also when a run goes on.
    With `shard` the model is whole again on the first process when `validate` is called and at the end; elsewhere, and
    after an exception, it has no weights left. A run may go on with another number of processes.
    Ctrl-C (or SIGTERM) finishes the step, saves and raises KeyboardInterrupt; a second one stops at once.

    Raises NotFinite at the first loss or gradient that is not a finite number; the last checkpoint is from
    before it.
    """
    out = Path(out)
    rank, world = distributed.start()
    device = next(model.parameters()).device
    whole, shard = model, config.shard and world > 1
    if shard:
        if optimizers is not None:
            raise ValueError("optimizers of your own hold the parameters of the whole model: leave them out, or shard")
        model = sharding.shard(model)  # type: ignore[arg-type]  # says so if it is another model
    loss = loss or suffix_loss(config.label_smoothing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizers is None:
        groups = decayed_apart(model, config.weight_decay, config.lr, config.vision_lr)
        optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8)]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = {name: value.clone() for name, value in trained_state(model).items()} if config.ema else None

    step, elapsed, last = 0, 0.0, {}
    sums: dict[str, float] = {}
    mesh = sharding.mesh_of(model) if shard else None
    state = checkpointing.load_last(out / "checkpoints", mesh) if resume else None
    if state is not None:
        load_trained(model, state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        if average is not None and state["average"] is not None:
            average = {name: value.to(device) for name, value in state["average"].items()}
        step, elapsed, sums = state["step"], state["elapsed"], state.get("sums", {})
        state = None  # a second copy of the weights
    elif rank == 0 and not resume:
        (out / LOG).unlink(missing_ok=True)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if not shard:
        distributed.broadcast_weights(model)
    log = Log(out, step, on_log) if rank == 0 else None

    def save(finished: bool = False) -> None:
        values = [optimizer.state_dict() for optimizer in optimizers]  # on all ranks: a sharded one gathers here
        if rank == 0 or shard:
            state = {
                "model": trained_state(model),
                "optimizers": values,
                "average": average,
                "sums": sums,  # since the last entry of the log
                "step": step,
                "elapsed": elapsed + time.monotonic() - begun,
                "finished": finished,
            }
            checkpointing.save(out / "checkpoints", step, state)

    def look(step: int) -> dict[str, Any]:
        assert validate is not None
        if not shard:
            return validated(model, average, validate, step, log) if rank == 0 else {}
        sharding.gather(model, whole, average)
        figures = validated(whole, None, validate, step, log) if rank == 0 else {}
        sharding.empty(whole)
        return figures

    begun = saved = logged = ended = time.monotonic()
    pace = 0.0  # tokens a second, lately
    model.train()
    with progress_bar(rank) as bar, stop_signals() as asked_to_stop:
        task = bar.add_task("training", total=1000, completed=1000 * step // config.steps, note="")
        while step < config.steps:
            progress = step / config.steps
            if config.minutes is not None:
                spent = (elapsed + time.monotonic() - begun) / 60
                progress = distributed.broadcast(max(progress, spent / config.minutes))
                if progress >= 1:
                    break
            factor = learning_rate_factor(progress, config)
            for optimizer, lrs in zip(optimizers, peaks):
                optimizer.zero_grad(set_to_none=True)
                for group, lr in zip(optimizer.param_groups, lrs):
                    group["lr"] = lr * factor
            here = add_gradients(model, batches, loss, config, step, rank, world)
            here["stop"] = float(asked_to_stop())
            here = distributed.all_reduce_figures(here)
            if not math.isfinite(here["loss"]):
                raise NotFinite("loss", here["loss"], step)
            stop, tokens = here.pop("stop"), here.pop("tokens")
            norm = 0.0
            if here["weight"]:  # otherwise no row of this step could be read, and nothing is learned
                norm = divide_and_clip(trained, here["weight"], config.clip)
                if not math.isfinite(norm):
                    raise NotFinite("gradient", norm, step)
                for optimizer in optimizers:
                    optimizer.step()
            here["gradient"] = here["weight"] * norm
            step += 1
            if average is not None:
                update_average(average, model, min(config.ema, step / (step + 10)))

            for name, value in here.items():
                sums[name] = sums.get(name, 0.0) + value
            now = time.monotonic()
            pace = tokens / (now - ended) if not pace else 0.9 * pace + 0.1 * tokens / (now - ended)
            if (step % config.log_every == 0 or step == config.steps) and sums["weight"]:
                last = {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
                last |= {"step": step, "weight": sums["weight"], "lr": factor, "seconds": now - logged}
                last |= {"tokens_per_second": pace} if pace else {}
                sums, logged = {}, now
                if log is not None:
                    log.write(last | {"time": time.time()})
            average_loss = here["loss"] / max(here["weight"], 1e-9)
            known = f"/{config.steps}" if config.minutes is None else ""
            bar.update(
                task,
                completed=1000 * max(progress, step / config.steps),
                note=f"step {step}{known}  loss {average_loss:.3f}  {pace:,.0f} tokens/s",
            )
            # Before saving: a run that is killed in between makes it up.
            due = bool(config.validate_every) and step % config.validate_every == 0 and step < config.steps
            if validate and due:
                before = time.monotonic()
                last |= look(step)
                logged += time.monotonic() - before  # no time of training
            if stop or distributed.broadcast(now - saved) > config.save_every:
                save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step}, which is saved")
            ended = time.monotonic()
    save(finished=True)
    if average is not None:
        load_trained(model, average)
        average = None
    if shard:
        sharding.gather(model, whole)
    if validate and rank == 0 and config.validate_last:
        last |= validated(whole, None, validate, step, log)
    return last


def add_gradients(
    model: nn.Module, batches: Batches, loss: LossFunction, config: TrainConfig, step: int, rank: int, world: int
) -> dict[str, float]:
    """Forward and backward through this process's parts of a step, which adds to the gradients. Returns the sums over
    these parts of the loss and its figures, of its weight and of all tokens."""
    first = next(model.parameters())
    device, shard = first.device, distributed.is_sharded(first)
    sums: dict[str, float] = {"loss": 0.0, "weight": 0.0, "tokens": 0.0}
    for piece in range(config.accumulate):
        part = rank + piece * world
        batch = batches(step, part, config.accumulate * world)
        if batch is None and not shard:
            continue
        batch = batch or sharding.nothing()
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1_009 + part) % 2**63)
        if "attention_mask" in batch:
            sums["tokens"] += float(batch["attention_mask"].sum())
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, config.autocast, enabled=config.autocast is not None):
            total, weight, figures = loss(model, batch)
        total.backward()
        for name, value in {"loss": float(total.detach()), "weight": weight, **figures}.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def divide_and_clip(trained: Sequence[nn.Parameter], weight: float, most: float) -> float:
    """Of the gradients' sums over all processes their mean, and that with a norm of at most `most`. Returns the norm
    of the mean."""
    distributed.all_reduce_gradients(trained)
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= weight
    return distributed.clip(trained, most)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without frozen parameters, and without what bitsandbytes puts there beside them."""
    changing = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value.detach() for name, value in model.state_dict().items() if name in changing}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """What `trained_state` gave. ValueError if it is of a model of which other parts are trained."""
    differing = set(trained_state(model)) ^ set(state)
    if differing:
        name = min(differing)
        there = "has" if name in state else "lacks"
        raise ValueError(f"the checkpoint {there} {name}, unlike this model: other parts of it were trained")
    model.load_state_dict(state, strict=False)


def update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in trained_state(model).items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def validated(
    model: nn.Module,
    average: dict[str, Tensor] | None,
    validate: Callable[[nn.Module, int], dict[str, Any]],
    step: int,
    log: Log | None,
) -> dict[str, Any]:
    """What `validate` says of the averaged model, or of the model itself; goes to the log."""
    own = {name: value.clone() for name, value in trained_state(model).items()} if average is not None else None
    if average is not None:
        load_trained(model, average)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            figures = validate(model, step)
    finally:
        model.train(training)
        if own is not None:
            load_trained(model, own)
    if log is not None:
        log.write({"step": step, "validation": figures, "time": time.time()})
    return figures


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed (or SIGTERM came). A second one stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there signals may be handled
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """One JSON object a line. What a resumed run will write again is cut off first."""

    def __init__(self, out: Path, step: int, on_log: Callable[[dict[str, Any]], None] | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.on_log = out, on_log
        if (out / LOG).exists():
            kept = [entry for entry in read_log(out) if entry["step"] <= step]
            write_text(out / LOG, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: dict[str, Any]) -> None:
        append_to_log(self.out, entry)
        if self.on_log is not None:
            self.on_log(entry)


def progress_bar(rank: int) -> rich.progress.Progress:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(file=sys.stderr)
    return rich.progress.Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal)
