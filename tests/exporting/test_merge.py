"""Merging other adapters: permuted and cut like the base, combined as PEFT combines."""

import json
import math

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from elastic import __main__
from elastic.config import ExportConfig, MergeAdapterConfig, MergeConfig, ModelConfig
from elastic.errors import BaseMismatch, ConfigError, RunError
from elastic.exporting import foreign
from elastic.exporting.command import export
from elastic.exporting.foreign import Update
from elastic.exporting.merge import combine
from elastic.formats import hf
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run, save_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.laws import MERGED, close, some_moments
from tests.helpers.tiny import logits, tokens
from tests.helpers.tiny_runs import ONE_ROUND, copy_run, move_factors, snapshot, train_config

# peft 0.21 still reads the old name of a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WIDE = ModelConfig(dtype="float64", device="cpu")
LORA = dict(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
KINDS = {
    "lora": LORA,
    "patterns": LORA | {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"up_proj": 1}},
    "dora": LORA | {"use_dora": True},
    "rslora": LORA | {"use_rslora": True},
    "bias": LORA | {"bias": "lora_only"},
}


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


def base_of(folder) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float64", device="cpu")


def load_base(folder):
    return loading.load_model(str(folder), base_of(folder))


def peft_adapter(folder, path, seed: int = 0, **settings):
    """A saved PEFT adapter with every tensor moved, and the model that carries it."""
    model = moved_(get_peft_model(load_base(folder), LoraConfig(**(LORA | settings))), seed)
    model.save_pretrained(path)
    return model.eval()


