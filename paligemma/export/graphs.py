"""The model as three graphs, in the form in which transformers.js expects them.

    vision_encoder         pixel_values [batch_size, 3, side, side] -> image_features [batch_size, P, D]
    embed_tokens           input_ids [batch_size, S] -> inputs_embeds [batch_size, S, D]
    decoder_model_merged   inputs_embeds, attention_mask [batch_size, T], position_ids [batch_size, S],
                           past_key_values.{i}.key and .value [batch_size, K, T - S, E], num_logits_to_keep
                           -> logits, present.{i}.key and .value [batch_size, K, T, E]

The caller puts the image features in the place of the embeddings of <image>, as they are: text embeddings come out
scaled and image features are not. position_ids count the real tokens of a row from 1. num_logits_to_keep may be left
out: 0 stands for all positions.

What is unusual: one decoder reads the prompt and continues it ("merged"). There are no token types, so an empty past
says that all of the input is prefix, which sees itself in both directions; what follows is causal. And places come from
attention_mask and position_ids, never from the shapes: a row may be padded on the left.

The modules below wrap those of the model and change none of them. They are traced without weights (on the meta device),
so that the largest model needs no more memory here than the smallest.

Letters: B rows (batch_size), S tokens, T tokens with those of the past, K key/value heads, E head size, D hidden.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.expected import empty_model

OPSET = 20  # of ONNX; what onnxruntime in a browser knows as well

Axes = Mapping[int, str]  # which axes of an input may have any size, and what they are called
BATCH, NEW, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class VisionEncoder(nn.Module):
    """Vision tower and projector."""

    def __init__(self, model: PaliGemmaForConditionalGeneration):
        super().__init__()
        self.vision_tower, self.multi_modal_projector = model.vision_tower, model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.multi_modal_projector(self.vision_tower(pixel_values))


class TokenEmbedding(nn.Module):
    """Text embeddings, scaled. The id of <image> may lie beyond the table: its rows are replaced by the caller."""

    def __init__(self, model: PaliGemmaForConditionalGeneration):
        super().__init__()
        self.language_model, self.image_token = model.language_model, model.config.image_token_index

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.language_model.model.embed(input_ids.masked_fill(input_ids == self.image_token, 0))


class Past:
    """In the place of a `KVCache`: keys and values that are given, and what they are after this pass."""

    def __init__(self, given: Sequence[Tensor]):
        self.given, self.present = given, list[Tensor]()

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.given[2 * layer :][:2], (keys, values)))
        self.present += [keys, values]
        return keys, values


class Decoder(nn.Module):
    """The language model with its head, for the prompt and for what follows."""

    def __init__(self, model: PaliGemmaForConditionalGeneration):
        super().__init__()
        self.language_model = model.language_model

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        text = self.language_model.config
        key_places = attention_mask.cumsum(-1)[:, None]  # [B, 1, T], counted from 1
        query_places = position_ids[:, :, None]  # [B, S, 1]
        # A tensor, not a Python number: a comparison here would decide once and for all.
        past_length = attention_mask.shape[1] - inputs_embeds.shape[1]
        is_prefix = torch.full((1, 1, 1), past_length, device=attention_mask.device) == 0
        valid = (attention_mask != 0)[:, None]
        masks: dict[int | None, Tensor] = {}
        for window in {text.window(layer) for layer in range(text.num_hidden_layers)}:
            causal = key_places <= query_places
            if window is not None:
                causal = causal & (key_places > query_places - window)
            masks[window] = ((is_prefix | causal) & valid)[:, None]  # bool [B, 1, S, T]
        cache: Any = Past(past)
        places = position_ids - 1 + text.position_offset
        hidden = self.language_model.model(inputs_embeds, places, masks, cache)
        return (self.language_model.logits(hidden), *cache.present)


# ---------------------------------------------------------------------------------------------- tracing


def vision_encoder(config: PaliGemmaConfig) -> ir.Model:
    side = config.vision_config.image_size
    given = {"pixel_values": (torch.zeros(2, 3, side, side, device="meta"), {0: BATCH})}
    return _traced(VisionEncoder(_empty(config)), given, ["image_features"])


def embed_tokens(config: PaliGemmaConfig) -> ir.Model:
    given = {"input_ids": (torch.zeros(2, 5, dtype=torch.int64, device="meta"), {0: BATCH, 1: NEW})}
    return _traced(TokenEmbedding(_empty(config)), given, ["inputs_embeds"])


def decoder(config: PaliGemmaConfig) -> ir.Model:
    text, B, S, past = config.text_config, 2, 5, 3
    ids = torch.ones(B, past + S, dtype=torch.int64, device="meta")
    given: dict[str, tuple[Tensor, Axes]] = {
        "inputs_embeds": (torch.zeros(B, S, text.hidden_size, device="meta"), {0: BATCH, 1: NEW}),
        "attention_mask": (ids, {0: BATCH, 1: ALL}),
        "position_ids": (ids[:, past:], {0: BATCH, 1: NEW}),
    }
    stored = [f"{i}.{part}" for i in range(text.num_hidden_layers) for part in ("key", "value")]
    for name in stored:
        keys = torch.zeros(B, text.num_key_value_heads, past, text.head_dim, device="meta")
        given[f"past_key_values.{name}"] = (keys, {0: BATCH, 2: PAST})
    model = _traced(Decoder(_empty(config)), given, ["logits", *(f"present.{name}" for name in stored)], last=3)
    for output in model.graph.outputs[1:]:
        output.shape = ir.Shape([BATCH, text.num_key_value_heads, ALL, text.head_dim])
    _keep_logits(model, text.vocab_size)
    return model


# The file names of transformers.js, each with what makes its graph.
GRAPHS: dict[str, Callable[[PaliGemmaConfig], ir.Model]] = {
    "vision_encoder": vision_encoder,
    "embed_tokens": embed_tokens,
    "decoder_model_merged": decoder,
}


def _empty(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    model = empty_model(config).eval()
    model.set_explicit_attention()  # plain products and a softmax, which every runtime knows
    return model


def _traced(
    module: nn.Module, given: Mapping[str, tuple[Tensor, Axes]], outputs: Sequence[str], last: int | None = None
) -> ir.Model:
    """The graph, whose weights have the names of the checkpoint and no values yet.

    given: an example of each input, by name. last: inputs from here on are one argument, a tuple.
    """
    examples, axes = [example for example, _ in given.values()], [dict(axes) for _, axes in given.values()]
    if last is not None:
        examples, axes = [*examples[:last], tuple(examples[last:])], [*axes[:last], tuple(axes[last:])]  # type: ignore[list-item]
    with torch.no_grad(), quietly():
        program = torch.onnx.export(
            module,
            tuple(examples),
            input_names=list(given),
            output_names=list(outputs),
            dynamic_shapes=tuple(axes),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would join weights with what stands around them; see `storing.py`
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """torch and onnx_ir tell of every stage, and of names that they share between axes."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels):
            log.setLevel(level)


