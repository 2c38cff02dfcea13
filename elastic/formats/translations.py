"""Operations that torch's exporter translates wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def translated(opset: int) -> Iterator[None]:
    """Inside, the exporter knows these."""
    ours = _ours()
    for name, translate in ours.items():
        torch.onnx.register_custom_op_symbolic(f"aten::{name}", translate, opset)
    try:
        yield
    finally:
        for name in ours:
            torch.onnx.unregister_custom_op_symbolic(f"aten::{name}", opset)


def _ours() -> dict[str, Callable[..., Any]]:
    """By name of the operation."""
    from torch.onnx import symbolic_helper, symbolic_opset13

    @symbolic_helper.parse_args("v", "v", "i", "v")
    def repeat_interleave(graph: Any, tensor: Any, repeats: Any, dim: Any, size: Any) -> Any:
        """The exporter's own, with a dimension of its own. Where it is counted from the end, as in
        the rotary embeddings of Cohere, GLM and ERNIE, the exporter counts it from the front in
        place: in the constant that other operations read, too."""
        return symbolic_opset13.repeat_interleave(graph, tensor, repeats, dim, size)

    def expm1(graph: Any, tensor: Any) -> Any:
        """In Apertus's activation."""
        one = graph.op("Constant", value_t=torch.ones((), dtype=torch.float32))
        return graph.op("Sub", graph.op("Exp", tensor), one)

    @symbolic_helper.parse_args("v", "is", "v", "f")
    def rms_norm(graph: Any, tensor: Any, shape: Any, weight: Any, eps: Any) -> Any:
        """In DiffLlama's attention."""
        axes = graph.op("Constant", value_t=torch.arange(-len(shape), 0))
        floor = torch.tensor(torch.finfo(torch.float32).eps if eps is None else eps)
        mean = graph.op("ReduceMean", graph.op("Mul", tensor, tensor), axes, keepdims_i=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.op("Constant", value_t=floor)))
        normed = graph.op("Div", tensor, root)
        return normed if weight.node().mustBeNone() else graph.op("Mul", normed, weight)

    return {"repeat_interleave": repeat_interleave, "expm1": expm1, "rms_norm": rms_norm}