def moved_(model, seed: int = 0):
    """Every trained tensor with noise: what starts at zero would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise)
    return model


def net_of(folder, method: str = "lora", *, heads: bool = True) -> Supernet:
    """A randomized supernet on the saved base, its channels permuted."""
    adapter, base = tiny.ADAPTERS[method], load_base(folder)
    net = Supernet(base, tiny.space(heads=heads), adapter)
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def merged(net, sub, updates, **settings):
    weights = settings.pop("weights", [1.0] * len(updates))
    entries = [
        MergeAdapterConfig(path=u.name, weight=w) for u, w in zip(updates, weights, strict=True)
    ]
    return combine(net, sub, updates, MergeConfig(adapters=entries, **settings))


@pytest.mark.parametrize("degree", [0.0, 0.5])
def test_what_is_cut_of_another_adapter_is_made_up_for_as_what_is_cut_of_the_base(folder, degree):
    """As if it had been merged into the base before anything was cut."""
    net, base = net_of(folder), load_base(folder)
    generator = torch.Generator().manual_seed(3)
    weights = [f"{site}.weight" for site in net.space.reading]
    deltas = {
        name: 0.1 * torch.randn(base.get_parameter(name).shape, generator=generator).double()
        for name in weights
    }
    for name, delta in deltas.items():
        base.get_parameter(name).data += delta
    other = Supernet(base, tiny.space(heads=True), tiny.ADAPTERS["lora"], order=net.order)
    other.load_factors(net.factor_state())
    net.compensation = other.compensation = some_moments(net)
    entries = MergeConfig(adapters=[MergeAdapterConfig(path="theirs")])
    update, sub = Update("theirs", "lora", deltas), net.space.minimal()
    found, _ = combine(net, sub, [update], entries, degree=degree)
    close(logits(found, tokens()), logits(compact(other, sub, degree), tokens()), MERGED)


def read_peft(folder, path) -> Update:
    return foreign.read(foreign.identify(str(path), "any"), base_of(folder), "any")


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_adapter_is_what_peft_merges(folder, tmp_path, kind):
    theirs = peft_adapter(folder, tmp_path / "theirs", **KINDS[kind])
    update = read_peft(folder, tmp_path / "theirs")
    assert update.kind == f"peft {'dora' if kind == 'dora' else 'lora'}"
    model = load_base(folder)
    for name, delta in update.deltas.items():
        model.get_parameter(name).data += delta
    close(logits(model, tokens()), logits(theirs, tokens()), MERGED)
    assert not torch.allclose(logits(model, tokens()), logits(load_base(folder), tokens()))


@pytest.mark.parametrize(
    "settings",
    [
        LoHaConfig(r=3, target_modules=["up_proj", "o_proj"]),
        IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["loha", "ia3"],
)
def test_what_is_no_lora_is_merged_too(folder, tmp_path, settings):
    theirs = moved_(get_peft_model(load_base(folder), settings))
    theirs.save_pretrained(tmp_path / "theirs")
    update = read_peft(folder, tmp_path / "theirs")
    model = load_base(folder)
    for name, delta in update.deltas.items():
        model.get_parameter(name).data += delta
    # PEFT keeps some of these factors in float32.
    close(logits(model, tokens()), logits(theirs.eval(), tokens()), 1e-6)
    assert not torch.allclose(logits(model, tokens()), logits(load_base(folder), tokens()))


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_our_own_directories_are_read_in_the_order_of_the_base(folder, tmp_path, method):
    net = net_of(folder, method)
    save_super_adapter(
        net, tmp_path / "run" / "super_adapter", model=ModelConfig(path="x"), base_digest="same"
    )
    place = foreign.identify(str(tmp_path / "run"), "same")
    update = foreign.read(place, base_of(folder), "same")
    rank = {"sorsa": 16, "soslora": 16}.get(method, 8)
    if method.startswith("olora"):
        rank = len(net.layer(net.space.targets[0]).adapter.A_old) + 8
    assert update.name == "run" and f"LoRA rank {rank}" in update.kind
    model = load_base(folder)
    for name, delta in update.deltas.items():
        model.get_parameter(name).data += delta
    close(logits(model, tokens()), logits(net.model, tokens()), MERGED)


@pytest.mark.parametrize("which", ["maximal", "minimal", "random"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_then_cutting_is_cutting_then_merging(folder, tmp_path, kind, which):
    """A supernet on a base into which the other was merged gives the same compact model."""
    theirs = peft_adapter(folder, tmp_path / "theirs", **KINDS[kind])
    update = read_peft(folder, tmp_path / "theirs")
    net = net_of(folder)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    sub = net.space.named(which, seed=1)
    found = merged(net, sub, [update])[0]

    other = Supernet(theirs.merge_and_unload(), tiny.space(heads=True), tiny.ADAPTERS["lora"])
    other.reorder(tiny.permutations(other))
    other.load_factors(net.factor_state())
    close(logits(found, tokens()), logits(compact(other, sub), tokens()), MERGED)
    assert not torch.allclose(logits(found, tokens()), logits(compact(net, sub), tokens()))
    for name, tensor in net.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the supernet has changed"
    for (name, mine), (_, plain) in zip(
        found.named_modules(), compact(net, sub).named_modules(), strict=True
    ):
        assert type(mine) is type(plain), name


def test_weights_scale_each_update(folder, tmp_path):
    """As float64 has them: in float32 none of these weights is what it says."""
    net = net_of(folder)
    sub = net.space.minimal()
    for seed in range(2):
        peft_adapter(folder, tmp_path / str(seed), seed)
    updates = [read_peft(folder, tmp_path / str(seed)) for seed in range(2)]
    plain = compact(Supernet(load_base(folder), tiny.space(heads=True), tiny.ADAPTERS["lora"],
                             order=net.order), sub).state_dict()  # fmt: skip
    alone = [merged(net, sub, [u], weight=0.0)[0].state_dict() for u in updates]
    own = compact(net, sub).state_dict()
    found = merged(net, sub, updates, weight=1.3, weights=[0.3, -0.7])[0].state_dict()
    for name, tensor in found.items():
        expected = (
            plain[name]
            + 1.3 * (own[name] - plain[name])
            + 0.3 * (alone[0][name] - plain[name])
            - 0.7 * (alone[1][name] - plain[name])
        )
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["ties", "magnitude_prune"])
def test_strategies_are_those_of_peft(folder, tmp_path, strategy):
    """Against PEFT's own merge of two LoRAs, whose SVD at full rank loses nothing."""
    theirs = peft_adapter(folder, tmp_path / "0", 0)
    peft_adapter(folder, tmp_path / "1", 1)
    theirs.load_adapter(str(tmp_path / "1"), "other")
    theirs.add_weighted_adapter(
        ["default", "other"], [1.0, 0.7], "both", combination_type=f"{strategy}_svd",
        density=0.4, svd_rank=32,
    )  # fmt: skip
    theirs.set_adapter("both")
    expected = theirs.merge_and_unload(adapter_names=["both"])
    net = net_of(folder)
    for _, adapter in net.adapters():
        adapter.B.data.zero_()
    updates = [read_peft(folder, tmp_path / name) for name in "01"]
    found, _ = merged(net, net.space.maximal(), updates, strategy=strategy, density=0.4,
                      weights=[1.0, 0.7])  # fmt: skip
    # Their factors pass through a float32 SVD.
    close(logits(found, tokens()), logits(expected, tokens()), 1e-4)


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
def test_random_strategies_follow_the_seed(folder, tmp_path, strategy):
    peft_adapter(folder, tmp_path / "theirs")
    updates, net = [read_peft(folder, tmp_path / "theirs")], net_of(folder)
    config = MergeConfig(adapters=[MergeAdapterConfig(path="x")], strategy=strategy, density=0.5)

    def run(seed):
        return logits(combine(net, net.space.minimal(), updates, config, seed=seed)[0], tokens())

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))


