"""The training loop: the same for fine-tuning an official checkpoint and for the model that ships.

    batches = RowBatches(rows, pg.processor, batch_size=32)
    train(pg.model, batches, TrainConfig(steps=1000, lr=1e-5), out="runs/mine")

Run the same lines again after an interruption and training continues where it was, with the losses it would have had.
Under `torchrun --nproc-per-node N` every process works on its part of each batch, and with `shard` it holds only its
part of the model as well.

What is unusual:
- a batch is a function of the step (`batches(step, part, parts)`), and so are the random numbers of dropout. Resuming
  needs no state of a sampler or a generator;
- the parts of a batch add up *sums* of losses and gradients, and the total is divided by the number of answer tokens in
  the whole batch. A mean of means would weigh short answers more. So neither accumulation nor the number of processes
  changes the result;
- the loss is computed on answer tokens only (`loss.py`).

Follows the fine-tuning recipe of big_vision (`configs/proj/paligemma/transfers`): Adam, clipping at 1, 5% warm-up,
cosine to 0.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paligemma.train import checkpointing, distributed, sharding
from paligemma.train.batches import Batch
from paligemma.train.interruption import stop_signals
from paligemma.train.loss import LossFunction, suffix_loss
from paligemma.train.optimizer import adamw
from paligemma.train.progress import Log, progress_bar
from paligemma.train.run_folder import LOG
from paligemma.train.schedule import SCHEDULES, learning_rate_factor


class Batches(Protocol):
    def __call__(self, step: int, part: int, parts: int) -> Batch | None: ...


Validate = Callable[[nn.Module, int], dict[str, Any]]


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    loss: LossFunction | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    validate: Validate | None = None,
    resume: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train `model` in place; returns the last entry of the log.

    batches:    see `Batches`; None for a part that has nothing to do.
    out:        folder for `checkpoints/` and `log.jsonl` (one line every `log_every` steps).
    loss:       default `suffix_loss`.
    optimizers: with their peak learning rates; default AdamW as in the reference.
    validate:   is called with the model (averaged, if `ema`) in evaluation mode; its figures go to the log.
    resume:     continue from the last checkpoint in `out`, if there is one; otherwise old checkpoints are removed.
    on_log:     is called with every entry of the log, on the first process.

    Checkpoints hold what is trained. Frozen parameters are the caller's, also when a run continues.
    With `shard` the model is whole again on the first process when `validate` is called and at the end. On the others,
    and after an exception, it has no weights left. A run may continue with another number of processes.
    Ctrl-C (or SIGTERM) finishes the step, saves and raises KeyboardInterrupt; a second Ctrl-C stops at once.

    Raises NotFinite at the first loss or gradient that is not a finite number; the last checkpoint is from before it.
    """
    run = Run(model, config, Path(out), loss, optimizers, validate, resume, on_log)
    with progress_bar(run.rank) as show_progress, stop_signals() as stop_requested:
        while (progress := run.progress()) < 1:
            rate = run.set_learning_rates(progress)
            sums = run.compute_gradients(batches, stop_requested)
            run.update_weights(sums)
            run.log_step(sums, rate)
            show_progress(run.progress_of_steps(progress), run.note)
            if run.validation_is_due():
                run.validate_now()
            if run.stopping or run.checkpoint_is_due():
                run.save()
            if run.stopping:
                raise KeyboardInterrupt(f"stopped after step {run.step}, which is saved")
            run.step_ended = time.monotonic()
    return run.finish()


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
    processor_time: bool = False  # count the minutes of the processor: on a busy machine a run then lasts longer
    shard: bool = False  # each of several processes keeps its part of weights, gradients and optimizer (`sharding.py`)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}")
        # Comparisons are written so that NaN is refused: with it every comparison is false.
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr:g}, expected a number above 0")
        if not 0 < self.vision_lr <= 1:
            raise ValueError(f"vision_lr is {self.vision_lr:g}, expected a share in (0, 1]")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema:g}, expected a share in [0, 1)")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip:g}, expected a number above 0 (infinity: gradients are not clipped)")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}, expected at least 1")
        if self.minutes is not None and not self.minutes > 0:  # the share of it that is spent would never reach 1
            raise ValueError(f"minutes must be more than 0, got {self.minutes:g}")


