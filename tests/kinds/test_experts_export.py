"""Mixtures of experts as files: folders of the family's class, or of a small one, and graphs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from elastic.__main__ import main
from elastic.config import MergeAdapterConfig, MergeConfig, ModelConfig
from elastic.exporting.foreign import Update
from elastic.exporting.merge import carrying, combine
from elastic.formats import gguf, hf, nemotron_nas, onnx, onnx_compressed, openvino, padding, peft
from elastic.formats.compression import compress
from elastic.formats.rounding import round_
from elastic.formats.runner import TorchRunner, runner_of
from elastic.formats.shards import tensors_of
from elastic.latency import bench
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.spaces.bound import SubAdapter
from elastic.spaces.uniform import nearest_uniform
from elastic.supernet.compact import compact
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.clock import drive
from tests.helpers.families import output
from tests.helpers.graphs import ROUNDED_TOLERANCE, Written, graph_runner
from tests.helpers.laws import close
from tests.helpers.mixtures import COUNT, FAMILIES, WIDTH, model_of, net_of, space_of
from tests.helpers.searches import choices_task
from tests.helpers.tiny_runs import fake_measure

SHARED = {"deepseek-v3"}
"""Families whose configuration has one width for routed and shared experts."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_the_same_function(family, tmp_path):
    """Of as many experts of one width in all layers, which the class's own config can say, and of
    many."""
    net = net_of(family)
    one = {g.name: g.choices[0 if g.dim == "rank" else -1] for g in net.space}
    mixed = {g.name: g.choices[-1 if ".0." in g.name else -2] for g in net.space}
    for number, choices in enumerate((one, mixed)):
        model = compact(net, SubAdapter(tuple(choices.items())))
        folder = hf.write(model, None, tmp_path / str(number))
        again = hf.load(folder, torch.float64)
        again.set_experts_implementation("eager")
        close(output(again), output(model), 1e-10)
        plain = not (folder / hf.CODE).exists()
        assert plain is (number == 0 and family not in SHARED)


def cut_model(family: str):
    net = net_of(family, dtype=torch.float32)
    model = compact(net, net.space.heuristic())
    model.config.use_cache = True
    return model


