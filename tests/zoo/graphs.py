"""What comes of a family as a graph: whether ONNX Runtime computes what torch does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from elastic.errors import ElasticError
from elastic.formats import onnx
from elastic.formats.runner import Runner, runner_of
from elastic.models.kinds import Kind, kind_of, no_graph
from elastic.supernet.compact import compact
from elastic.supernet.discovery import discover
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.clock import drive
from tests.zoo.building import config_of, model_of
from tests.zoo.judging import RIGHT, WRONG, shortened, skeleton_of

DIFFERS = "differs, which the proof of an export notices"
TOLERANCE = 1e-4
"""Of the largest logit, in float32."""


def judge_graph(model_type: str, use: str) -> str:
    """Of a family that is right: "right", too, or why there is no such graph."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = _smallest(model_type, use, Path(folder))
            if reason := no_graph(kind_of(model), model.config):
                return reason
            return RIGHT if _same(model, Path(folder)) else DIFFERS
        except ElasticError as error:
            return shortened(str(error), folder)
        except Exception as error:  # what must not be: no line of ours
            return shortened(f"{WRONG}: {type(error).__name__}: {error}", folder)


def _smallest(model_type: str, use: str, folder: Path) -> PreTrainedModel:
    config = config_of(model_type, use)
    space = discover(skeleton_of(config, model_type, use, folder / "base"))
    net = Supernet(model_of(config, use, torch.float32), space, tiny.ADAPTERS["lora"])
    model = compact(tiny.randomize_(net), net.space.minimal())
    model.config.use_cache = True
    return model


def _same(model: PreTrainedModel, folder: Path) -> bool:
    """At other lengths than it is traced with, and token by token."""
    graph = onnx.open_runner(onnx.write(model, folder))
    expected, found = (_said(runner, kind_of(model)) for runner in (runner_of(model), graph))
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())


def _said(runner: Runner, kind: Kind) -> np.ndarray:
    ids = tiny.tokens(2, 9).numpy()
    if kind is Kind.CLASSIFIER:
        return np.stack([runner.prefill(ids[:, :length]).copy() for length in (2, 5, 9)])
    return drive(runner, ids, 5)