def test_ties_stay_ties_where_both_ends_change_alike(tmp_path):
    folder = tiny.save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    theirs = peft_adapter(
        folder, tmp_path / "theirs", target_modules=["embed_tokens", "up_proj"],
        ensure_weight_tying=True,
    )  # fmt: skip
    update = read_peft(folder, tmp_path / "theirs")
    assert "model.embed_tokens.weight" in update.deltas
    net = net_of(folder)
    for _, adapter in net.adapters():
        adapter.B.data.zero_()
    found = merged(net, net.space.maximal(), [update])[0]
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not torch.equal(found.lm_head.weight, net.model.lm_head.weight)
    close(logits(found, tokens()), logits(theirs, tokens()), MERGED)


def test_the_report_by_hand(folder):
    net = net_of(folder, heads=False)
    name = "model.layers.0.mlp.up_proj.weight"
    rows = net.order["model.layers.0.mlp_width"]
    delta = torch.zeros(64, 32, dtype=torch.float64)
    delta[rows[0]] = 3.0  # the most important channel is kept, the least important one is cut
    delta[rows[-1]] = 4.0
    half = delta.clone()
    half[rows[0], :16] *= -1
    updates = [Update("one", "k", {name: delta}), Update("two", "k", {name: half})]
    report = merged(net, net.space.minimal(), updates)[1]
    one, two = report["adapters"][1:]
    assert one["norm"] == pytest.approx(math.sqrt(32 * (9 + 16)))
    assert one["lost_by_cutting"] == pytest.approx(16 / 25) == two["lost_by_cutting"]
    assert report["cosine"]["two | one"] == pytest.approx(0.0)
    whole = merged(net, net.space.maximal(), updates)[1]
    assert whole["adapters"][1]["lost_by_cutting"] == 0
    assert whole["cosine"]["two | one"] == pytest.approx(16 / 25)
    own = [net.layer(site).factors() for site in net.space.targets]
    assert whole["adapters"][0]["norm"] == pytest.approx(
        math.sqrt(sum(float((B @ A).detach().pow(2).sum()) for A, B in own))
    )


def test_adapters_of_one_name_are_told_apart(folder):
    """Such as `checkpoint-100` of two trainings: every pair has its cosine."""
    net, deltas = net_of(folder), {"lm_head.weight": torch.ones(tiny.VOCABULARY, 32).double()}
    updates = [Update(name, "k", deltas) for name in ("step", "step", "step (2)", "sub-adapter")]
    report = merged(net, net.space.minimal(), updates)[1]
    names = [entry["name"] for entry in report["adapters"]]
    assert names == ["sub-adapter", "step", "step (2)", "step (2) (2)", "sub-adapter (2)"]
    assert len(report["cosine"]) == 10


