"""A space for a model that nobody has listed: found in its structure, and what is found holds."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedConfig

from elastic.config import AdapterConfig, ModelConfig, TrainConfig
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.spaces.declared import SearchSpace, describe
from elastic.supernet import discovery
from elastic.supernet.discovery import called, declared_for, discover, require_fits
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.hybrids import hybrid
from tests.helpers.laws import one_function
from tests.helpers.tiny_runs import train_config

UNLISTED = ["llama", "phi3", "gpt2", "opt", "bloom", "falcon", "gpt-neox", "bert, classes", "t5",
            "flan-t5", "qwen3", "rwkv"]  # fmt: skip
"""Asked for as if they were not."""


def groups_of(family: str) -> dict[str, set]:
    """What the discovered space cuts: (dimension, sites) of every group in the last block."""
    bound = discover(model_of(family)).bind(model_of(family), tiny.RANK)
    found: dict[str, set] = {}
    for group in bound:
        sites = frozenset((cut.site, cut.axis) for cut in group.cuts)
        found.setdefault(group.dim, set()).add(sites)
    return found


@pytest.mark.parametrize("family", UNLISTED)
def test_it_finds_the_widths_that_a_person_wrote(family):
    shipped = SearchSpace.load(FAMILIES[family][1]).bind(model_of(family), tiny.RANK)
    written = {
        frozenset((cut.site, cut.axis) for cut in group.cuts)
        for group in shipped
        if group.dim == "width"
    }
    assert groups_of(family)["width"] == written


@pytest.mark.parametrize("family, heads", [("llama", 2), ("bert, classes", 2), ("gpt2", 0),
                                           ("phi3", 0), ("opt", 0), ("t5", 0)])  # fmt: skip
def test_it_finds_heads_where_the_code_follows(family, heads):
    assert len(groups_of(family).get("heads", ())) == heads


def test_every_block_and_layer_is_adapted_once():
    space = discover(model_of("llama"))
    assert space.sections[0].blocks == "model.layers.*"
    assert set(space.sections[0].adapt) == {
        *tiny.ATTENTION, "self_attn.o_proj", *tiny.GATE_UP, "mlp.down_proj"
    }  # fmt: skip
    assert "mlp_width (mlp.gate_proj mlp.up_proj -> mlp.down_proj)" in describe(space)[0]


class Refusing(nn.Module):
    """An MLP whose code wants its full width."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        return self.down(self.up(x).view(*x.shape[:-1], 6, 8).flatten(-2))


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.config = PreTrainedConfig()
        self.config.model_type = "odd"
        self.embed = nn.Embedding(tiny.VOCABULARY, 16)
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x

    def get_output_embeddings(self):
        return None

    def set_attn_implementation(self, name):
        """It has none."""

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype


def test_a_cut_that_the_code_does_not_follow_is_left_out(capsys):
    [section] = discover(Odd(Refusing)).sections
    assert [spec.dim for spec in section.groups] == ["rank"]
    assert (
        "leaves out mlp_width of blocks.*: RuntimeError: shape '[1, 2, 6, 8]'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_hide_no_heads_in_any_type(dtype, capsys):
    """Their usual kernel takes one type alone where there is no data; what is left is told."""
    model = mixtral().to(dtype)
    [section] = discover(model).sections
    names = [spec.name for spec in section.groups]
    assert names == ["attention_rank", "heads", "experts", "expert_width"]
    said = " ".join(capsys.readouterr().err.split())
    assert "model.layers.*.mlp.experts are not adapted" in said


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


def test_a_model_that_does_not_run_uncut_is_not_blamed_on_a_cut(monkeypatch, capsys):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: torch.zeros(1).item().bad)
    [section] = discover(tiny.llama()).sections
    assert {spec.dim for spec in section.groups} == {"rank"}
    said = " ".join(capsys.readouterr().err.split())
    assert "leaves out heads of model.layers.*: uncut, the model does not run without data" in said


