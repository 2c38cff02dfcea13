"""Trained runs that exports go into."""

from __future__ import annotations

import pytest

from elastic.config import ModelConfig
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers.exports import TOLERANCE
from tests.helpers.tiny_runs import copy_run, randomize_factors, train_config


@pytest.fixture(scope="session")
def runs_once(tiny_folder, tmp_path_factory):
    """What `runs` are copies of."""
    found = {}
    for dtype in TOLERANCE:
        folder = tmp_path_factory.mktemp(dtype)
        model = ModelConfig(path=str(tiny_folder), dtype=dtype, device="cpu")
        found[dtype] = train_one(train_config(tiny_folder, folder / "run", model=model))
        randomize_factors(found[dtype])
    return found


@pytest.fixture(scope="module")
def runs(runs_once, tmp_path_factory):
    """By dtype, a run whose factors are large enough to show. Exports go into it, under one name
    per test."""
    return {
        dtype: copy_run(run, tmp_path_factory.mktemp(dtype) / "run")
        for dtype, run in runs_once.items()
    }


@pytest.fixture(scope="module")
def run(runs):
    return runs["float32"]


@pytest.fixture(scope="module")
def nets(runs):
    """By dtype, the supernet, which no test changes."""
    return {dtype: load_run(run)[2] for dtype, run in runs.items()}