def _keep_logits(model: ir.Model, vocab_size: int) -> None:
    """Adds the input num_logits_to_keep: the head reads the last n positions only, or all of them for 0.

    An input with a value of its own in the file may be left out by the caller.
    """
    graph = model.graph
    (head,) = (
        use.node
        for transposed in graph.initializers["language_model.model.embed_tokens.weight"].uses()
        for use in transposed.node.outputs[0].uses()
    )
    count = ir.Value(
        name="num_logits_to_keep",
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(0, dtype=ir.DataType.INT64, name="num_logits_to_keep"),
    )
    graph.inputs.append(count)
    graph.register_initializer(count)

    def constant(number: int) -> ir.Node:
        return ir.node("Constant", [], {"value": ir.tensor([number], dtype=ir.DataType.INT64)})

    # A slice from -n to the end; from -0, which is 0, it is everything.
    axis, end = constant(1), constant(2**62)
    negative = ir.node("Neg", [count])
    start = ir.node("Reshape", [negative.outputs[0], (flat := constant(-1)).outputs[0]])
    kept = ir.node("Slice", [head.inputs[0], start.outputs[0], end.outputs[0], axis.outputs[0]])
    graph.insert_before(head, [axis, end, flat, negative, start, kept])
    head.replace_input_with(0, kept.outputs[0])
    # Every shape from here to the logits had the length of the input.
    for node in _from(head):
        for output in node.outputs:
            output.shape = None
    graph.outputs[0].shape = ir.Shape([BATCH, "num_logits", vocab_size])


def _from(node: ir.Node) -> list[ir.Node]:
    """The node and all that computes with what it returns."""
    found = [node]
    for output in node.outputs:
        for use in output.uses():
            found += _from(use.node)
    return found
