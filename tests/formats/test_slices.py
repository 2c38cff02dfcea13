"""A slice that is loaded is, bit for bit, the one that was cut out in memory."""

from __future__ import annotations

import copy
import csv
import functools
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import elastic
from elastic.config import ModelConfig
from elastic.errors import BaseMismatch, ConfigError, RunError
from elastic.formats import hf, matformer, slices
from elastic.formats.slices import Slice
from elastic.models.digest import digest_of
from elastic.models.meter import Meter
from elastic.models.wrappers import text_config
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of, output
from tests.helpers.laws import close, mixed, pair, some_moments

HEADS = {True: "classification", False: "auto"}
DEPTHS = {"dim": "depth", "choices": [1.0, 0.5], "drop_ends": True}


def cut(net: Supernet, degree: float = 0.0) -> list[Slice]:
    """The extremes and one between, two of which make up for what they cut."""
    net.compensation = some_moments(net)
    found = []
    for name, sub in (("full", net.space.maximal()), ("small", net.space.minimal()),
                      ("front-1", mixed(net))):  # fmt: skip
        model = compact(net, sub, degree)
        cost = count(model)
        figures = {"params": cost.params, "macs": cost.macs, "accuracy": 0.5, "accuracy_n": 8}
        found.append(Slice(name, sub, model, {**figures, "accuracy_interval": [0.2, 0.8]}))
    return found


def write(net: Supernet, folder, made, dtype=torch.float64, latencies=(), base=None) -> None:
    """With a copy of the base, or a reference to the one in the folder `base`."""
    config = net.model.config
    classes = list(config.id2label.values()) if net.head else []
    model = ModelConfig(path=str(base or "tiny"), head=HEADS[bool(classes)], classes=classes)
    slices.write(
        net, tiny.tokenizer(), made, folder, model=model, dtype=dtype, latencies=latencies,
        referred=base and digest_of(base),
    )  # fmt: skip


def holders(model) -> list[str]:
    """Names of the modules that hold the model's own configuration, or its language model's."""
    configs = (model.config, text_config(model.config))
    return [name for name, module in model.named_modules()
            if any(vars(module).get("config") is each for each in configs)]  # fmt: skip


def same(folder, made, family, dtype=torch.float64, **settings) -> None:
    for one in made:
        loaded = slices.load(folder, one.name, **settings)
        assert holders(loaded) == holders(one.model)
        state = loaded.state_dict()
        expected = one.model.state_dict()
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor.to(dtype)), name
        as_stored = copy.deepcopy(one.model).to(dtype)
        with torch.no_grad():
            close(output(loaded), output(as_stored), 1e-6 if family in ROUNDED else 1e-12)


# Heads that loading makes are in the tests of exports.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("bert, a score", "minilm")])
def test_every_family(family, tmp_path):
    _, net, _ = pair(family)
    made = cut(net, degree=0.5)
    write(net, tmp_path, made)
    same(tmp_path, made, family)


def test_depth_and_heads(tmp_path):
    """Blocks that are left out, and channels of those that stay."""
    base = model_of("llama", layers=4)
    value = tiny.space_dict(heads=True)
    value["groups"]["depth"] = DEPTHS
    net = Supernet(copy.deepcopy(base), SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    made = cut(net, degree=1.0)
    write(net, tmp_path, made)
    same(tmp_path, made, "llama")
    assert slices.load(tmp_path, "small").config.num_hidden_layers == 2


def table_of(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / slices.TABLE).read_text().splitlines()))


def test_the_table_says_sizes_as_mistral_rs_reads_them(tmp_path):
    """Whatever else is in it: widths of the layers that run, and which do not."""
    value = tiny.space_dict()
    value["groups"]["depth"] = DEPTHS
    base = model_of("llama", layers=4)
    net = Supernet(base, SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net) | {"model.layers.*.depth": torch.tensor([3, 1, 0, 2])})
    write(net, tmp_path, cut(net))
    rows = {row["name"]: row for row in table_of(tmp_path)}
    assert list(rows) == ["full", "small", "front-1"]
    for name, row in rows.items():
        loaded = slices.load(tmp_path, name)
        widths = [layer.mlp.down_proj.in_features for layer in loaded.model.layers]
        assert json.loads(row["FFN Hidden Dims"]) == widths
        assert int(row["# Layers"]) == len(widths) == loaded.config.num_hidden_layers
        assert float(row["# Effective Params (B)"]) == count(loaded).params / 1e9
        assert row["slice"] == name and row["MMLU PT accuracy"] == ""
    assert rows["full"]["Layers Skipped"] == "" and rows["small"]["Layers Skipped"] == "[0, 2]"


@pytest.mark.slow
def test_mistral_rs_reads_the_table_and_slices_no_llama_by_it(tmp_path):
    """As docs/guides/any-budget.md says: what it answers is the full size's, whatever slice is
    asked for."""
    mistralrs = pytest.importorskip("mistralrs")
    from tokenizers import decoders

    from tests.formats.test_gguf import TOKENIZER

    net = Supernet(
        model_of("llama", torch.float32, vocab_size=330), tiny.space(), tiny.ADAPTERS["lora"]
    )
    write(net, tmp_path, cut(net), dtype=torch.float32)
    table, base = tmp_path / slices.TABLE, tmp_path / "base"
    byte_level = copy.deepcopy(TOKENIZER)
    byte_level.backend_tokenizer.decoder = decoders.ByteLevel()
    hf.write_tokenizer(byte_level, base)

    def answer(**sliced) -> str:
        plain = mistralrs.Which.Plain(
            model_id=str(base), arch=mistralrs.Architecture.Llama, **sliced
        )
        runner = mistralrs.Runner(which=plain, no_paged_attn=True)
        asked = mistralrs.CompletionRequest(
            model="", prompt="Tom has 12", max_tokens=8, temperature=0.0
        )
        return runner.send_completion_request(asked).choices[0].text

    full = answer()
    for name in ("full", "small"):
        assert answer(matformer_config_path=str(table), matformer_slice_name=name) == full
    table.write_text(table.read_text().replace("FFN Hidden Dims", "widths"))
    with pytest.raises(ValueError, match=r"Failed to parse CSV"):
        answer(matformer_config_path=str(table), matformer_slice_name="full")


