"""How the weights of a graph are stored: in 32 or 16 bits, or rounded to 8 or 4.

    fp32   as they are
    fp16   matrices in 16 bits, put into float32 where they are used: half the size. (Products in float16 would be
           faster on some devices, but Gemma's activations overflow it.)
    q8     matrices in 8 bits: groups of 32 weights share a scale
    q4     the language model's layers in 4 bits like this; vision tower, projector, head and embedding in 8

Rounded matrices are multiplied by MatMulNBits, an operator of onnxruntime (com.microsoft) that multiplies float32
activations by them, on CPUs and in browsers (WebAssembly and WebGPU). Norms, biases, the patch embedding and the table
of positions stay float32.

The values are read when a graph is written, one tensor after the other: a graph holds functions, not numbers.

Letters: N outputs, K inputs of a matrix, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from paligemma.fast.rounding import check_finite, round_rows
from paligemma.weights.loading import cast

GROUP = 32  # weights that share a scale

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}  # of file names, as transformers.js has them

Read = Callable[[str], Tensor]  # a weight by its name


def bits_of(name: str, weights: str) -> int:
    """How many bits a matrix is rounded to; 0 where it is not."""
    in_a_layer = name.startswith("language_model.model.layers.")
    return {"q8": 8, "q4": 4 if in_a_layer else 8}.get(weights, 0)


def store(model: ir.Model, read: Read, weights: str) -> None:
    """Says where the graph's weights come from, and in which form they are stored."""
    graph, read = model.graph, partial(_finite, read)
    for name, weight in list(graph.initializers.items()):
        if name == "num_logits_to_keep":
            continue
        uses = [use.node for use in weight.uses()]
        if len(uses) == 1 and uses[0].op_type == "Transpose":
            _store_matrix(graph, name, uses[0], read, weights)
        elif len(uses) == 1 and uses[0].op_type == "Gather" and weights != "fp32":
            _store_table(graph, name, uses[0], read, weights)
        else:
            weight.const_value = _lazy(name, weight, partial(_as_it_is, read, name))
    model.opset_imports["com.microsoft"] = 1


def rounded(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] in groups of 32: uint8 [N, K / 32, 32] for 8 bits, two weights in a byte for 4, and scales [N, K / 32].

    weight = (n - 2^(bits - 1)) * scale. The largest weight of a group becomes the lowest number, which has no opposite;
    so a scale may be negative.
    """
    low = 2 ** (bits - 1)
    pad = -weight.shape[1] % GROUP
    groups = torch.nn.functional.pad(weight.float(), (0, pad)).unflatten(1, (-1, GROUP))  # [N, K / 32, 32]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest / -low
    n = (groups / torch.where(scale == 0, 1, scale)).round().clamp(-low, low - 1) + low
    n = n.to(torch.uint8)
    if bits == 4:
        n = n[..., 0::2] | n[..., 1::2] << 4
    return n.numpy(), scale[..., 0].numpy()


# ---------------------------------------------------------------------------------------------- one weight


def _finite(read: Read, name: str) -> Tensor:
    """The weight. ValueError for NaN or infinity, which no form of storing keeps."""
    weight = read(name)
    check_finite(name, weight)
    return weight


def _store_matrix(graph: ir.Graph, name: str, transpose: ir.Node, read: Read, weights: str) -> None:
    """A linear layer: x times the transposed weight. The transposition is done once, in the file."""
    (product,) = (use.node for use in transpose.outputs[0].uses())
    weight = graph.initializers[name]
    assert weight.shape is not None
    N, K = weight.shape.numpy()
    x, bits = product.inputs[0], bits_of(name, weights)
    graph.initializers.pop(name)
    if bits:
        blocks = -(-K // GROUP)
        packed = _initializer(
            graph, name, ir.DataType.UINT8, [N, blocks, GROUP * bits // 8], lambda: rounded(read(name), bits)[0]
        )
        scales = _initializer(
            graph, f"{name}.scale", ir.DataType.FLOAT, [N, blocks], lambda: rounded(read(name), bits)[1]
        )
        attributes = {"K": K, "N": N, "bits": bits, "block_size": GROUP}
        new = [ir.node("MatMulNBits", [x, packed, scales], attributes, domain="com.microsoft")]
    elif weights == "fp16":
        stored = _initializer(graph, name, ir.DataType.FLOAT16, [K, N], lambda: cast(name, read(name), torch.float16).T)
        widened = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        new = [widened, ir.node("MatMul", [x, widened.outputs[0]])]
    else:
        stored = _initializer(graph, name, ir.DataType.FLOAT, [K, N], lambda: read(name).float().T)
        new = [ir.node("MatMul", [x, stored])]
    _replace(graph, product, new)
    graph.remove(transpose, safe=True)


def _store_table(graph: ir.Graph, name: str, gather: ir.Node, read: Read, weights: str) -> None:
    """The embedding: rows are looked up as they are stored, and then made float32."""
    weight = graph.initializers.pop(name)
    assert weight.shape is not None
    V, D = weight.shape.numpy()
    ids = gather.inputs[1]
    if weights == "fp16":
        stored = _initializer(graph, name, ir.DataType.FLOAT16, [V, D], lambda: cast(name, read(name), torch.float16))
        rows = ir.node("Gather", [stored, ids])
        new = [rows, ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})]
    else:
        # One scale for each row here: what is looked up is not summed over, so finer groups would win nothing.
        table = _initializer(graph, name, ir.DataType.INT8, [V, D], lambda: _rows(read(name))[0])
        scales = _initializer(graph, f"{name}.scale", ir.DataType.FLOAT, [V, 1], lambda: _rows(read(name))[1])
        rows, scale = ir.node("Gather", [table, ids]), ir.node("Gather", [scales, ids])
        widened = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        new = [rows, scale, widened, ir.node("Mul", [widened.outputs[0], scale.outputs[0]])]
    _replace(graph, gather, new)


def _as_it_is(read: Read, name: str) -> Tensor:
    return read(name).float()


def _rows(table: Tensor) -> tuple[Tensor, Tensor]:
    stored, scale = round_rows(table)
    return stored, scale[:, None]


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int], make: Callable[[], Tensor | np.ndarray]
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = _lazy(name, value, make)
    graph.register_initializer(value)
    return value


def _lazy(name: str, value: ir.Value, make: Callable[[], Tensor | np.ndarray]) -> ir.LazyTensor:
    """A tensor of a graph that is made when it is written, and dropped then."""

    def made() -> ir.Tensor:
        array = make()
        return ir.Tensor(np.ascontiguousarray(array.numpy() if isinstance(array, Tensor) else array), name=name)

    assert value.dtype is not None and value.shape is not None
    return ir.LazyTensor(made, value.dtype, value.shape, name=name)


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """The last of the new nodes takes over what the old one returned, with its name."""
    result = new[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, [result])
