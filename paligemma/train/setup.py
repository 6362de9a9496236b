"""From options to what the training loop needs: rows, a model of which the right parts learn, optimizers, settings.

Precision: what learns is kept in float32, whatever is computed in. A small step would be lost in the eight significant
bits of bfloat16: a weight of 0.02 does not change when 1e-5 is added. The dtype of the matrix products is that of the
checkpoint; on a CPU without fast bfloat16 products it is float32, unless `dtype` asks for bfloat16 by name. The model
is saved in the dtype it was loaded in.

Learning rates: one that suits a new head is too high for a vision tower trained on a billion pictures, so the tower can
have a smaller one (`vision_lr`). Muon takes AdamW's learning rate for the matrices of hidden layers, LoRA's thin ones
included. The rest (embedding, norms, biases) is trained by AdamW at a third of it, as the embedded model was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from paligemma.allocator import give_back_freed_memory, keep_freed_memory
from paligemma.data.checkpoint import codec_of
from paligemma.data.options import DataOptions
from paligemma.data.rows import Rows
from paligemma.devices import multiplies_bfloat16
from paligemma.fast.swap import is_quantized
from paligemma.train import parts
from paligemma.train.loop import TrainConfig
from paligemma.train.optimizer import muon_and_adamw
from paligemma.train.options import TrainOptions

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaConfig

UNLIMITED = 10**9  # steps of a run that only its minutes end


def open_rows(options: TrainOptions) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those for validation."""
    validation = options.validation_data
    return rows_of(options, options.training_data), rows_of(options, validation) if validation is not None else None


def rows_of(options: TrainOptions, data: DataOptions) -> Rows:
    """ValueError if there are none."""
    rows = data.open(codec_of(options.model, options.revision, options.kind))
    if not len(rows):
        raise ValueError(f"{data.data} has no rows")
    return rows


def max_length_of(options: TrainOptions, config: PaliGemmaConfig) -> int:
    """The most tokens that a row may have. ValueError for more than the model has positions."""
    positions = config.text_config.max_position_embeddings
    if options.max_length is not None and options.max_length > positions:
        raise ValueError(f"max_length is {options.max_length:,}, but the model has {positions:,} positions")
    return options.max_length or positions


def steps_of(options: TrainOptions, rows: int) -> int:
    if options.steps is not None:
        return options.steps
    if options.epochs is None and options.minutes is not None:
        return UNLIMITED
    return max(1, math.ceil((options.epochs or 1.0) * rows / options.batch))


def compute_dtype_of(options: TrainOptions, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of the matrix products of a model that was loaded in `dtype`: see above. Weights that bitsandbytes has
    rounded keep the dtype they were loaded in."""
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16(device)
    return torch.float32 if slow and options.dtype is None and options.quantize is None else dtype


def prepare(model: Any, options: TrainOptions) -> None:
    """Choose which weights learn, and how."""
    if is_quantized(model) and not options.lora:
        raise ValueError(
            f"{options.model} has rounded weights, which cannot learn: begin with the checkpoint that it was made of"
        )
    torch.manual_seed(options.seed)  # for LoRA's initial weights
    if options.lora:
        if not options.quantize:
            model.to(compute_dtype_of(options, model.dtype, model.device))
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
        if parts.is_small(model):
            keep_freed_memory()
        else:
            give_back_freed_memory()


def optimizers_of(model: Any, options: TrainOptions) -> list[torch.optim.Optimizer] | None:
    """None stands for AdamW as in the reference, which the loop makes itself."""
    if options.optimizer == "adamw":
        return None
    return muon_and_adamw(
        model,
        options.peak_lr,
        options.peak_lr_beside_muon,
        options.weight_decay,
        slower=("vision_tower", options.vision_lr),
        decay_as_reference=True,
    )


def config_of(options: TrainOptions, steps: int, compute_dtype: torch.dtype) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=options.peak_lr,
        vision_lr=options.vision_lr,
        warmup=options.warmup,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        clip=options.clip,
        accumulate=options.accumulate,
        label_smoothing=options.label_smoothing,
        autocast=compute_dtype if compute_dtype != torch.float32 else None,
        ema=options.ema,
        seed=options.seed,
        save_every=options.save_every,
        log_every=1,
        validate_every=options.validate_every,
        validate_last=False,  # done once the model is as it is saved
        minutes=options.minutes,
        shard=options.shard,
    )
