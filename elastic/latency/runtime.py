"""The runtime that is timed: whether it is there, and a runner for a model in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from elastic.console import say
from elastic.errors import ConfigError
from elastic.formats import compression, graphs
from elastic.formats.runner import Runner, TorchRunner, runner_of
from elastic.models import loading, requirements
from elastic.models.kinds import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from elastic.config import ModelConfig, TimingConfig


def timing_of(timing: TimingConfig, model: ModelConfig) -> TimingConfig:
    """As configured, without decoding what a classifier does not decode; ConfigError for a batch of
    sequences whose states transformers would mix."""
    kind = loading.kind_of_base(model)
    if kind is Kind.RECURRENT and timing.batch > 1:
        raise ConfigError(
            f"timing.batch {timing.batch}: transformers decodes one sequence at a time of "
            f"{loading.architecture_of(model).model_type}; choose 1"
        )
    return replace(timing, new_tokens=0) if kind is Kind.CLASSIFIER else timing


def timed_runner(model: PreTrainedModel, timing: TimingConfig) -> TorchRunner:
    """A transformers model as it is timed: on a GPU it decodes from a graph, unless its code cannot
    be captured."""
    plain = runner_of(model)
    if model.device.type != "cuda" or type(plain) is not TorchRunner:
        return plain
    from elastic.latency.cuda import GraphRunner

    try:
        return GraphRunner(model, timing.batch, timing.prompt_tokens + timing.new_tokens)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        say(f"{type(model).__name__} decodes without a CUDA graph, kernel by kernel: {reason}")
        return plain


def require_runtime(runtime: str, model: ModelConfig) -> None:
    """MissingExtra unless this runtime is installed, ModelError where it cannot run such a model;
    asked before anything slow begins."""
    if runtime == "torch":
        return
    requirements.require_graph(model, f"timing.runtime {runtime}")
    graphs.require(runtime)


def open_runner(
    timing: TimingConfig,
    model: PreTrainedModel,
    directory: Path | None,
    compress: str | None = None,
) -> Runner:
    """A runner for `model` in the runtime to be timed; onnx and openvino write it into `directory`
    first (float32, then with compressed weights if asked)."""
    if timing.runtime == "torch":
        return timed_runner(model, timing)
    assert directory is not None
    graph = graphs.write(model, directory, timing.runtime)
    if compress:
        graph = compression.compress(graph, directory / compress, compress).path
    runner: Runner = graphs.MODULES[timing.runtime].open_runner(graph)
    return runner