# The command


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """A LoNAS run and two of other methods on the same base, and a PEFT adapter."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for method in ("lora", "sorsa", "olora"):
        adapter = tiny.ADAPTERS[method]
        found[method] = train_one(train_config(tiny_folder, folder / method, adapter=adapter))
        move_factors(found[method])
    peft_adapter(tiny_folder, folder / "peft")
    return found


def config(run, *paths, **overrides) -> ExportConfig:
    entries = [MergeAdapterConfig(path=str(path), weight=0.5) for path in paths]
    settings = dict(formats=["hf", "peft"], accuracy=False, timing=ONE_ROUND)
    merge = MergeConfig(adapters=entries)
    return ExportConfig(run=str(run.path), merge=merge, **(settings | overrides))


def test_a_sorsa_an_olora_and_a_peft_adapter_in_one_sub_adapter(runs, tiny_folder, capsys):
    others = [runs["sorsa"].path, runs["olora"].path / "super_adapter",
              runs["lora"].path.parent / "peft"]  # fmt: skip
    report = export(config(runs["lora"], *others, sub_adapter="heuristic", accuracy=True))
    assert report.directory.name == "heuristic-merged"
    merge = report.contents["merge"]
    assert [entry["name"] for entry in merge["adapters"]] == [
        "heuristic-merged", "sorsa", "olora", "peft"]  # fmt: skip
    assert all(0 < entry["lost_by_cutting"] < 1 for entry in merge["adapters"][1:])
    assert "merged with other adapters" in report.contents["formats"]["peft"]["skipped"]
    assert report.contents["accuracy_n"] == 8
    net = load_run(runs["lora"])[2]
    base = ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu")
    digest = digest_of(tiny_folder)
    updates = [foreign.read(foreign.identify(str(p), digest), base, digest) for p in others]
    entries = [MergeAdapterConfig(path="", weight=0.5)] * 3
    expected, _ = combine(
        net, net.space.heuristic(), updates, MergeConfig(adapters=entries),
        degree=report.contents["compensation"]["degree"],
    )  # fmt: skip
    loaded = hf.load(report.directory / "hf", torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    report.show()
    shown = capsys.readouterr().out
    assert "cosine of sorsa | heuristic-merged" in shown and "cutting" in shown


def test_the_command_line_takes_a_list_of_adapters(runs, capsys):
    path = runs["lora"].path.parent / "peft"
    code = __main__.main([
        "export", str(runs["lora"].path), "--sub_adapter", "minimal", "--formats", "[hf]",
        "--merge.adapters", json.dumps([{"path": str(path), "weight": 0.25}]),
        "--merge.strategy", "ties", "--merge.density", "0.3", "--accuracy", "false",
        "--timing.rounds", "1", "--timing.max_rounds", "1", "--timing.prompt_tokens", "4",
        "--timing.new_tokens", "1", "--name", "by-command",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    file = runs["lora"].path / "export" / "by-command" / "report.json"
    merge = json.loads(file.read_text())["merge"]
    assert merge["strategy"] == "ties" and merge["density"] == 0.3
    assert merge["adapters"][1]["weight"] == 0.25


# Bad input


def broken(runs, tmp_path, change) -> ExportConfig:
    """An export that merges a PEFT adapter whose tensors were changed."""
    import shutil

    path = tmp_path / "broken"
    shutil.copytree(runs["lora"].path.parent / "peft", path)
    state = load_file(path / "adapter_model.safetensors")
    change(state)
    save_file(state, path / "adapter_model.safetensors")
    return config(runs["lora"], path, sub_adapter="minimal", name="broken")


def first(state) -> str:
    return sorted(state)[0]


def poison(state) -> None:
    state[first(state)][0, 0] = float("nan")


def shrink(state) -> None:
    state[first(state)] = state[first(state)][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (poison, RunError, "lora_A.weight holds NaN"),
        (lambda s: s.pop(first(s)), RunError, "lora_A.weight is missing"),
        (lambda s: s.update(strange=torch.zeros(1)), RunError, "strange belongs to no layer"),
        (shrink, BaseMismatch, "does not fit"),
    ],
)
def test_a_broken_peft_adapter_is_refused(runs, tmp_path, monkeypatch, change, error, match):
    """Before held-out examples are asked, which may take minutes."""
    monkeypatch.setattr("elastic.exporting.command.HeldOut", None)
    before = snapshot(runs["lora"].path)
    with pytest.raises(error, match=match):
        export(broken(runs, tmp_path, change))
    assert snapshot(runs["lora"].path) == before


@pytest.fixture
def forbid_weights(monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))


def test_what_is_no_adapter_is_refused_before_weights(runs, tmp_path, forbid_weights):
    with pytest.raises(RunError, match="nothing: no such directory"):
        export(config(runs["lora"], tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"neither a run .* nor a PEFT adapter"):
        export(config(runs["lora"], tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(RunError, match="pickled weights"):
        export(config(runs["lora"], tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"merge\.density is 0"):
        MergeConfig(density=0.0)


def test_a_super_adapter_of_another_base_is_refused_before_weights(runs, tmp_path, forbid_weights):
    other = copy_run(runs["sorsa"], tmp_path / "other")
    about = other.super_adapter / "about.json"
    about.write_text(about.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(BaseMismatch, match=r"other.*sha256:0"):
        export(config(runs["lora"], other.path))


def test_a_peft_adapter_of_ours_knows_its_base(runs, tiny_folder, tmp_path, monkeypatch):
    written = export(config(runs["sorsa"], sub_adapter="maximal", formats=["peft"]))
    path = written.directory / "peft"
    assert foreign.identify(str(path), digest_of(tiny_folder)) == path
    with pytest.raises(BaseMismatch, match="was trained on a base with sha256"):
        foreign.identify(str(path), "sha256:other")
    # Read back, it is the update that the run's own directory holds.
    base = ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu")
    mine, theirs = (
        foreign.read(foreign.identify(str(place), digest_of(tiny_folder)), base,
                     digest_of(tiny_folder)).deltas
        for place in (runs["sorsa"].path, path)
    )  # fmt: skip
    assert mine.keys() == theirs.keys()
    for name, delta in mine.items():
        torch.testing.assert_close(theirs[name], delta, rtol=1e-4, atol=1e-5)


def test_a_super_adapter_with_broken_factors_is_refused(runs, tmp_path):
    other = copy_run(runs["sorsa"], tmp_path / "other")
    file = other.super_adapter / "factors.safetensors"
    state = load_file(file)
    name = next(key for key in state if key.endswith(".S"))
    state[name][0] = float("inf")
    save_file(state, file)
    with pytest.raises(RunError, match=rf"{name} has values above 1e\+18"):
        export(config(runs["lora"], other.path, sub_adapter="minimal", name="never"))
    assert not (runs["lora"].path / "export" / "never").exists()


def test_an_update_of_another_shape_names_the_parameter(folder):
    net = net_of(folder)
    strange = Update("strange", "k", {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(RunError, match=r"strange changes .*up_proj.weight by \(3, 3\)"):
        merged(net, net.space.minimal(), [strange])
    unknown = Update("strange", "k", {"model.extra.weight": torch.zeros(3)})
    with pytest.raises(RunError, match="no such parameter"):
        merged(net, net.space.minimal(), [unknown])


def test_stock_peft_loads_what_was_read(folder, tmp_path):
    """The fixture itself: the saved adapter is one that stock PEFT loads."""
    theirs = peft_adapter(folder, tmp_path / "theirs")
    again = PeftModel.from_pretrained(load_base(folder), str(tmp_path / "theirs")).eval()
    close(logits(again, tokens()), logits(theirs, tokens()))