def test_a_model_whose_code_refuses_two_tokens_is_refused_in_its_own_words(monkeypatch):
    def forward(*_, **__):
        raise ValueError("pixel_values cannot be None\nwithout inputs_embeds")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    words = "its own code says ValueError: pixel_values cannot be None without inputs_embeds"
    with pytest.raises(ConfigError, match=words):
        discover(tiny.llama())


def test_nothing_is_cached_where_it_is_tried():
    """Qwen3.5's cache cannot say how long it is without a block of full attention, which training
    does not ask it."""
    model = hybrid("qwen3.5", num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    model.config.use_cache = True
    with pytest.raises(ValueError, match="get_seq_length"):
        model(tiny.tokens())
    space = discover(model)
    require_fits(model, space, tiny.RANK)
    [section] = space.sections
    assert {spec.dim for spec in section.groups} == {"rank", "width"} and model.config.use_cache
    net = tiny.randomize_(Supernet(model, space, tiny.ADAPTERS["lora"]))
    # Its norms round to float32 in any type.
    one_function(net, net.space.minimal(), lambda m: m(tiny.tokens(), use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_tried_has_the_type_that_it_will_run_in(dtype, tmp_path, monkeypatch):
    """Not that of the folder."""
    mixtral().to(torch.bfloat16).save_pretrained(tmp_path)
    tried = []
    monkeypatch.setattr(discovery, "called", lambda model: tried.append(model) or called(model))
    config = TrainConfig(model=ModelConfig(path=str(tmp_path), dtype=dtype))
    [section] = declared_for(config).sections
    assert {model.dtype for model in tried} == {getattr(torch, dtype)}
    assert {spec.dim for spec in section.groups} == {"rank", "heads", "experts", "expert_width"}


class Counting(Odd):
    """Its code goes through its blocks by their numbers."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for number in range(12):
            x = x + self.blocks[number](x)
        return x


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_a_model_that_runs_with_all_its_blocks_alone_is_tried_with_all():
    model = Counting(Gated)
    model.blocks = nn.ModuleList(Gated() for _ in range(12))
    assert len(called(model)) == 24
    [section] = discover(model).sections
    assert {spec.dim for spec in section.groups} == {"rank", "width"}


def test_weights_that_blocks_share_are_left_alone():
    """What one block cuts the others would lose."""
    model = Odd(Gated)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    [section] = discover(model).sections
    assert section.adapt == ("down",) and {spec.dim for spec in section.groups} == {"rank"}


def test_a_group_of_one_size_is_no_group(capsys):
    """It would be put in order all the same."""
    [section] = discover(tiny.llama(num_attention_heads=2, num_key_value_heads=1)).sections
    assert "heads" not in {spec.dim for spec in section.groups}
    assert "one size alone to choose from" in " ".join(capsys.readouterr().err.split())


def test_blocks_without_linear_layers_are_refused():
    with pytest.raises(ConfigError, match="repeats no block with linear layers"):
        discover(Odd(nn.Identity))


def test_auto_is_the_shipped_space_of_a_known_type(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "skeleton", lambda *_: pytest.fail("nothing needs to be built"))
    config = TrainConfig(model=ModelConfig(path=str(tiny_folder)))
    assert declared_for(config).sections == SearchSpace.load("llama").sections


def test_an_unknown_type_trains_with_what_was_found(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(discovery, "KNOWN", {})
    config = train_config(
        tiny_folder, tmp_path / "run", space="auto", adapter=AdapterConfig(rank=8)
    )
    run = train_one(config)
    told = capsys.readouterr().err
    assert "Space of LlamaForCausalLM" in told
    [row] = [line for line in told.splitlines() if "model.layers.*" in line]
    assert "LlamaAttention" in row and "attention_rank" in row
    assert {spec.dim for spec in run.space().sections[0].groups} == {"rank", "width", "heads"}
