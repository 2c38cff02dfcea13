"""In what precision a written graph stores each of its weights, read from the graph itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.formats.onnx_compressed import CODES, SCALE, ZERO, attributes_of, initializers

if TYPE_CHECKING:
    from onnx import ModelProto
    from openvino import Model


@dataclass(frozen=True)
class Weight:
    """A matrix that a product, a convolution or a lookup reads."""

    precision: str
    """float32, int8, int4, nf4 and the like; integers with and without a sign alike."""
    bits: int
    shape: tuple[int, ...]
    """(outputs, inputs) of a compressed linear layer."""
    group: int | None = None
    """Neighbours in a row that share a scale; None: the whole row, or no scale."""


_READERS = {"MatMul", "Gemm", "Gather", "Conv", "Convolution", "MatMulNBits"}
_INTEGERS = {"u8": "int8", "i8": "int8", "u4": "int4", "i4": "int4"}
_FLOATS = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def in_onnx(model: ModelProto) -> dict[str, Weight]:
    """Weights by the name of their layer, as `onnx_compressed.lower` or `onnx.write` leave them."""
    from onnx import numpy_helper

    tensors = initializers(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, Weight] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            has = attributes_of(node)
            pairs = [numpy_helper.to_array(tensors[name]) for name in node.input[2:4] if name]
            # A scale per row is repeated for every block, since the kernel has no other form.
            whole = has["bits"] == 8 and all((each == each[:, :1]).all() for each in pairs)
            found[_layer(node.input[1])] = Weight(
                f"int{has['bits']}", has["bits"], (has["N"], has["K"]),
                None if whole else has["block_size"],
            )  # fmt: skip
            continue
        for name in node.input if node.op_type in _READERS else ():
            while name in makers and makers[name].op_type in (
                "Transpose", "DequantizeLinear", "Identity", "Cast"
            ):  # fmt: skip
                name = makers[name].input[0]
            tensor, layer = tensors.get(name), _layer(name)
            if tensor is None or name.endswith((SCALE, ZERO)) or layer in found:
                continue
            array = numpy_helper.to_array(tensor)
            if array.ndim < 2 or sorted(array.shape)[-2] < 2:
                continue
            integer = array.dtype.kind in "iu"
            if not integer or name.endswith(CODES):  # else numbers to compute with, no weight
                precision = "int8" if integer else str(array.dtype)
                found[layer] = Weight(precision, 8 * array.dtype.itemsize, array.shape)
    return found


def in_openvino(model: Model) -> dict[str, Weight]:
    """Weights by the name of their layer."""
    found: dict[str, Weight] = {}
    for node in model.get_ordered_ops():
        for port in node.inputs() if node.get_type_name() in _READERS else ():
            constants = list(_constants(port.get_source_output().get_node()))
            if not constants or None in constants:
                continue
            data = max(constants, key=lambda each: int(np.prod(each.shape)))
            shape = tuple(data.shape)
            kind = data.get_element_type().get_type_name()
            if len(shape) < 2 or sorted(shape)[-2] < 2 or kind not in {*_INTEGERS, *_FLOATS, "nf4"}:
                continue
            group = None
            if kind not in _FLOATS and len(shape) == 3:  # (outputs, groups, group)
                group, shape = shape[2], (shape[0], shape[1] * shape[2])
            precision = _INTEGERS.get(kind) or _FLOATS.get(kind, kind)
            bits = data.get_element_type().bitwidth
            found[_layer(data.get_friendly_name())] = Weight(precision, bits, shape, group)
    return found


def _constants(node: Any) -> Iterator[Any]:
    """The constants that this value is computed from; None where it depends on an input."""
    if node.get_type_name() == "Constant":
        yield node
    elif node.get_type_name() in (
        "Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Squeeze", "Unsqueeze"
    ):  # fmt: skip
        for port in node.inputs():
            yield from _constants(port.get_source_output().get_node())
    else:
        yield None


def _layer(name: str) -> str:
    """The module's name in torch: the graph's has that of the traced wrapper before it."""
    return name.removesuffix(CODES).removeprefix("model.").removesuffix(".weight")
