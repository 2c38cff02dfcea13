"""A folder of every size, loaded by transformers: each is the slice that `elastic.load` gives."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import sys

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from elastic.config import BudgetConfig
from elastic.errors import ConfigError
from elastic.formats import any_size, choosing, slices
from elastic.formats.auto_class import auto_of
from elastic.models.modules import modules_of
from elastic.provenance import provenance
from elastic.serving.budget import as_budget
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.formats.test_slices import DEPTHS, cut, write
from tests.helpers import tiny
from tests.helpers.families import ROUNDED, model_of, output
from tests.helpers.laws import close, pair
from tests.kinds.test_query_heads import net_of


def loaded(folder, **wanted):
    config = json.loads((folder / "config.json").read_text())
    auto = getattr(transformers, auto_of(config["architectures"][0]))
    return auto.from_pretrained(folder, trust_remote_code=True, **wanted)


def params(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same(folder, one, rounded: float | None = 1e-12) -> None:
    """What transformers loads is the slice, to the bit, and computes what it does."""
    found, expected = loaded(folder, slice=one.name), one.model
    assert type(found).__name__ == f"Elastic{type(expected).__name__}"
    turned = {f"{name}.weight" for name, _ in modules_of(found, Conv1D)}
    state = {k: x.T if k in turned else x for k, x in found.state_dict().items()}
    assert list(state) == list(expected.state_dict()) and params(found) == params(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor.to(found.dtype)), f"{one.name}: {name}"
    if rounded is not None:
        with torch.no_grad():
            close(output(found), output(expected), rounded)


@pytest.mark.parametrize(
    "family", ["llama, tied", "phi3", "gpt2", "bert, classes", "llama, classes", "t5"]
)
def test_every_kind_of_family(family, tmp_path):
    """With layers of its own, and a classifier's head."""
    _, net, _ = pair(family)
    for head in net.head.values():
        head.data.add_(0.1)
    made = cut(net, degree=0.5)[-1:]
    write(net, tmp_path, made)
    same(tmp_path, *made, 1e-6 if family in ROUNDED else 1e-12)


@pytest.mark.parametrize("method", ["sorsa", "soslora"])
def test_every_method_stored_in_half(method, tmp_path):
    """Rounded once, after all sums."""
    _, net, _ = pair("llama", method)
    net.model.to(torch.bfloat16).to(torch.float32)  # what a stored base is computed from
    made = cut(net)[-1:]
    write(net, tmp_path, made, torch.bfloat16)
    same(tmp_path, *made, None)
    wide = loaded(tmp_path, slice=made[0].name, dtype=torch.float32).state_dict()
    for name, tensor in made[0].model.state_dict().items():
        assert torch.equal(wide[name], tensor.bfloat16().float())


def test_blocks(tmp_path):
    value = tiny.space_dict(heads=True)
    value["groups"]["depth"] = DEPTHS
    base = model_of("llama", layers=4)
    base.generation_config.repetition_penalty = 1.5
    net = Supernet(base, SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net) | {"model.layers.*.depth": torch.tensor([3, 1, 2, 0])})
    tiny.randomize_(net)
    small = cut(net, degree=1.0)[1]
    write(net, tmp_path, [small])
    same(tmp_path, small)
    found = loaded(tmp_path, slice="small")
    assert found.config.num_hidden_layers == 2
    ids = {"inputs": tiny.tokens(1, 5), "max_new_tokens": 4, "do_sample": False}
    small.model.generation_config = base.generation_config
    assert torch.equal(found.generate(**ids), small.model.generate(**ids))
    assert found.generation_config.repetition_penalty == 1.5


