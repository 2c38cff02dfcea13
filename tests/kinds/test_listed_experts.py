"""Experts that are modules of their own, in a list with code of its own."""

import pytest
import torch
from torch import nn

from elastic.config import AdapterConfig
from elastic.errors import ConfigError
from elastic.spaces.declared import SearchSpace
from elastic.supernet.discovery import called, discover
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.laws import one_function
from tests.helpers.tiny_runs import factors, train_config
from tests.zoo.building import config_of, model_of, output

USE = "encoder-decoder"
FAMILIES = {  # type: where a block of the encoder has its experts, and their two layers
    "switch_transformers": ("encoder.block.1.layer.1.mlp.experts", "wi", "wo"),
    "nllb-moe": ("model.encoder.layers.1.ffn.experts", "fc1", "fc2"),
}


def model(family: str, dtype: torch.dtype = torch.float64):
    return model_of(config_of(family, USE), USE, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_tried_as_if_every_token_went_to_each(family, dtype):
    """Though their code asks values where tokens go, and routers cast themselves."""
    place, up, down = FAMILIES[family]
    used = called(model(family, dtype))
    assert used is not None
    assert {f"{place}.expert_{n}.{leaf}" for n in range(4) for leaf in (up, down)} <= used


@pytest.mark.parametrize("family", FAMILIES)
def test_their_ranks_are_one_choice_and_dense_widths_are_found(family):
    place = FAMILIES[family][0]
    space = discover(model(family))
    net = tiny.randomize_(Supernet(model(family), space, tiny.ADAPTERS["lora"]))
    found = {group.name: {cut.site for cut in group.cuts} for group in net.space}
    [ranks] = [name for name in found if "expert" in name and "encoder" in name]
    assert len(found[ranks]) == 8 and all(site.startswith(place) for site in found[ranks])
    widths = [group for group in net.space if group.dim == "width"]
    assert len(widths) == 2 and not any(
        cut.site.startswith(place) for g in widths for cut in g.cuts
    )
    # Norms round to float32 in any type.
    one_function(net, net.space.minimal(), output, 1e-5)


def test_a_run_trains_the_experts(tmp_path, capsys):
    folder = tmp_path / "base"
    model("switch_transformers", torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    settings = {"adapter": AdapterConfig(rank=8), "max_steps": 2, "save_steps": 10}
    run = train_one(train_config(folder, tmp_path / "run", space="auto", **settings))
    place, up, _ = FAMILIES["switch_transformers"]
    moved = [tensor.abs().max() > 0 for name, tensor in factors(run).items()
             if name.startswith(place) and name.endswith(f"{up}.B")]  # fmt: skip
    assert len(moved) == 4 and any(moved)


def test_channels_of_an_expert_have_no_order(tmp_path):
    folder = tmp_path / "base"
    model("switch_transformers", torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "space.yaml").write_text(
        "blocks: encoder.block.1\nadapt: [layer.0.SelfAttention.q]\ngroups:\n  width:\n"
        "    dim: width\n    outputs: [layer.1.mlp.experts.expert_0.wi]\n"
        "    inputs: [layer.1.mlp.experts.expert_0.wo]\n    choices: [1.0, 0.5]\n"
    )
    config = train_config(folder, tmp_path / "run", space=str(tmp_path / "space.yaml"))
    with pytest.raises(ConfigError, match=r"expert_0.wo gets \d+ rows for a batch of \d+ tokens"):
        train_one(config)


@pytest.mark.parametrize("family, use, of, reason", [
    ("switch_transformers", USE, FAMILIES["switch_transformers"][0], "as modules of their own"),
    ("jetmoe", "causal", "model.layers.0.mlp.input_linear",
     "is called with inputs, expert_size and not told which experts"),
    ("llama4_text", "causal", "model.layers.1.feed_forward.experts",
     "is called with hidden_states and not told which experts"),
])  # fmt: skip
def test_experts_that_cannot_be_cut_are_refused_with_the_reason(family, use, of, reason):
    built = model_of(config_of(family, use), use, torch.float32)
    block, _, name = of.partition(".1." if ".1." in of else ".0.")
    number = of.removeprefix(block)[1]
    adapt = next(n.removeprefix(f"{block}.{number}.") for n, layer in built.named_modules()
                 if isinstance(layer, nn.Linear) and n.startswith(f"{block}.{number}.")
                 and "router" not in n)  # fmt: skip
    groups = {"some": {"dim": "expert_width", "of": [name], "choices": [1.0]}}
    space = {"blocks": f"{block}.{number}", "adapt": [adapt], "groups": groups}
    with pytest.raises(ConfigError, match=reason):
        SearchSpace.from_dict(space).bind(built, 4)
