"""What a model weighs is its own: not the libraries that run it, and not the one before it."""

import pytest
import torch

from elastic.errors import RunError
from elastic.formats import hf, onnx
from elastic.formats.weigh import Load, weigh
from tests import tiny


def test_a_model_weighs_what_its_tensors_do(tmp_path):
    loads, sizes = [], []
    for wide in (1024, 256):  # the heavier one first: it must leave nothing behind
        model = tiny.llama(dtype=torch.float32, hidden_size=wide, intermediate_size=4 * wide)
        size = sum(p.numel() for p in model.parameters()) * 4e-6
        hf.write(model, None, tmp_path / f"hf-{wide}")
        onnx.write(model, tmp_path / f"onnx-{wide}")
        for runtime, settings in (("hf", {"dtype": "float32", "device": "cpu"}), ("onnx", {})):
            folder = str(tmp_path / f"{runtime}-{wide}")
            loads.append(Load(runtime=runtime, folder=folder, settings=settings))
            sizes.append(size)
    found = weigh(loads)
    assert sizes[0] > 10 * sizes[2]
    for load, weight, size in zip(loads, found, sizes, strict=True):
        assert 0.9 * size < weight.memory_mb < 2.2 * size + 40, load
        assert 0 < weight.load_s < 60


def test_what_cannot_be_weighed_says_why(tmp_path):
    with pytest.raises(
        RunError, match=r"onnx: memory and load time could not be measured: .*model"
    ):
        weigh([Load(runtime="onnx", folder=str(tmp_path))])
