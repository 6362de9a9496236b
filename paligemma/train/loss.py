"""The loss of fine-tuning: cross-entropy of the answer's tokens, each predicted from all that stands before it.

It is computed at the positions of the answer only. The head is 257,216 wide: on every position its logits would need
more memory than everything else together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from paligemma.train import distributed
from paligemma.train.batches import Batch

# (model, batch) -> the sum of the losses, the number of tokens (or of whatever it is the sum of), and figures for the
# log, which are sums too.
LossFunction = Callable[[Any, Batch], tuple[Tensor, float, dict[str, float]]]


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