GRAPHS = [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt-oss")) for name in FAMILIES]
"""`slow` has all but one."""


@pytest.mark.parametrize("family", GRAPHS)
def test_every_runtime_computes_the_same(family, tmp_path):
    model, ids = cut_model(family), tiny.tokens(2, 9).numpy()
    modules = dict(model.named_modules())
    expected = drive(TorchRunner(model), ids, 5)
    graph = onnx.write(model, tmp_path)
    assert dict(model.named_modules()) == modules
    for runner in (onnx.OnnxRunner(graph),
                   openvino.OpenVINORunner(openvino.write(graph, tmp_path))):  # fmt: skip
        scale = np.abs(expected).max()
        np.testing.assert_allclose(drive(runner, ids, 5), expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("family", GRAPHS)
def test_a_compressed_graph_answers_as_the_rounded_model(family, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)
    model = cut_model(family)
    written = Written(model, tmp_path)
    for kind, mode in (("onnx", "int8"), ("openvino", "int4")):
        found = compress(written.paths[kind], tmp_path / kind, mode)
        logits = written.logits(graph_runner(found.path, exact=True))
        near = runner_of(round_(copy.deepcopy(model), mode, kind))
        atol = ROUNDED_TOLERANCE * abs(logits).max()
        np.testing.assert_allclose(written.logits(near), logits, rtol=0, atol=atol)
        assert abs(written.logits(runner_of(model)) - logits).max() > 10 * atol
        assert sum("experts." in name for name in found.weights) >= 2 * 2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_different_widths_are_filled_up_with_zeros(family):
    net = net_of(family)
    choices = {g.name: g.choices[-1 if ".0." in g.name else -2] for g in net.space}
    mixed = SubAdapter(tuple(choices.items()))
    assert "an expert of zeros would be chosen" in padding.why_not(net.space, mixed)
    one = {g.name: g.choices[-1] for g in net.space if g.dim == "experts"}
    mixed = SubAdapter(tuple((choices | one).items()))
    assert padding.why_not(net.space, mixed) is None
    small = compact(net, mixed)
    wider = padding.padded(small, net.space, mixed)
    assert hf.is_plain(wider) and not hf.is_plain(small)
    close(output(wider), output(small), 1e-10)


def test_the_nearest_of_one_size_is_of_one_size_for_all_experts():
    net = net_of("mixtral")
    choices = {g.name: g.choices[-1 if ".0." in g.name else 0] for g in net.space}
    near = nearest_uniform(net.space, SubAdapter(tuple(choices.items()))).as_dict()
    sizes = [
        {near[f"model.layers.{n}.{dim}"] for n in range(2)} for dim in ("experts", "expert_width")
    ]
    assert sizes == [
        {6},
        {16},
    ]  # 3 x 8 and 6 x 24: 6 x 32 is nearer than 4 x 32, 9 x 16 than 9 x 24
    assert hf.is_plain(compact(net, SubAdapter(tuple(near.items()))))


def test_what_has_no_words_for_them_says_so():
    net = net_of("mixtral", dtype=torch.float32)
    assert "cut the base model itself" in peft.why_not(net, net.space.minimal())
    assert peft.why_not(net, net.space.maximal()) is None
    assert "MixtralForCausalLM is not written as GGUF" in gguf.why_not(net.model)
    assert "no model of Llama's layers" in nemotron_nas.why_not(net.model)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3", "phimoe"])
def test_what_changes_experts_is_merged_in_the_order_and_size_of_the_cut_ones(family):
    """As if the base had had it all along."""
    generator = torch.Generator().manual_seed(1)
    net, other = net_of(family), Supernet(model_of(family), space_of(family), tiny.ADAPTERS["lora"])
    site = FAMILIES[family][1]
    router = next(m.router for m, _ in net.space.mixtures.values())
    names = [f"model.layers.1.{site}.gate_up_proj", f"model.layers.0.{site}.down_proj",
             f"{router}.weight"]  # fmt: skip
    deltas = {}
    for name in names:
        before = model_of(family).get_parameter(name)
        deltas[name] = 0.1 * torch.randn(before.shape, generator=generator, dtype=torch.float64)
        module, leaf = other.in_mixture(name)[1:]
        module.tensors()[leaf].data.add_(deltas[name])
    other.reorder(net.order)
    other.load_factors(net.factor_state())
    config = MergeConfig(adapters=[MergeAdapterConfig(path="x")])
    update = Update("theirs", "lora", deltas)
    for sub in (net.space.maximal(), net.space.minimal()):
        merged, _ = combine(net, sub, [update], config)
        expected = output(compact(other, sub))
        close(output(merged), expected, 1e-5)  # merged in float32
        with carrying(net, sub, [update], config) as active:
            close(output(active), expected, 1e-5)
    assert (output(compact(net, net.space.maximal())) - output(merged)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_it_is_written_a_block_at_a_time(family, tmp_path):
    """Where experts are tensors of their own on disk, those of one block are there at once."""
    net = net_of(family)
    model = compact(net, SubAdapter(tuple((g.name, g.choices[-1]) for g in net.space)))
    asked: list[str] = []
    makes = {
        name: lambda name=name, make=make: asked.append(name) or make()
        for name, make in tensors_of(model).items()
    }
    folder = hf.write(model, None, tmp_path, tensors=makes)
    again = hf.load(folder, torch.float64)
    again.set_experts_implementation("eager")
    close(output(again), output(model), 1e-10)
    assert sorted(asked) == sorted(set(asked)), "some were made twice"
    blocks = [name.split(".")[2] for name in asked if ".layers." in name]
    assert blocks == sorted(blocks)


def test_a_mixture_goes_all_the_way(tmp_path, monkeypatch, capsys):
    """Through the commands: trained, searched and exported, the export proved against the
    supernet."""
    monkeypatch.setattr(bench, "measure", fake_measure)
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    model = model_of("mixtral", torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    task = choices_task(tmp_path)
    rows = [f"--task.{key}={getattr(task, key)}"
            for key in ("name", "options", "train", "validation", "test")]  # fmt: skip
    once = ["--timing.prompt_tokens=4", "--timing.new_tokens=1", "--timing.rounds=1",
            "--timing.max_rounds=1"]  # fmt: skip
    assert not main(["train", "--run", str(run), "--model.path", str(tmp_path / "base"),
                     "--model.device=cpu", "--model.dtype=float32", "--adapter.rank=8",
                     "--batch_size=8", *rows])  # fmt: skip
    trained = load_super_adapter(
        loading.load_model(str(tmp_path / "base"), ModelConfig(path="x", device="cpu")),
        digest_of(tmp_path / "base"), run / "super_adapter",
    )  # fmt: skip
    assert {g.dim for g in trained.space} == {"heads", "experts", "expert_width"}
    assert trained.order["model.layers.0.expert_width"].shape == (COUNT, WIDTH)
    assert trained.compensation is not None
    assert not main(["search", str(run), "--trials=4", "--starts=3", *once])
    assert not main(["export", str(run), "--sub_adapter=minimal", "--formats=hf", *once])
    report = json.loads((run / "export" / "minimal" / "report.json").read_text())
    assert report["formats"]["hf"]["greedy_tokens_equal"]
    again = hf.load(run / "export" / "minimal" / "hf", torch.float32)
    assert again.config.num_local_experts == 3 and again.config.intermediate_size == 16
    assert not capsys.readouterr().err.count("Traceback")
