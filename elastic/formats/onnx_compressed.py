"""Weights of an ONNX graph, where NNCF finds them and where ONNX Runtime computes with them.

Before compression each linear layer reads its weight through a transposition, which NNCF does not
look behind (`expose`). Afterwards 8-bit weights would be dequantised whole at every step, the
embedding's too, and zero points of 4 bits lie one to a byte, which ONNX Runtime refuses (`lower`).
Codes, scales and zero points stay as NNCF chose them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


CODES, SCALE, ZERO = "_quantized", "_scale", "_zero_point"
"""What NNCF appends to the name of a weight."""
_HIDDEN = "_hidden"
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 32
_DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4
"""Of MatMulNBits: a block of activations is rounded to 8 bits while it is multiplied. At 0 they
stay in float32, and SmolLM2 with 8-bit weights then decodes 8 times slower, with 4-bit weights
2.7 times (ONNX Runtime 1.32 on a CPU with AMX)."""


def expose(model: ModelProto) -> list[str]:
    """Store weights the way their products read them; the names of products to leave alone.

    Those read what the embedding reads: once that is compressed, so are they. Biases are hidden,
    since NNCF adds them to its 4-bit products and leaves the addition that was there; so is what is
    cast, since it looks for the type of that where initializers have none.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = initializers(model)
    _skip_idle_casts(model, weights)
    readers = _readers(model)
    tied, folded = [], []
    for name, tensor in weights.items():
        turns = [node for node in readers[name] if _turns(node)]
        products = [node for turn in turns for node in readers[turn.output[0]]]
        gemms = [node for node in readers[name] if _turned_gemm(node, name)]
        if not turns + gemms or any(node.op_type != "MatMul" for node in products):
            continue
        if len(turns + gemms) < len(readers[name]):
            tied += [node.name for node in products + gemms]
            continue
        turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(numpy_helper.from_array(turned, name))
        for node in products:
            node.input[1] = name
        for node in gemms:
            _set(node, "transB", 0)
        folded += turns
    for node in folded:
        graph.node.remove(node)
    for node in [node for node in graph.node if node.op_type in ("Add", "Cast")]:
        for place, name in enumerate(node.input):
            if name in weights:
                hidden = f"{node.name}/{place}{_HIDDEN}"
                node.input[place] = hidden
                graph.node.insert(0, helper.make_node("Identity", [name], [hidden], name=hidden))
    return tied


def lower(model: ModelProto) -> None:
    """Replace what reads a dequantised weight by what reads its codes, in place.

    Products become MatMulNBits of ONNX Runtime (8 bits: 1.22 or newer), an embedding dequantises
    the rows it looks up. A head and its embedding share their codes.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors, readers = initializers(model), _readers(model)
    replaced: dict[str, list[NodeProto]] = {}
    fresh: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            _set(node, "accuracy_level", ACCURACY_LEVEL)
            for name in node.input[3:4]:
                fresh |= {name: _packed(numpy_helper.to_array(tensors[name]))} if name else {}
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(CODES):
            continue
        users = _users(node, readers)
        if users is None:
            continue
        name = node.input[0].removesuffix(CODES)
        codes, scale, *zero = (numpy_helper.to_array(tensors[part]) for part in node.input)
        if _axis(node) != 0:
            codes = codes.T
        weight = _Rows(name, codes, scale, zero[0] if zero else None)
        products, lookups, turns = users
        fresh |= weight.blocked() if products else weight.plain()
        for turn in turns:
            replaced[turn.name] = []
        for product in products:
            replaced[product.name] = [weight.product(product)]
        for lookup in lookups:
            replaced[lookup.name] = weight.lookup(lookup, blocked=bool(products))
        replaced[node.name] = []

    hidden = {node.output[0]: node.input[0] for node in graph.node if _hides(node)}
    nodes = [
        new for node in graph.node if not _hides(node) for new in replaced.get(node.name, [node])
    ]
    for node in nodes:
        node.input[:] = [hidden.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used - set(fresh)]
    kept += [numpy_helper.from_array(array, name) for name, array in fresh.items()]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    if _DOMAIN not in {item.domain for item in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


class _Rows:
    """8-bit codes of a weight, (rows, columns), one scale and zero point per row."""

    def __init__(self, name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None):
        if codes.dtype == np.int8:  # symmetric: the kernels take bytes around 128
            codes = (codes.astype(np.int16) + 128).astype(np.uint8)
            zero = None
        self.name, self.codes, self.scale = name, np.ascontiguousarray(codes), scale
        self.zero = np.full(len(codes), 128, np.uint8) if zero is None else zero
        self.rows, self.columns = codes.shape
        fitting = self.columns & -self.columns
        self.block = max(min(fitting, _LARGEST_BLOCK), _SMALLEST_BLOCK)
        self.blocks = -(-self.columns // self.block)

    def plain(self) -> dict[str, np.ndarray]:
        """As an embedding alone is stored: (rows, columns), (rows, 1)."""
        return self._named(self.codes, self.scale[:, None], self.zero[:, None])

    def blocked(self) -> dict[str, np.ndarray]:
        """As MatMulNBits reads it: (rows, blocks, block) and twice (rows, blocks), the last block
        filled up with what means zero."""
        filled = np.repeat(self.zero[:, None], self.blocks * self.block, axis=1)
        filled[:, : self.columns] = self.codes
        codes = filled.reshape(self.rows, self.blocks, self.block)
        each_block = np.ones((1, self.blocks), np.uint8)
        return self._named(codes, self.scale[:, None] * each_block, self.zero[:, None] * each_block)

    def _named(
        self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray
    ) -> dict[str, np.ndarray]:
        parts = {CODES: codes, SCALE: scale.astype(np.float32), ZERO: zero}
        return {self.name + part: np.ascontiguousarray(array) for part, array in parts.items()}

    def product(self, node: NodeProto) -> NodeProto:
        from onnx import helper

        inputs = [node.input[0], *(self.name + part for part in (CODES, SCALE, ZERO))]
        if node.op_type == "Gemm" and len(node.input) > 2:
            inputs += ["", node.input[2]]
        return helper.make_node(
            "MatMulNBits", inputs, list(node.output), name=node.name, domain=_DOMAIN,
            K=self.columns, N=self.rows, bits=8, block_size=self.block,
            accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip

    def lookup(self, node: NodeProto, *, blocked: bool) -> list[NodeProto]:
        """(code - zero) * scale of the rows looked up, as float32."""
        from onnx import TensorProto, helper, numpy_helper

        nodes: list[NodeProto] = []

        def step(operator: str, *inputs: str, **attributes: Any) -> str:
            name = f"{node.name}/{operator}_{len(nodes)}"
            nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
            return name

        def constant(values: list[int]) -> str:
            tensor = numpy_helper.from_array(np.array(values, np.int64))
            return step("Constant", value=tensor)

        rows = {part: step("Gather", self.name + part, node.input[1], axis=0)
                for part in (CODES, SCALE, ZERO)}  # fmt: skip
        if blocked:
            last = constant([-1])
            rows |= {part: step("Unsqueeze", rows[part], last) for part in (SCALE, ZERO)}
        codes, zero = (step("Cast", rows[part], to=TensorProto.FLOAT) for part in (CODES, ZERO))
        found = step("Mul", step("Sub", codes, zero), rows[SCALE])
        if blocked:
            shape = constant([0, 0, -1])
            found = step("Reshape", found, shape)
        if blocked and self.columns < self.blocks * self.block:
            ends = [constant([value]) for value in (0, self.columns, -1)]
            step("Slice", found, *ends)
        nodes[-1].output[0] = node.output[0]
        return nodes


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """The graph's weights by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def attributes_of(node: NodeProto) -> dict:
    """A node's settings by name."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _axis(node: NodeProto) -> int:
    """The axis of a matrix that has scales of its own, 0 or 1."""
    return attributes_of(node).get("axis", 1) % 2


def _skip_idle_casts(model: ModelProto, weights: Mapping[str, TensorProto]) -> None:
    """Let what reads a weight by way of a cast to the type that it has read the weight itself, as
    DeepSeek's routers do."""
    idle = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Cast"
        and node.input[0] in weights
        and attributes_of(node).get("to") == weights[node.input[0]].data_type
    }
    for node in model.graph.node:
        node.input[:] = [idle[name].input[0] if name in idle else name for name in node.input]
    for node in idle.values():
        model.graph.node.remove(node)


