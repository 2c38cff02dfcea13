"""Factors of experts as files: adapters of PEFT, written, merged and taken over, and through the
commands."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from elastic.__main__ import main
from elastic.adapters.experts import as_they_lie
from elastic.config import MergeAdapterConfig, MergeConfig, ModelConfig
from elastic.errors import BaseMismatch
from elastic.exporting import foreign
from elastic.exporting.merge import carrying, combine
from elastic.files import read_json
from elastic.formats import hf, peft
from elastic.latency import bench
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run, save_super_adapter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.laws import close
from tests.helpers.mixtures import (
    COUNT,
    HIDDEN,
    WIDTH,
    adapted_net,
    factors_of,
    model_of,
    net_of,
)
from tests.helpers.searches import choices_task
from tests.helpers.tiny_runs import fake_measure

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LAID_OUT = ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"]
BOTH = {"target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}  # fmt: skip


# As an adapter of PEFT


def written(net: Supernet, sub, folder) -> None:
    peft.write(net, sub, folder, base_model="tiny")


def loaded(family: str, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|matched|mismatch)")
        return PeftModel.from_pretrained(model_of(family), str(folder)).eval()


@pytest.mark.parametrize("family", LAID_OUT)
def test_as_an_adapter_of_peft_it_is_the_same_function(family, tmp_path):
    """Where channels and experts stand in another order than the base's, and ranks differ."""
    net = adapted_net(family)
    whole = {g.name: g.choices[0] for g in net.space}
    ranks = {g.name: g.choices[-1 if ".0." in g.name else 0] for g in net.space if g.dim == "rank"}
    sub = SubAdapter(tuple((whole | ranks).items()))
    written(net, sub, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    with torch.no_grad(), net.active(sub):
        expected = output(net.model)
        # Channels of another order are summed in another one, and routers round to float32.
        close(output(loaded(family, tmp_path)), expected, 1e-5)
        assert (output(model_of(family)) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("matrices", [["down_proj"], ["gate_up_proj"]])
def test_an_adapter_of_peft_may_have_factors_of_one_matrix_of_some_blocks(matrices, tmp_path):
    space = factors_of("gpt-oss", matrices=matrices).as_dict()
    adapted = [f"mlp.experts.{name}" for name in matrices]
    groups = {name: group for name, group in space["groups"].items() if name != "rank"}
    declared = SearchSpace.from_dict(
        {"blocks": "model.layers.1", "adapt": adapted, "groups": groups}
    )
    net = Supernet(model_of("gpt-oss"), declared, tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    sub = net.space.maximal()
    written(net, sub, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.1.{adapted[0]}"]
    with torch.no_grad(), net.active(sub):
        close(output(loaded("gpt-oss", tmp_path)), output(net.model), 1e-5)


def test_a_cut_mixture_is_no_adapter_of_peft():
    net = adapted_net("mixtral")
    assert "cut the base model itself" in peft.why_not(net, net.space.minimal())


# Adapters of PEFT that were trained elsewhere


def saved_base(family: str, folder: Path) -> Path:
    model = model_of(family, torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def theirs(base: Path, folder: Path, **settings) -> tuple[Path, torch.Tensor]:
    """A saved adapter with nothing left at zero, and what PEFT computes with it."""
    model = get_peft_model(
        loading.load_model(str(base), ModelConfig(path=str(base), dtype="float32", device="cpu")),
        LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **settings),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        return folder, output(model.eval())


@pytest.mark.parametrize("family", LAID_OUT)
def test_an_adapter_of_peft_is_merged_and_beside_the_supernet_it_is_the_same(family, tmp_path):
    base = saved_base(family, tmp_path / "base")
    config = ModelConfig(path=str(base), dtype="float32", device="cpu")
    path, expected = theirs(base, tmp_path / "theirs", **BOTH)
    folder = foreign.identify(str(path), "any", config)
    update = foreign.read(folder, config, "any", [tiny.tokens(1, 7).numpy()])
    assert {name.rpartition(".")[2] for name in update.deltas} == {
        "gate_up_proj", "down_proj", "weight"
    }  # fmt: skip
    net = adapted_net(family, dtype=torch.float32)
    merging = MergeConfig(adapters=[MergeAdapterConfig(path="x")], weight=0.0)
    with torch.no_grad():
        whole, _ = combine(net, net.space.maximal(), [update], merging)
        close(output(whole), expected, 1e-4)
        merging = MergeConfig(adapters=[MergeAdapterConfig(path="x", weight=0.5)])
        for sub in (net.space.maximal(), net.space.minimal()):
            merged, _ = combine(net, sub, [update], merging)
            with carrying(net, sub, [update], merging) as active:
                close(output(active), output(merged), 1e-4)


def test_an_adapter_from_when_experts_were_layers_of_their_own_is_merged(tmp_path):
    """As transformers 4 had them. PEFT puts their factors together; the update is the same."""
    base, folder = saved_base("mixtral", tmp_path / "base"), tmp_path / "theirs"
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    for layer, expert in itertools.product(range(2), range(COUNT)):
        made = []
        for name, (out, into) in {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN),
                                  "w2": (HIDDEN, WIDTH)}.items():  # fmt: skip
            site = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            A = torch.randn(3, into, generator=generator)
            B = torch.randn(out, 3, generator=generator)
            tensors |= {f"{site}.lora_A.weight": A, f"{site}.lora_B.weight": B}
            made.append(2 * B @ A)
        expected[f"model.layers.{layer}.mlp.experts.gate_up_proj", expert] = torch.cat(made[:2])
        expected[f"model.layers.{layer}.mlp.experts.down_proj", expert] = made[2]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    config = ModelConfig(path=str(base), dtype="float32", device="cpu")
    update = foreign.read(foreign.identify(str(folder), "any", config), config, "any")
    assert set(update.deltas) == {name for name, _ in expected}
    for (name, expert), delta in expected.items():
        close(update.deltas[name][expert], delta, 1e-5)
    del tensors[site + ".lora_A.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BaseMismatch, match="theirs does not fit"):
        foreign.read(foreign.identify(str(folder), "any", config), config, "any")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_super_adapter_of_ours_is_merged_as_it_computes(family, tmp_path):
    base = saved_base(family, tmp_path / "base")
    digest = digest_of(base)
    other = adapted_net(family, dtype=torch.float32)
    save_super_adapter(other, tmp_path / "ours", model=ModelConfig(path=str(base)),
                       base_digest=digest)  # fmt: skip
    config = ModelConfig(path=str(base), dtype="float32", device="cpu")
    update = foreign.read(tmp_path / "ours", config, digest)
    net = net_of(family, dtype=torch.float32)
    merging = MergeConfig(adapters=[MergeAdapterConfig(path="x")], weight=0.0)
    with torch.no_grad():
        whole, _ = combine(net, net.space.maximal(), [update], merging)
        close(output(whole), output(compact(other, other.space.maximal())), 1e-4)


def run_of(base: Path, folder: Path, *flags: str) -> list[str]:
    task = choices_task(folder)
    rows = [f"--task.{key}={getattr(task, key)}"
            for key in ("name", "options", "train", "validation", "test")]  # fmt: skip
    return ["train", "--run", str(folder / "run"), "--model.path", str(base), "--model.device=cpu",
            "--model.dtype=float32", "--batch_size=8", *rows, *flags]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [BOTH, {"target_modules": [], "target_parameters": ["experts.down_proj"]}],
    ids=["both", "one"],
)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_an_adapter_of_peft_is_taken_over(family, settings, tmp_path):
    """Its ranks sorted for every expert: the leading ones are its best approximation."""
    base = saved_base(family, tmp_path / "base")
    path, expected = theirs(base, tmp_path / "theirs", **settings)
    assert not main(
        run_of(base, tmp_path, "--adapter.from", str(path), "--compensation_examples=8")
    )
    _, _, net = load_run(Run(tmp_path / "run"))
    with torch.no_grad(), net.active(net.space.maximal()) as model:
        close(output(model), expected, 1e-4)
    merged = PeftModel.from_pretrained(model_of(family, torch.float32), path).merge_and_unload()
    for name in {"model.layers.1.mlp.experts.down_proj", *net.space.targets}:
        if (mixture := net.space.experts_of(name)) is None:
            continue
        whole = model_of(family, torch.float32).get_parameter(name)
        update = merged.get_parameter(name).detach() - whole
        best = torch.linalg.svdvals(update.double())[:, 2:].square().sum()
        A, B = net.layer(name).adapter.factors(2)
        orders = net.expert_orders(mixture.experts)
        factors = net.mixtures[mixture.experts].experts.factors[name.rpartition(".")[2]]
        of_base = factors.of_base(A.detach(), B.detach(), *orders)
        A, B = as_they_lie(*of_base, factors.is_transposed)
        assert float((update - B @ A).double().square().sum()) == pytest.approx(float(best), 1e-3)


# Through the commands


def test_a_mixture_with_factors_goes_all_the_way(tmp_path, monkeypatch, capsys):
    """Trained, searched and exported, every export proved against the supernet."""
    monkeypatch.setattr(bench, "measure", fake_measure)
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    base = saved_base("gpt-oss", tmp_path / "base")
    space = tmp_path / "space.yaml"
    space.write_text(json.dumps(factors_of("gpt-oss").as_dict()))
    flags = ["--space", str(space), "--adapter.rank=8", "--ranks=elastic"]
    assert not main([*run_of(base, tmp_path, *flags), "--dry_run=true"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not main([*run_of(base, tmp_path, *flags)])
    run = tmp_path / "run"
    _, _, net = load_run(Run(run))
    assert told["trained"] == sum(p.numel() for _, a in net.adapters() for p in a.parameters())
    assert list(told["trained_by"]) == ["lora"]
    moved = [a.B.abs().amax((1, 2)) for site, a in net.adapters() if net.space.experts_of(site)]
    assert len(moved) == 4 and all(float(each.max()) > 0 for each in moved)
    once = ["--timing.prompt_tokens=4", "--timing.new_tokens=1", "--timing.rounds=1",
            "--timing.max_rounds=1"]  # fmt: skip
    assert not main(["search", str(run), "--trials=4", "--starts=3", *once])
    assert not main(["export", str(run), "--sub_adapter=minimal", "--formats=hf", *once])
    assert not main(["export", str(run), "--sub_adapter=maximal", "--formats=hf,peft", *once])
    for name, formats in (("minimal", ["hf"]), ("maximal", ["hf", "peft"])):
        report = read_json(run / "export" / name / "report.json")
        for each in formats:
            assert report["formats"][each]["greedy_tokens_equal"], (name, each)
    again = hf.load(run / "export" / "minimal" / "hf", torch.float32)
    assert again.config.num_local_experts == 3
    assert not capsys.readouterr().err.count("Traceback")
