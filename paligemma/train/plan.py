"""How much memory a training run will need, before it begins: a rehearsal with tensors that have shapes and no content.

    plan = estimate(published_config("paligemma-3b"), lora=("decoder",), stored=torch.bfloat16, batch=4, length=300)
    plan.total                          # bytes
    rich.print(plan.table())

One whole step is made, forward, backward and optimizer, by the real code: the same model, LoRA, optimizer. Only the
tensors are PyTorch's "fake" ones, which know their size and hold nothing. Whenever one comes or goes its bytes are
counted, with what was being done when it came. So there is no formula here that could be forgotten when the model
changes, and the plan knows what is in memory at the fullest moment of the step.

What is unusual:
- gradients and the activations of the forward pass are not there at the same time: while the one grows, the other goes.
  The sum of all parts' own peaks would be too much;
- what kernels need inside and the holes between blocks cannot be seen here; 64 MB and 2% are put down for them, a bit
  more than was measured with the allocator told to give back what is freed (`allocator.py`). Without that, as small
  models train on a CPU, it can be half as much again. Python and PyTorch themselves need half a gigabyte beside it.

Letters: B batch, S sequence, A answer tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from paligemma.devices import on_meta_device
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.train import parts
from paligemma.train.memory import CAST, WEIGHTS, WORKSPACE, Memory
from paligemma.train.optimizer import adamw, muon_and_adamw

GRADIENTS, OPTIMIZER, AVERAGE, MESSAGE = "gradients", "optimizer", "running average", "gradients in one message"
VISION, DECODER = "activations of the vision tower", "activations of the decoder"
LOGITS = "logits of the answers"
WHOLE, UNSEEN = "layers that are whole for a moment", "inside of kernels, holes"
ORDER = (WEIGHTS, CAST, GRADIENTS, OPTIMIZER, AVERAGE, VISION, DECODER, LOGITS, MESSAGE, WHOLE, WORKSPACE)
SHARED_OUT = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE)  # by `sharding.py`


@dataclass(frozen=True)
class Plan:
    """Bytes in the memory of one process at the fullest moment of a step.

    components: what they are for. moment: what is being done then.
    """

    components: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def table(self) -> Table:
        """For `rich` to print."""
        table = Table(title="memory of a step", title_justify="left", show_footer=True)
        table.add_column("at its fullest moment: " + self.moment, footer="in all")
        unit, name_of_unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        table.add_column(name_of_unit, justify="right", footer=f"{self.total / unit:.2f}")
        for name, size in self.components.items():
            table.add_row(name, f"{size / unit:.2f}")
        return table


def estimate(
    config: PaliGemmaConfig,
    *,
    batch: int,
    length: int,
    answer: int,
    images: int = 1,
    shortest_prefix: int | None = None,
    accumulate: int = 1,
    freeze: Sequence[str] = (),
    lora: Sequence[str] = (),
    rank: int = 8,
    lora_dropout: float = 0.0,
    quantize: str | None = None,
    dropout: float = 0.0,
    stored: torch.dtype = torch.float32,
    compute: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    checkpoint_gradients: bool = False,
    ema: bool = False,
    processes: int = 1,
    shard: bool = False,
    cpu: bool = True,
) -> Plan:
    """What one process needs for a step of training.

    batch:      rows of a step, over all pieces and processes. length: tokens of its longest row, pictures included.
                answer: tokens of a row that are learned, the end included. images: in a row.
    shortest_prefix: tokens before the answer in the row where it begins first, from where on the last layer computes
                all rows; default: those of the longest row.
    freeze, lora, rank, lora_dropout, dropout, checkpoint_gradients: see `parts.py`.
    quantize:   "nf4" if the linear layers are rounded so, and LoRA learns beside them.
    stored:     dtype of the weights. compute: of the matrix products (autocast).
    optimizer:  "adamw" or "muon".
    shard:      the processes share the weights out (`sharding.py`), instead of having all of them each.
    cpu:        it runs on a CPU, where a small model writes its attention out (`parts.suit_cpu`).

    Raises ValueError for a row that has no room for its pictures and its answer, for another `quantize`, and what
    `parts.py` raises.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(
            f"a plan knows what nf4 needs, and not {quantize}: leave out --quantize to see what whole weights need"
        )
    tokens = images * config.vision_config.num_patches
    if length < tokens + answer or answer < 1:
        raise ValueError(f"a row of {length} tokens has no room for {tokens} of pictures and {answer} of the answer")
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports the compiler

    step = Step(
        rows=-(-batch // (accumulate * processes)),
        length=length,
        answer=answer,
        images=images,
        num_outputs=answer + 1 if shortest_prefix is None else length - shortest_prefix + 1,
        pieces=min(2, accumulate),  # the second one finds gradients there already; more change nothing
        compute=compute,
        processes=processes,
        shard=shard and processes > 1,
    )
    with on_meta_device():
        model = PaliGemmaForConditionalGeneration(config).to(stored).train()
        if quantize is not None:
            round_linear_layers(model)
        if lora:
            parts.add_lora(model, lora, rank, dropout=lora_dropout)
        elif freeze:
            parts.freeze(model, freeze)
    if dropout:
        parts.set_dropout(model, dropout)
    if checkpoint_gradients:
        parts.checkpoint_gradients(model)
    if cpu:
        parts.suit_cpu(model)
    with FakeTensorMode():
        make_fake(model)
        optimizers: list[torch.optim.Optimizer] = (
            muon_and_adamw(model, 1.0, 1.0) if optimizer == "muon" else [adamw(model)]
        )
        memory = rehearse(model, optimizers, step, ema)
    components = {kind: round(memory.fullest[kind]) for kind in ORDER if round(memory.fullest.get(kind, 0))}
    components[UNSEEN] = 64 * 10**6 + sum(components.values()) // 50
    return Plan(components, memory.moment)


@dataclass(frozen=True)
class Step:
    """A step of one process. rows: of a piece. num_outputs: positions that the last layer computes."""

    rows: int
    length: int
    answer: int
    images: int
    num_outputs: int
    pieces: int
    compute: torch.dtype
    processes: int
    shard: bool


def rehearse(
    model: PaliGemmaForConditionalGeneration, optimizers: list[torch.optim.Optimizer], step: Step, ema: bool
) -> Memory:
    """One step with fake tensors, which are counted."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory = Memory(dict.fromkeys(SHARED_OUT, 1 / (step.processes if step.shard else 1)))
    memory.hold(model.parameters(), WEIGHTS)
    outside = parameters_outside_of_layers(model)
    if step.shard:
        memory.held[WHOLE] = bytes_of_whole_layers(model, outside)

    def gradient_is_there(parameter: Tensor) -> None:
        # Of a sharded model those of the layers have been split by now; those outside stay whole to the end.
        memory.hold([parameter.grad], WHOLE if step.shard and id(parameter) in outside else GRADIENTS)

    with memory:
        with memory.of(AVERAGE):
            average = [parameter.detach().clone() for parameter in trained] if ema else []
        with memory.of(OPTIMIZER):  # its state, from the step before
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        memory.fullest = {}
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(gradient_is_there)
        for _ in range(step.pieces):
            with memory.at("the forward pass"):
                loss = forward(model, memory, step)
            with memory.at("the backward pass"):
                loss.backward()
            del loss
        if step.processes > 1 and not step.shard:
            with memory.at("adding up gradients"), memory.of(MESSAGE):
                flat = torch.cat([p.grad.flatten().float() for p in trained if p.grad is not None])
                del flat
        with memory.at("the optimizer's step"):
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
        del average
    return memory


def make_fake(model: nn.Module) -> None:
    """Parameters on the meta device become fake tensors of the CPU: attention and autocast take other code paths on the
    meta device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))