@pytest.mark.parametrize("family", ["t5", "gpt-neox"])
def test_two_stacks_and_widths_that_stay_are_nothing_to_mistral_rs(family, tmp_path):
    _, net, _ = pair(family)
    if family == "gpt-neox":
        value = SearchSpace.load(FAMILIES[family][1]).as_dict()
        value["groups"] = {k: v for k, v in value["groups"].items() if v["dim"] != "width"}
        net = Supernet(model_of(family), SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    write(net, tmp_path, cut(net))
    [row, *_] = table_of(tmp_path)
    assert row["slice"] == "full" and not set(row) & set(matformer.COLUMNS)


def test_a_model_larger_than_memory_is_written_a_shard_at_a_time(tmp_path):
    """Beside it, what is made of one tensor, and the factors."""
    base, net, bare = pair("llama")
    stream, sub, shard = functools.partial(streamed, base, bare), net.space.minimal(), 100_000
    found = stream(sub)
    one = Slice("small", sub, found.model, {"params": 0, "macs": 0}, found.tensors)
    largest = max(tensor.nbytes for tensor in base.state_dict().values())
    assert sum(tensor.nbytes for tensor in base.state_dict().values()) > 7 * shard
    held = [*base.state_dict().values(), *bare.factor_state().values(), *bare.model.parameters()]
    with Meter(held).recording() as meter:
        slices.write(
            bare, tiny.tokenizer(), [one], tmp_path, model=ModelConfig(path="tiny"),
            dtype=torch.float64, max_shard_size=shard, stream=stream,
        )  # fmt: skip
    assert meter.peak <= shard + 3 * largest
    same(tmp_path, [replace(one, model=compact(net, sub))], "llama")


@pytest.fixture
def referring(tmp_path):
    """A folder that refers to the base of a family: the base's folder, this one, its slices."""

    def made_of(family, **settings):
        base, net, _ = pair(family, **settings)
        for head in net.head.values():
            head.data.add_(0.1)
        hf.write(base, tiny.tokenizer(), tmp_path / "base")
        made = cut(net, degree=0.5)
        write(net, tmp_path / "folder", made, base=tmp_path / "base")
        return tmp_path / "base", tmp_path / "folder", made

    return made_of


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "bert, classes", "t5"])
def test_a_base_that_is_referred_to(family, referring):
    """Its channels stand in their own order, and no weights of it are in the folder."""
    base, folder, made = referring(family)
    assert f"looked for at `{base}`" in (folder / "README.md").read_text()
    weights = [file.name for file in folder.rglob("*.safetensors")]
    assert sorted(weights) == sorted(
        ["factors.safetensors", "order.safetensors", "small.safetensors", "front-1.safetensors"]
    )
    same(folder, made, family)


def test_a_base_that_has_moved(referring, forbid_weights, monkeypatch):
    base, folder, made = referring("llama")
    there = base.rename(base.with_name("moved"))
    with pytest.raises(RunError, match=r"its base model is not in the folder.*base=PATH"):
        slices.load(folder, "small")
    other = tiny.save_tiny(base.with_name("other"))
    with pytest.raises(BaseMismatch, match=f"was trained on {base} with sha256:"):
        slices.load(folder, "small", base=str(other))
    with pytest.raises(BaseMismatch, match="was trained on"):
        elastic.load(folder, resizable=True, slice="small", base=other)
    monkeypatch.undo()
    same(folder, made, "llama", base=str(there))


def test_a_base_that_is_referred_to_is_resized(referring):
    _, folder, made = referring("llama")
    model = elastic.load(folder, resizable=True, slice="full")
    for one in made:
        model.resize(one.name)
        with torch.no_grad():
            close(output(model), output(one.model), 1e-9)


def test_a_copy_has_no_other_place(tmp_path):
    _, net, _ = pair("llama")
    write(net, tmp_path, cut(net)[:1])
    with pytest.raises(ConfigError, match="the base is in the folder; leave it out"):
        elastic.load(tmp_path, slice="full", base="elsewhere")


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method_stored_in_half(method, tmp_path):
    """Rounded once, after all sums: as the folder of that size alone is."""
    _, net, _ = pair("llama", method)
    net.model.to(torch.bfloat16).to(torch.float32)  # what a stored base is computed from
    made = cut(net)
    write(net, tmp_path, made, torch.bfloat16)
    for one in made:
        loaded = slices.load(tmp_path, one.name).state_dict()
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(loaded[name], tensor.to(torch.bfloat16)), name


def test_a_slice_has_of_its_own_what_makes_up_for_cuts_alone(tmp_path):
    _, net, _ = pair("llama")
    write(net, tmp_path, cut(net, degree=1.0))
    about = slices.read(tmp_path)["slices"]
    assert [about[name]["own"] for name in ("full", "small", "front-1")] == [False, True, True]
    with safe_open(tmp_path / "small.safetensors", "pt") as tensors:
        assert all(name.endswith("down_proj.weight") for name in list(tensors.keys()))
