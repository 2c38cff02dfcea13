"""What a model weighs is its own: not the libraries that run it, and not the one before it."""

import pytest
import torch

from elastic.errors import RunError
from elastic.formats import hf, onnx, openvino
from elastic.latency.weigh import Load, weigh
from tests.helpers import tiny


def test_a_model_weighs_what_its_tensors_do(tmp_path):
    big, small = (
        tiny.llama(dtype=torch.float32, hidden_size=wide, intermediate_size=4 * wide)
        for wide in (768, 192)
    )
    loads, sizes = [], []
    # The heavier one first: it must leave nothing behind.
    for name, model in {"big": big, "small": small}.items():
        hf.write(model, None, tmp_path / name)
        settings = {"dtype": "float32", "device": "cpu"}
        loads.append(Load(runtime="hf", folder=str(tmp_path / name), settings=settings))
        sizes.append(sum(p.numel() for p in model.parameters()) * 4e-6)
    openvino.write(onnx.write(small, tmp_path / "onnx"), tmp_path / "openvino")
    for runtime in ("onnx", "openvino"):
        loads.append(Load(runtime=runtime, folder=str(tmp_path / runtime)))
    assert sizes[0] > 10 * sizes[1]
    for load, weight, size in zip(loads, weigh(loads), [*sizes, *sizes[1:] * 2], strict=True):
        assert 0.9 * size < weight.memory_mb < 2.2 * size + 30, load
        assert 0 < weight.load_s < 60


def test_what_cannot_be_weighed_says_why(tmp_path):
    with pytest.raises(
        RunError, match=r"onnx: memory and load time could not be measured: .*model"
    ):
        weigh([Load(runtime="onnx", folder=str(tmp_path))])