def round_linear_layers(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, RoundedLinear(layer))


class RoundedLinear(nn.Linear):
    """A linear layer as bitsandbytes has it in nf4: two weights a byte, and a byte for the scale of each 64.

    They are whole for the time of a product, in the backward pass once more.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        count = layer.weight.numel()
        packed = torch.empty(count // 2 + count // 64, dtype=torch.uint8, device="meta")
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return WholeForAMoment.apply(x, (self.out_features, self.in_features))


class WholeForAMoment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None


def forward(model: PaliGemmaForConditionalGeneration, memory: Memory, step: Step) -> Tensor:
    """What `loss.suffix_loss` does, without looking at the content of a tensor: there is none."""
    side = model.config.vision_config.image_size
    ids = torch.zeros(step.rows, step.length, dtype=torch.int64)
    real = torch.ones(step.rows, step.length, dtype=torch.bool)
    with torch.autocast("cpu", step.compute, enabled=step.compute != torch.float32):
        with memory.of(VISION):
            features = model.encode_image(torch.zeros(step.rows * step.images, 3, side, side)) if step.images else None
        with memory.of(DECODER):
            x = model.language_model.model.embed(ids)  # [B, S, D]
            if features is not None:
                x = x.masked_scatter(real[..., None], features.to(x.dtype))
            x = model.read(inputs_embeds=x, token_type_ids=ids, num_outputs=step.num_outputs)
        with memory.of(LOGITS):
            logits = model.language_model.logits(x[:, -step.answer :].flatten(0, 1)).float()  # [B * A, V]
            return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")


def parameters_outside_of_layers(model: PaliGemmaForConditionalGeneration) -> set[int]:
    """The identities of the embedding's parameters, the projector's and those of all else that belongs to no layer."""
    layers = nn.ModuleList([*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers])
    return {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in layers.parameters()}


def bytes_of_whole_layers(model: PaliGemmaForConditionalGeneration, outside: set[int]) -> int:
    """What a process holds of a sharded model beyond its share: all that belongs to no layer; and the largest layer and
    the one that is on its way, with their gradients."""
    layers = [*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers]
    largest = max(
        sum(p.numel() * p.element_size() * (2 if p.requires_grad else 1) for p in layer.parameters())
        for layer in layers
    )
    return 2 * largest + sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in outside)
