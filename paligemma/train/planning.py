"""The plan of a run's memory, from its options: what `paligemma train --plan` prints.

Only the model's configuration and the lengths of all rows are read; weights are neither loaded nor downloaded. Rows are
not sampled, since the longest one decides, however rare it is.
"""

from __future__ import annotations

import os

import torch
from rich.console import Console

from paligemma.data.lengths import Lengths
from paligemma.data.rows import Rows
from paligemma.devices import pick_device
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.train.checks import check_model
from paligemma.train.options import TrainOptions
from paligemma.train.plan import Plan, estimate
from paligemma.train.setup import compute_dtype_of, max_length_of, rows_of
from paligemma.weights.finding import find_settings, tokenizer_in
from paligemma.weights.loading import config_at_image_size, default_dtype, parse_dtype
from paligemma.weights.opening import open_checkpoint


def plan_of(options: TrainOptions) -> Plan:
    """ValueError as in `finetune` for options, and for the first row whose length cannot be told."""
    check_model(options)
    # Training folds an adapter into its base, whose weights all learn.
    path, folders = find_settings(options.model, options.revision, options.dtype)
    try:
        checkpoint = open_checkpoint(path)
        config, dtype = checkpoint.config, default_dtype(checkpoint)
    except FileNotFoundError:  # of a hub id only the settings are here
        config, dtype = PaliGemmaConfig.from_pretrained(path), torch.bfloat16
    if options.image_size is not None:
        config = config_at_image_size(config, options.image_size)
    dtype = parse_dtype(options.dtype) or dtype
    device = pick_device(options.device)
    compute_dtype = compute_dtype_of(options, dtype, device)
    rows = rows_of(options, options.training_data)
    processor = PaliGemmaProcessor.for_config(tokenizer_in(folders), config)
    return estimate(
        config,
        batch=options.batch,
        **sizes_of(rows, processor, max_length_of(options, config)),
        accumulate=options.accumulate,
        freeze=options.freeze,
        lora=options.lora,
        rank=options.rank,
        lora_dropout=options.lora_dropout,
        quantize=options.quantize,
        dropout=options.dropout,
        stored=compute_dtype if options.lora else torch.float32,
        compute=compute_dtype,
        optimizer=options.optimizer,
        checkpoint_gradients=options.checkpoint_gradients,
        ema=bool(options.ema),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        shard=options.shard,
        cpu=device.type == "cpu",
    )


def sizes_of(rows: Rows, processor: PaliGemmaProcessor, max_length: int) -> dict[str, int]:
    """The lengths that `estimate` asks for."""
    lengths = Lengths(processor)
    length = answer = images = 0
    shortest_prefix = max_length
    with Console(stderr=True).status(f"measuring {len(rows):,} rows"):
        for row in rows:
            prefix, suffix = lengths(row)
            if prefix >= max_length:
                raise ValueError(
                    f"{row.source}: pictures and prompt take {prefix} tokens, and {max_length} is the most"
                )
            suffix = min(suffix, max_length - prefix)
            length, answer = max(length, prefix + suffix), max(answer, suffix)
            images, shortest_prefix = max(images, len(row.pictures)), min(shortest_prefix, prefix)
    return {"length": length, "answer": answer, "images": images, "shortest_prefix": shortest_prefix}
