"""Write an encoder-decoder model as two ONNX graphs, and run them.

The files and their names are those of optimum, which transformers.js reads, too: `encoder_model`
and `decoder_model_merged`. The decoder is one file for the first token and all later ones: an `If`
on `use_cache_branch` holds the decoder twice and its weights once. The first branch computes the
keys and values of cross-attention from what the encoder said and starts with an empty past, the
second is given both. (One branch for all, with the `If` around cross-attention's keys and values
alone, would copy them at every token.) Embeddings that encoder and decoder share are in both files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from elastic.formats.onnx_session import (
    BRANCH,
    OnnxRunner,
    cache_names,
    filled,
    flattened,
    session_of,
)
from elastic.formats.tracing import Flat, Trace, ones, save, traceable, traced, write_traced
from elastic.models import compat

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import EncoderDecoderCache

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
START = "decoder_start_token_id"
"""Under which the graphs keep it in their metadata, so that a runner needs nothing but them."""
CROSS, FIRST, NEXT = "cross", "first", "next"
"""Parts of the decoder, after which their values are named: cross-attention's keys and values from
what the encoder said, the first token, later ones."""


def write(model: PreTrainedModel, directory: Path, *, logits: str = "last") -> Path:
    """Write `directory/encoder_model.onnx` and `decoder_model_merged.onnx`; return the latter.

    Of a decoder that reads one token at a time every position is the last: there is no choice of
    `logits`.

    Shapes: of the encoder input_ids, attention_mask (batch, prompt) and last_hidden_state (batch,
    prompt, hidden); of the decoder input_ids (batch, sequence), encoder_attention_mask (batch,
    prompt), encoder_hidden_states as the encoder says, past_key_values.N.decoder.key and .value
    (batch, heads, past, head_dim), past_key_values.N.encoder.* (batch, heads, prompt, head_dim),
    use_cache_branch (1,); present.N.decoder.* with past + sequence; present.N.encoder.* of the
    first branch alone, empty in the other; logits (batch, sequence, vocab).
    """
    with traceable(model):
        write_traced(_encoder(model), directory / ENCODER)
        cross, step = (traced(part(model), directory) for part in (_cross, _step))
    merged = _merged(cross, step)
    merged.metadata_props.add(key=START, value=str(model.config.decoder_start_token_id))
    return save(merged, directory / DECODER)


def _encoder(model: PreTrainedModel) -> Trace:
    encoder = model.get_encoder()

    def call(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return encoder(input_ids=input_ids, attention_mask=attention_mask)[0]

    example = (ones(model, 2, 3), ones(model, 2, 3))
    inputs, outputs = ["input_ids", "attention_mask"], ["last_hidden_state"]
    dynamic = {name: {0: "batch", 1: "prompt"} for name in (*inputs, *outputs)}
    return Trace(Flat(call, encoder=encoder), example, inputs, outputs, dynamic)


def _cross(model: PreTrainedModel) -> Trace:
    """From what the encoder said to the keys and values of cross-attention."""

    def call(hidden: Tensor) -> tuple[Tensor, ...]:
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        return tuple(flattened(_called(model, hidden, ids)[1].cross_attention_cache))

    hidden = model.get_encoder()(input_ids=ones(model, 2, 3))[0]
    outputs = cache_names("present", len(call(hidden)) // 2, ".encoder")
    dynamic = {"encoder_hidden_states": {0: "batch", 1: "prompt"}}
    dynamic |= {name: {0: "batch", 2: "prompt"} for name in outputs}
    module = Flat(call, model=model)
    return Trace(module, (hidden,), ["encoder_hidden_states"], outputs, dynamic)


def _step(model: PreTrainedModel) -> Trace:
    """One or more tokens after others, of which all keys and values are given."""
    from transformers.cache_utils import EncoderDecoderCache

    def call(ids: Tensor, mask: Tensor, hidden: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        half = len(past) // 2
        cache = EncoderDecoderCache(filled(past[:half]), filled(past[half:]))
        logits, cache = _called(model, hidden, ids, mask=mask, past=cache)
        return logits, *flattened(cache.self_attention_cache)

    ids, mask = ones(model, 2, 3), ones(model, 2, 4)
    hidden = model.get_encoder()(input_ids=mask)[0]
    _, cache = _called(model, hidden, ids)
    past = [*flattened(cache.self_attention_cache), *flattened(cache.cross_attention_cache)]
    layers = len(past) // 4
    own = cache_names("past_key_values", layers, ".decoder")
    cross = cache_names("past_key_values", layers, ".encoder")
    present = cache_names("present", layers, ".decoder")
    inputs = ["input_ids", "encoder_attention_mask", "encoder_hidden_states", *own, *cross]
    dynamic = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "logits")}
    dynamic |= {name: {0: "batch", 1: "prompt"} for name in inputs[1:3]}
    dynamic |= {name: {0: "batch", 2: "past"} for name in own}
    dynamic |= {name: {0: "batch", 2: "prompt"} for name in cross}
    dynamic |= {name: {0: "batch", 2: "total"} for name in present}
    module, example = Flat(call, model=model), (ids, mask, hidden, *past)
    return Trace(module, example, inputs, ["logits", *present], dynamic)


def _called(
    model: PreTrainedModel,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    past: EncoderDecoderCache | None = None,
) -> tuple[Tensor, EncoderDecoderCache]:
    from transformers.modeling_outputs import BaseModelOutput

    output = model(
        encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, decoder_input_ids=ids,
        use_cache=True, **compat.given(model, past),
    )  # fmt: skip
    return output.logits, compat.cache_of(output)


def _merged(cross: ModelProto, step: ModelProto) -> ModelProto:
    """The decoder as one graph with two branches around one set of weights."""
    from onnx import TensorProto, helper

    inputs = [value.name for value in step.graph.input]
    own = [name for name in inputs if ".decoder." in name]
    given = [name for name in inputs if ".encoder." in name]
    computed = [value.name for value in cross.graph.output]
    outputs = [*step.graph.output, *cross.graph.output]
    weights = {w.name: w for graph in (step.graph, cross.graph) for w in graph.initializer}
    # What is done to a weight alone is done once, outside of both branches.
    alone = {
        node.output[0]: node
        for graph in (step.graph, cross.graph)
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    # Empty: an optional input that is not given.
    shared = {name: name for name in ("", *weights, *alone, *inputs)}

    # The first token: a past of length 0, and cross-attention from what the encoder said.
    crossed = dict(zip(given, (f"{CROSS}/{name}" for name in computed), strict=True))
    nothing = {name: f"{FIRST}/{name}" for name in own}
    first = [
        *_emptied(FIRST, own, nothing.values()),
        *_renamed(cross.graph, CROSS, shared),
        *_renamed(step.graph, FIRST, shared | crossed | nothing),
    ]
    # Later ones: cross-attention is as it was, and nothing is said of it.
    later = [
        *_renamed(step.graph, NEXT, shared),
        *_emptied(NEXT, given, [f"{NEXT}/{name}" for name in computed]),
    ]

    def branch(name: str, nodes: list[NodeProto], place: str) -> GraphProto:
        parts = ((name, step.graph.output), (place, cross.graph.output))
        said = [
            helper.make_value_info(f"{part}/{value.name}", value.type)
            for part, values in parts
            for value in values
        ]
        return helper.make_graph(nodes, name, [], said)

    choice = helper.make_node(
        "If", [BRANCH], [value.name for value in outputs], name=BRANCH,
        then_branch=branch(NEXT, later, NEXT), else_branch=branch(FIRST, first, CROSS),
    )  # fmt: skip
    branching = helper.make_tensor_value_info(BRANCH, TensorProto.BOOL, [1])
    nodes, read = [*alone.values(), choice], [*step.graph.input, branching]
    return _model(step, nodes, read, outputs, list(weights.values()))


def unmerged(path: Path) -> ModelProto:
    """The decoder as one graph without branches: that of later tokens and, beside it, what computes
    the keys and values of cross-attention as outputs `present.N.encoder.*`."""
    import onnx

    merged = onnx.load(path)
    *alone, choice = merged.graph.node
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    place = {
        f"{CROSS if '.encoder.' in value.name else NEXT}/{value.name}": value.name
        for value in merged.graph.output
    }
    nodes = [
        _copied(node, lambda name: place.get(name, name))
        for branch in (branches["then_branch"], branches["else_branch"])
        for node in _needed(branch.node, place)
    ]
    inputs = [value for value in merged.graph.input if value.name != BRANCH]
    return _model(merged, [*alone, *nodes], inputs, merged.graph.output, merged.graph.initializer)


def remerged(model: ModelProto) -> ModelProto:
    """What `unmerged` took apart, with the nodes and weights that it has by now."""
    graph = model.graph

    def part(outputs: Sequence[ValueInfoProto]) -> ModelProto:
        nodes = _needed(graph.node, [value.name for value in outputs])
        used = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in graph.initializer if tensor.name in used]
        return _model(model, nodes, graph.input, outputs, weights)

    cross = [value for value in graph.output if ".encoder." in value.name]
    return _merged(part(cross), part([value for value in graph.output if value not in cross]))


def _model(
    like: ModelProto,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Sequence[TensorProto],
) -> ModelProto:
    from onnx import helper

    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializer=weights)
    model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
    model.metadata_props.extend(like.metadata_props)
    return model


def _emptied(part: str, sources: Iterable[str], targets: Iterable[str]) -> list[NodeProto]:
    """Nodes that cut (batch, heads, length, head_dim) down to no length."""
    from onnx import helper

    zero, axis = f"{part}/zero", f"{part}/axis"
    return [
        helper.make_node("Constant", [], [zero], value_ints=[0]),
        helper.make_node("Constant", [], [axis], value_ints=[2]),
        *(
            helper.make_node("Slice", [source, zero, zero, axis], [target])
            for source, target in zip(sources, targets, strict=True)
        ),
    ]


def _needed(nodes: Sequence[NodeProto], results: Iterable[str]) -> list[NodeProto]:
    """Those that the results are computed from, in their order."""
    wanted, found = set(results), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def _renamed(graph: GraphProto, part: str, instead: Mapping[str, str]) -> list[NodeProto]:
    """Its nodes, but for those that `instead` has, with the names of a part of their own."""
    return [
        _copied(node, lambda name: instead.get(name, f"{part}/{name}"))
        for node in graph.node
        if node.output[0] not in instead
    ]


def _copied(node: NodeProto, rename: Callable[[str], str]) -> NodeProto:
    node = copy.deepcopy(node)
    node.name = rename(node.name)
    node.input[:] = map(rename, node.input)
    node.output[:] = map(rename, node.output)
    return node


def prompt_inputs(
    input_ids: np.ndarray, attention_mask: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What an encoder reads, both (batch, prompt)."""
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    found = {"input_ids": input_ids, "attention_mask": mask}
    return {name: np.ascontiguousarray(array, dtype=np.int64) for name, array in found.items()}


class OnnxEncoderDecoder(OnnxRunner):
    """The same for two graphs: the prompt goes to the encoder, and the decoder begins with its
    start token."""

    def __init__(self, path: Path, threads: int | None = None):
        super().__init__(path, threads)
        self._encoder = session_of(Path(path).with_name(ENCODER), threads)
        self._start = int(self._session.get_modelmeta().custom_metadata_map[START])

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits (batch, vocab) of the first token after the prompts (batch, prompt), of which
        those positions count whose mask is 1; forgets what came before."""
        feeds = self._values(prompt_inputs(input_ids, attention_mask))
        (hidden,) = self._encoder.run_with_ort_values(["last_hidden_state"], feeds)
        mask = feeds["attention_mask"]
        self._given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        return super().prefill(np.full((len(input_ids), 1), self._start))