def test_axes_of_several_parts(tmp_path):
    net = net_of(torch.float32)
    made = cut(net)[1:2]
    write(net, tmp_path, made, torch.float32)
    same(tmp_path, *made, 1e-6)  # its norms are torch's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sizes") / "folder"
    place.mkdir()
    net = tiny.supernet(heads=True, dtype=torch.float32)
    made = cut(net)
    for one, accuracy in zip(made, (0.9, 0.6, 0.8), strict=True):
        one.figures.update(validation_estimate=accuracy, best=one.name == "front-1")
    times = {"full": 100.0, "small": 50.0, "front-1": 80.0}
    table = {
        "device": provenance("cpu")["device"], "dtype": "float32", "runtime": "torch",
        "merged": True, "batch": 1, "prompt_tokens": 4, "new_tokens": 2,
        "slices": {k: {"prefill_ms": v, "decode_ms": v / 10} for k, v in times.items()},
    }  # fmt: skip
    write(net, place, made, torch.float32, [table])
    return place


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({}, "front-1"),
        ({"slice": "small"}, "small"),
        ({"budget": {"prefill_ms": 80}}, "front-1"),
        ({"budget": "60%", "device_map": "cpu"}, "small"),
        ({"budget": {"max_accuracy_drop": 0.2}}, "front-1"),
    ],
)
def test_the_size_that_was_asked_for(folder, wanted, name):
    assert params(loaded(folder, **wanted)) == slices.read(folder)["slices"][name]["params"]


def test_what_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match=r"no slice meets the budget.*cheapest: small"):
        loaded(folder, budget=1)
    with pytest.raises(ValueError, match="no slice 'front-9'; choose from full, small, front-1"):
        loaded(folder, slice="front-9")
    with pytest.raises(ValueError, match="the one or the other"):
        loaded(folder, slice="full", budget=3)


def test_another_device_is_measured(folder, tmp_path, caplog):
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    index = slices.read(there)
    index["latencies"][0]["device"] = "a phone"
    (there / slices.INDEX).write_text(json.dumps(index))
    assert params(loaded(there, budget=1e9)) == index["slices"]["full"]["params"]
    assert "Not known on cpu" in caplog.text and "as on a phone" in caplog.text


def test_a_saved_slice_is_a_folder_of_one_size(folder, tmp_path):
    small = loaded(folder, slice="small")
    small.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(tiny.logits(again, tiny.tokens()), tiny.logits(small, tiny.tokens()))
    with pytest.raises(ValueError, match="one size alone"):
        loaded(tmp_path, slice="small")


def test_a_tokenizer_and_settings_are_found_without_code(folder):
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert found("3 + 4")["input_ids"] == tiny.tokenizer()("3 + 4")["input_ids"]
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == tiny.EOS


def test_damaged_files_are_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for name in ("super_adapter/factors.safetensors", "base/model.safetensors"):
        (broken / name).write_bytes((folder / name).read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"(factors\.safetensors|base): damaged"):
            loaded(broken, slice="full")
        shutil.copy(folder / name, broken / name)
    (broken / "sizes.json").write_text("{")
    with pytest.raises(ValueError, match=r"sizes\.json: damaged"):
        loaded(broken, slice="full")


def test_a_base_elsewhere_is_for_this_package_alone(tmp_path):
    net = tiny.supernet(dtype=torch.float32)
    write(net, tmp_path / "folder", cut(net)[:1], base=tiny.save_tiny(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"not in this folder; pip install elastic-adapters"):
        loaded(tmp_path / "folder", slice="full")


def test_the_classes_need_no_package_of_ours(folder):
    """Nor anything else that transformers does not bring."""
    imported = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    others = imported - set(sys.stdlib_module_names)
    assert others == {"torch", "transformers", "safetensors", "huggingface_hub"}
    assert (folder / "any_size.py").read_text() == inspect.getsource(any_size)


BUDGETS = ["80%", 3, "2.5", {"params": "50%", "min_accuracy": 0.5}, {"max_accuracy_drop": "10%"}]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_means_the_same_to_both(budget):
    """To the settings of a search and to the classes in the folder."""
    full = {"prefill_ms": 100.0, "params": 1000.0, "min_accuracy": 0.9}
    assert choosing.limits_of(budget) == as_budget(budget).limits()
    assert choosing._absolute(choosing.limits_of(budget), full) == as_budget(budget).resolved(full)
    assert set(choosing.LIMITS) == set(BudgetConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "budget", ["fast", 0, -1, float("inf"), float("nan"), {"prefil_ms": 3}, {"min_accuracy": 1.5},
               {"max_accuracy_drop": "101%"}, "0%"]
)  # fmt: skip
def test_what_is_no_budget_is_none_to_both(budget):
    with pytest.raises(ConfigError):
        as_budget(budget)
    with pytest.raises(ValueError, match=r"budget"):
        choosing.limits_of(budget)


def test_a_device_has_one_name():
    assert choosing.device_name("cpu") == provenance("cpu")["device"]