class NotFinite(FloatingPointError):
    """A loss or gradient that is not a finite number.

    step: in which, counted from 0 as in `batches(step, part, parts)`. The message counts from 1, as the log does.
    """

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} of step {step + 1} is {value}: try a lower learning rate")
        self.step = step


class Run:
    """What a run knows between two steps, and the parts of a step, in the order of `train`."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        out: Path,
        loss: LossFunction | None,
        optimizers: Sequence[torch.optim.Optimizer] | None,
        validate: Validate | None,
        resume: bool,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.config, self.out, self.validate = config, out, validate
        self.rank, self.world = distributed.start()
        self.whole, self.sharded = model, config.shard and self.world > 1
        if self.sharded:
            if optimizers is not None:
                raise ValueError(
                    "optimizers of your own hold the parameters of the whole model: leave them out, or shard"
                )
            model = sharding.shard(model)  # type: ignore[arg-type]  # says so if it is another model
        self.model = model
        self.loss = loss or suffix_loss(config.label_smoothing)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if optimizers is None:
            optimizers = [adamw(model, config.weight_decay, config.lr, config.vision_lr, config.betas)]
        self.optimizers = optimizers
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.average: dict[str, Tensor] | None = None

        self.step = 0
        self.elapsed = 0.0  # seconds of the run before this process
        self.sums: dict[str, float] = {}  # since the last entry of the log
        self.last: dict[str, Any] = {}  # that entry
        self.pace = 0.0  # tokens a second, a running mean
        self.stopping, self.note = False, ""
        if resume:
            self._load_checkpoint()
        elif self.rank == 0:
            (out / LOG).unlink(missing_ok=True)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        if not self.sharded:
            distributed.broadcast_weights(model)
        if config.ema and self.average is None:  # not before all processes have the same weights
            self.average = {name: value.clone() for name, value in trained_state(model).items()}
        self.log = Log(out, self.step, on_log) if self.rank == 0 else None
        distributed.barrier()  # another process's skipped row, written while the log is made, would be lost
        self.saved = self.logged = self.step_ended = time.monotonic()
        self.clock = time.process_time if config.processor_time else time.monotonic
        self.began = self.clock()
        model.train()

    def _load_checkpoint(self) -> None:
        mesh = sharding.mesh_of(self.model) if self.sharded else None
        state = checkpointing.load_last(self.out / "checkpoints", mesh)
        if state is None:
            return
        load_trained(self.model, state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        if self.config.ema and state["average"] is not None:
            device = next(self.model.parameters()).device
            self.average = {name: value.to(device) for name, value in state["average"].items()}
        self.step, self.elapsed, self.sums = state["step"], state["elapsed"], state.get("sums", {})

    def progress(self) -> float:
        """The share of the run that is done: of its steps or of its minutes, whichever is larger."""
        progress = self.step / self.config.steps
        if self.config.minutes is None:
            return progress
        minutes = (self.elapsed + self.clock() - self.began) / 60
        return distributed.broadcast(max(progress, minutes / self.config.minutes))  # clocks differ

    def progress_of_steps(self, progress: float) -> float:
        """`progress`, with the step that has just been made."""
        return max(progress, self.step / self.config.steps)

    def set_learning_rates(self, progress: float) -> float:
        """Returns what the peak rates are multiplied by."""
        factor = learning_rate_factor(progress, self.config)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
        return factor

    def compute_gradients(self, batches: Batches, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Forward and backward. Returns the sums over all processes: of the loss, its weight (the number of answer
        tokens), the loss function's own figures, and all tokens. Whether to stop is agreed on in the same message."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums = add_gradients(self.model, batches, self.loss, self.config, self.step, self.rank, self.world)
        sums = distributed.all_reduce_figures({**sums, "stop": float(stop_requested())})
        if not math.isfinite(sums["loss"]):
            raise NotFinite("loss", sums["loss"], self.step)
        self.stopping = bool(sums.pop("stop"))
        return sums

    def update_weights(self, sums: dict[str, float]) -> None:
        """The optimizers' step, with the mean of the gradients, clipped. Without any readable row nothing is learned.
        Adds the gradient's norm to the sums, weighted as they are."""
        norm = 0.0
        if sums["weight"]:
            norm = divide_and_clip(self.trained, sums["weight"], self.config.clip)
            if not math.isfinite(norm):
                raise NotFinite("gradient", norm, self.step)
            for optimizer in self.optimizers:
                optimizer.step()
        sums["gradient"] = sums["weight"] * norm
        self.step += 1
        if self.average is not None:
            update_average(self.average, self.model, min(self.config.ema, self.step / (self.step + 10)))

    def log_step(self, sums: dict[str, float], rate: float) -> None:
        """Count a step, and write to the log every `log_every` steps."""
        now = time.monotonic()
        pace = sums.pop("tokens") / (now - self.step_ended)
        self.pace = 0.9 * self.pace + 0.1 * pace if self.pace else pace
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        steps = self.config.steps
        if (self.step % self.config.log_every == 0 or self.step == steps) and self.sums["weight"]:
            weight = self.sums["weight"]
            self.last = {name: value / weight for name, value in self.sums.items() if name != "weight"}
            self.last |= {"step": self.step, "weight": weight, "lr": rate, "seconds": now - self.logged}
            self.last |= {"tokens_per_second": self.pace} if self.pace else {}
            self.sums, self.logged = {}, now
            if self.log is not None:
                self.log.write(self.last | {"time": time.time()})
        loss = sums["loss"] / max(sums["weight"], 1e-9)
        of = f"/{steps}" if self.config.minutes is None else ""
        self.note = f"step {self.step}{of}  loss {loss:.3f}  {self.pace:,.0f} tokens/s"

    def validation_is_due(self) -> bool:
        """Before saving: a run that is killed between the two validates again."""
        every = self.config.validate_every
        return self.validate is not None and bool(every) and self.step % every == 0 and self.step < self.config.steps

    def validate_now(self) -> None:
        before = time.monotonic()
        if self.sharded:
            sharding.gather(self.model, self.whole, self.average)
            self.last |= self._validated(self.whole, None)
            sharding.empty(self.whole)
        else:
            self.last |= self._validated(self.model, self.average)
        self.logged += time.monotonic() - before  # which is no time of training

    def _validated(self, model: nn.Module, average: dict[str, Tensor] | None) -> dict[str, Any]:
        if self.validate is None or self.rank:
            return {}
        return validated(model, average, self.validate, self.step, self.log)

    def checkpoint_is_due(self) -> bool:
        return distributed.broadcast(time.monotonic() - self.saved) > self.config.save_every

    def save(self, finished: bool = False) -> None:
        values = [optimizer.state_dict() for optimizer in self.optimizers]  # on all ranks: a sharded one gathers here
        if self.rank == 0 or self.sharded:
            state = {
                "model": trained_state(self.model),
                "optimizers": values,
                "average": self.average,
                "sums": self.sums,
                "step": self.step,
                "elapsed": self.elapsed + self.clock() - self.began,
                "finished": finished,
            }
            checkpointing.save(self.out / "checkpoints", self.step, state)
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Save, leave the (averaged) weights in the caller's model, and validate them."""
        self.save(finished=True)
        if self.average is not None:
            load_trained(self.model, self.average)
            self.average = None
        if self.sharded:
            sharding.gather(self.model, self.whole)
        if self.config.validate_last:
            self.last |= self._validated(self.whole, None)
        return self.last


def add_gradients(
    model: nn.Module, batches: Batches, loss: LossFunction, config: TrainConfig, step: int, rank: int, world: int
) -> dict[str, float]:
    """Forward and backward through this process's parts of a step; gradients are added to those of the parts before.
    Returns sums over these parts: of the loss and its figures, of its weight, and of all tokens."""
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
    """Sum the gradients over all processes, divide them by the weight, and clip them to a norm of at most `most`.
    Returns the norm before clipping."""
    distributed.all_reduce_gradients(trained)
    gradients = [distributed.own_rows(parameter.grad) for parameter in trained if parameter.grad is not None]
    norm = distributed.norm(gradients, any(map(distributed.is_sharded, trained))) / weight
    scale = min(1.0, most / (norm + 1e-6)) / weight  # once over all gradients, not once for each of the two
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without frozen parameters, and without what bitsandbytes adds beside them."""
    changing = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value.detach() for name, value in model.state_dict().items() if name in changing}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `trained_state` returned. ValueError if it is from a model of which other parts were trained."""
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
    """The figures of the averaged model (or of the model itself, without an average), which also go to the log."""
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