def _turns(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and attributes_of(node).get("perm") == [1, 0]


def _hides(node: NodeProto) -> bool:
    return node.op_type == "Identity" and node.name.endswith(_HIDDEN)


def _users(
    node: NodeProto, readers: Mapping[str, list[NodeProto]]
) -> tuple[list[NodeProto], ...] | None:
    """Products, lookups and transpositions of this dequantised weight; None if something else
    reads it, or one of them reads it in a way that we have no words for."""
    products, lookups, turns = [], [], []
    by_row = _axis(node) == 0
    weight = node.output[0]
    for reader in readers[weight]:
        attributes = attributes_of(reader)
        multiplies = reader.op_type in _READS and reader.input[1] == weight
        if reader.op_type == "Gather" and by_row and attributes.get("axis", 0) == 0:
            lookups.append(reader)
        elif multiplies and _READS[reader.op_type](attributes, by_row):
            products.append(reader)
        elif _turns(reader) and by_row:
            behind = readers[reader.output[0]]
            if any(each.op_type != "MatMul" or each.input[1] != reader.output[0]
                   for each in behind):  # fmt: skip
                return None
            products += behind
            turns.append(reader)
        else:
            return None
    return products, lookups, turns


def _gemm(attributes: dict, by_row: bool) -> bool:
    """Whether it is x W + bias, W turned or not, and the scales belong to outputs."""
    has = {"alpha": 1, "beta": 1, "transA": 0, "transB": 0} | attributes
    return has["alpha"] == has["beta"] == 1 and not has["transA"] and has["transB"] == by_row


_READS = {"Gemm": _gemm, "MatMul": lambda attributes, by_row: not by_row}
"""Whether a product with these attributes, its scales by row of the stored matrix or by column,
has a scale per output."""


def _turned_gemm(node: NodeProto, name: str) -> bool:
    """Of one that turns its weight NNCF mixes up the axes once it has looked at activations."""
    turned = node.op_type == "Gemm" and node.input[1] == name
    return turned and bool(attributes_of(node).get("transB"))


def _set(node: NodeProto, attribute: str, value: int) -> None:
    for item in node.attribute:
        if item.name == attribute:
            item.i = value


def _packed(zeros: np.ndarray) -> np.ndarray:
    """4-bit zero points (rows, blocks), one to a byte, as (rows, blocks / 2), the first one low."""
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return zeros[:, ::2] | zeros[:, 1::2] << 4
