"""A sub-adapter may leave out whole blocks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from elastic.config import MergeAdapterConfig, MergeConfig, StageConfig, TimingConfig
from elastic.data.collating import collate
from elastic.data.encoding import encode
from elastic.errors import ConfigError, RunError
from elastic.exporting.foreign import Update
from elastic.exporting.merge import combine
from elastic.formats import hf
from elastic.latency.cost_table import Table, least, pinned
from elastic.latency.target import Target
from elastic.searching.sampler import AdditiveSampler
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import Counter
from elastic.supernet.group_importance import group_importance
from elastic.supernet.importance import channel_order
from elastic.supernet.store import ORDER, read_tensors
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of, output
from tests.helpers.laws import close, one_function, several
from tests.helpers.tiny_runs import space_file, train_config

BLOCKS = "model.layers.*"
DEPTH = f"{BLOCKS}.depth"
DEPTHS = {"dim": "depth", "choices": [5, 4, 2]}
LEAVES_OUT = [family for family in FAMILIES if family not in ("t5", "flan-t5")]


def declared(**settings) -> dict:
    value = tiny.space_dict()
    value["groups"]["depth"] = DEPTHS | settings
    return value


def net_of(method: str = "lora", order=None, **settings) -> Supernet:
    base = tiny.llama(num_hidden_layers=5)
    space = SearchSpace.from_dict(declared(**settings))
    return tiny.randomize_(Supernet(base, space, tiny.ADAPTERS[method], order=order))


def bound(order=(0, 4, 3, 1, 2)):
    space = SearchSpace.from_dict(declared()).bind(tiny.llama(num_hidden_layers=5), tiny.RANK)
    return space.ordered({DEPTH: torch.tensor(order)})


# One function


@pytest.mark.parametrize("family", LEAVES_OUT)
def test_active_sliced_merged_and_written_are_one_function(family, tmp_path):
    value = SearchSpace.load(FAMILIES[family][1]).as_dict()
    value["groups"]["depth"] = DEPTHS
    base = model_of(family, layers=5)
    net = Supernet(base, SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    orders = tiny.permutations(net)  # the first block may go, too, if it is like the others
    if family == "rwkv":
        orders[net.space.depths[0].name] = torch.tensor([0, 4, 3, 1, 2])
    net.reorder(orders)
    tiny.randomize_(net)
    shallow = net.space.at({group.name: 2 * (group.dim == "depth") for group in net.space})
    precision = 1e-5 if family in ROUNDED else 1e-10
    with torch.no_grad():
        full = output(net.model)
        for number, sub in enumerate((net.space.minimal(), shallow, net.space.maximal())):
            expected, small = one_function(net, sub, output, precision)
            folder = hf.write(small, None, tmp_path / str(number))
            close(output(hf.load(folder, torch.float64)), expected, precision)
            if sub != net.space.maximal():
                assert (expected - full).abs().max() > 1e-3 * full.abs().max()


def test_a_model_of_fewer_blocks_is_of_the_family_s_own_class(tmp_path):
    net = net_of()
    shallow = compact(net, net.space.at({g.name: 2 * (g.dim == "depth") for g in net.space}))
    folder = hf.write(shallow, None, tmp_path)
    assert not (folder / hf.CODE).exists()
    assert shallow.config.num_hidden_layers == len(shallow.model.layers) == 2
    assert net.model.config.num_hidden_layers == len(net.model.model.layers) == 5


def test_the_shipped_space_cuts_depth_heads_widths_and_ranks():
    net = Supernet(
        model_of("llama", layers=10), SearchSpace.load("llama-deep"), tiny.ADAPTERS["lora"]
    )
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    assert {group.dim for group in net.space} == {"depth", "query_heads", "width", "rank"}
    assert all(len(group.choices) > 1 for group in net.space)
    for sub in several(net, draws=1):
        one_function(net, sub, output, 1e-10)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_encoders_and_decoders_have_depths_of_their_own(stack, tmp_path):
    queries = "layer.0.SelfAttention.q"
    groups = {"depth": DEPTHS, "rank": {"dim": "rank", "of": [queries], "choices": [1.0, 2]}}
    value = {"blocks": f"{stack}.block.*", "adapt": [queries], "groups": groups}
    base = tiny.t5(dtype=torch.float64, num_layers=5)
    net = tiny.randomize_(Supernet(base, SearchSpace.from_dict(value), tiny.ADAPTERS["lora"]))
    with torch.no_grad(), net.active(net.space.minimal()):
        expected = output(net.model)
    small = compact(net, net.space.minimal())
    close(output(small), expected, 1e-5)
    close(output(hf.load(hf.write(small, None, tmp_path), torch.float64)), expected, 1e-5)
    depths = {"encoder": small.config.num_layers, "decoder": small.config.num_decoder_layers}
    assert depths.pop(stack) == 2 and set(depths.values()) == {5}


def test_tokens_are_generated_from_the_cache_of_those_that_run():
    net = net_of(order={DEPTH: torch.tensor([3, 1, 0, 2, 4])})
    ids = tiny.tokens(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    for sub in (net.space.minimal(), net.space.maximal()):
        with net.active(sub):
            found = net.model.generate(ids, use_cache=True, **settings)
            assert torch.equal(found, net.model.generate(ids, use_cache=False, **settings))
        assert torch.equal(found, compact(net, sub).generate(ids, **settings))


# What is left out


def test_the_least_important_blocks_go_first_and_the_ends_stay():
    model = tiny.llama(num_hidden_layers=5)
    for number, scale in enumerate([1.0, 0.1, 1.0, 0.01, 0.001]):
        layer = model.model.layers[number]
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data *= scale
    space = SearchSpace.from_dict(declared()).bind(model, tiny.RANK)
    batches = [{"input_ids": tiny.tokens()}]
    for mode, expected in (
        ("activation", [0, 4, 2, 1, 3]),
        ("norm", [0, 4, 2, 1, 3]),
        ("none", [0, 4, 1, 2, 3]),
    ):
        order = channel_order(model, space, mode, batches)
        assert order[DEPTH].tolist() == expected
        left = space.ordered(order).left_out(space.minimal())
        assert left == tuple(f"model.layers.{number}." for number in expected[2:])
    with_ends = SearchSpace.from_dict(declared(drop_ends=True)).bind(model, tiny.RANK)
    order = channel_order(model, with_ends, "activation", batches)
    assert order[DEPTH].tolist()[-2:] == [3, 4]


def test_padding_has_no_say_in_what_matters():
    model = tiny.llama(num_hidden_layers=5)
    space = SearchSpace.from_dict(declared()).bind(model, tiny.RANK)
    tokenizer = tiny.tokenizer()
    short, long = (encode(tokenizer, "ab" * n, "c") for n in (1, 20))
    apart = channel_order(model, space, "activation", [collate([x], 0) for x in (short, long)])
    together = channel_order(model, space, "activation", [collate([short, long], 0)])
    assert torch.equal(apart[DEPTH], together[DEPTH])


@given(st.randoms(use_true_random=False))
def test_a_value_says_nothing_of_what_is_left_out(generator):
    space = bound()
    sub = space.random(generator)
    out = space.left_out(sub)
    assert len(out) == 5 - sub[DEPTH]
    for group in space:
        left_out = group.name.startswith(out)
        assert (sub[group.name] == 0) is left_out
    assert space.check(sub) == sub == space.at(space.indices(sub))
    same = {name: size or space.maximal()[name] for name, size in sub.choices}
    assert space.check(SubAdapter(tuple(same.items()))) == sub


def test_its_size_counts_every_function_once():
    value = {
        "blocks": BLOCKS,
        "adapt": ["mlp.up_proj"],
        "groups": {
            "depth": {"dim": "depth", "choices": [4, 3, 2]},
            "rank": {"dim": "rank", "of": ["mlp.up_proj"], "choices": [8, 2]},
        },
    }
    space = SearchSpace.from_dict(value).bind(tiny.llama(num_hidden_layers=4), tiny.RANK)
    every = itertools.product(*(range(len(group.choices)) for group in space))
    names = [group.name for group in space]
    assert space.size == len({space.at(dict(zip(names, at, strict=True))) for at in every})
    assert space.size == 2**4 + 2**3 + 2**2


def test_a_size_that_is_no_choice_is_refused_where_it_counts():
    space = bound()
    wrong = space.minimal().as_dict() | {"model.layers.4.mlp_rank": 3}
    with pytest.raises(RunError, match="mlp_rank is 3"):
        space.check(SubAdapter(tuple(wrong.items())))
    unseen = space.minimal().as_dict() | {"model.layers.2.mlp_rank": 3}
    assert space.check(SubAdapter(tuple(unseen.items()))) == space.minimal()


# Training


@pytest.mark.parametrize("method", ["lora", "sorsa"])
def test_what_does_not_run_is_not_trained(method):
    net = net_of(method, order={DEPTH: torch.tensor([0, 4, 2, 1, 3])})
    sub = net.space.at({group.name: group.dim == "depth" for group in net.space})
    assert net.space.left_out(sub) == ("model.layers.3.",)
    with net.active(sub) as model:
        loss = model(tiny.tokens()).logits.square().sum()
        penalty = net.penalty(0.1)
        (loss if penalty is None else loss + penalty).backward()
    for site, adapter in net.adapters():
        trained = any(p.grad is not None and p.grad.any() for p in adapter.parameters())
        assert trained is not site.startswith("model.layers.3.")


def test_the_importance_of_a_depth_is_the_slope_of_the_loss():
    from tests.helpers.laws import STEP, batch_of, loss

    net, batch = net_of(), batch_of("abc")
    names = net.space.left_out(net.space.minimal())
    blocks = [net.model.get_submodule(name.removesuffix(".")) for name in names]
    ends = []
    for by in (1 + STEP, 1 - STEP):
        hooks = [
            block.register_forward_hook(lambda _, x, y, by=by: x[0] + by * (y - x[0]))
            for block in blocks
        ]
        ends.append(loss(net, batch))
        for hook in hooks:
            hook.remove()
    slope = (ends[0] - ends[1]) / (2 * STEP)
    assert group_importance(net, [batch])[DEPTH] == pytest.approx(abs(slope), rel=1e-3)


def test_adapters_from_elsewhere_lose_the_blocks_that_are_left_out():
    net = net_of()
    sites = [f"model.layers.{n}.mlp.up_proj" for n in range(5)]
    deltas = {f"{s}.weight": torch.randn(64, 32, dtype=torch.float64) for s in sites}
    sub = net.space.at({group.name: 2 * (group.dim == "depth") for group in net.space})
    expected = compact(net, sub)
    for place, number in enumerate((0, 4)):
        expected.model.layers[place].mlp.up_proj.weight.data += deltas[f"{sites[number]}.weight"]
    config = MergeConfig(adapters=[MergeAdapterConfig(path="theirs")])
    found, report = combine(net, sub, [Update("theirs", "peft lora", deltas)], config)
    close(output(found), output(expected), 1e-10)
    lost = 1 - sum(deltas[f"{sites[n]}.weight"].square().sum() for n in (0, 4)) / sum(
        delta.square().sum() for delta in deltas.values()
    )
    assert report["adapters"][1]["lost_by_cutting"] == pytest.approx(float(lost))


# Search


def test_costs_add_up_whatever_is_left_out():
    net = net_of()
    counter = Counter(net.model, net.space)
    table = Table.counted(net.space, lambda sub: counter(sub).macs)
    for sub in several(net, draws=20):
        assert table(sub) == counter(sub).macs
    assert -least(table.alternatives()) == counter.full.macs - counter(net.space.minimal()).macs
    lowest = min(own.min(1).sum() for own in pinned(net.space, table.effects))
    assert least(table.alternatives()) == lowest


@pytest.mark.parametrize("loss, kept", [(0.01, 2), (50.0, 5)])
def test_proposals_leave_out_blocks_where_that_is_the_cheapest_loss(loss, kept):
    """To save as much as two blocks cost: either they go, or all get smaller."""
    space = bound()
    shape = (len(space.groups), max(len(group.choices) for group in space))
    costs, gains = np.full(shape, np.inf), np.zeros(shape)
    for row, group in enumerate(space):
        cut = np.linspace(0, 1, len(group.choices))
        costs[row, : len(cut)] = -cut * (8 if group.dim == "depth" else 1)
        gains[row, : len(cut)] = -cut * (loss if group.dim == "depth" else 1)
    best = AdditiveSampler(space, examples=10)._best(gains, list(pinned(space, costs)), -8.0)
    chosen = space.at({group.name: int(i) for group, i in zip(space, best, strict=True)})
    assert chosen[DEPTH] == kept
    assert list(space.indices(chosen).values()) == list(best)  # nothing of what is left out
    assert costs[np.arange(len(best)), best].sum() <= -8
    in_blocks = [size for name, size in chosen.choices if name != DEPTH and size]
    full = [g.choices[0] for g in space if g.dim != "depth" and chosen[g.name]]
    assert (in_blocks == full) is (kept == 2)


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"choices": [5, 1]}, "depth 1, but the first and the last block stay; choose from 2..5"),
        ({"choices": [6]}, "depth 6 exceeds the full size 5"),
        ({"of": ["mlp.up_proj"]}, "of"),
        ({"drop_ends": "yes"}, "drop_ends is 'yes'; give true or false"),
    ],
)
def test_a_depth_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        net_of(**settings)


def test_one_block_may_be_enough_if_the_ends_may_go():
    assert net_of(choices=[5, 1], drop_ends=True).space.minimal()[DEPTH] == 1


def test_part_of_a_list_has_no_depth():
    value = declared(choices=[1.0, 0.5]) | {"blocks": "model.layers.0"}
    with pytest.raises(ConfigError, match="a depth counts several blocks of one list"):
        SearchSpace.from_dict(value).bind(tiny.llama(), tiny.RANK)


def test_code_that_computes_with_the_numbers_of_its_blocks_is_refused():
    value = SearchSpace.load("gpt2").as_dict()
    value["groups"]["depth"] = DEPTHS
    base = model_of("gpt2", layers=5)
    base.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ConfigError, match="GPT2LMHeadModel computes with the numbers"):
        SearchSpace.from_dict(value).bind(base, tiny.RANK)


def test_a_first_block_that_is_special_stays():
    value = SearchSpace.load("rwkv").as_dict()
    value["groups"]["depth"] = DEPTHS | {"drop_ends": True}
    with pytest.raises(
        ConfigError, match=r"without rwkv\.blocks\.0, .*built otherwise.*leave drop_ends"
    ):
        SearchSpace.from_dict(value).bind(model_of("rwkv", layers=5), tiny.RANK)


def mixed(**settings) -> tuple[Qwen3MoeForCausalLM, SearchSpace]:
    """Mixtures of experts with dense layers among them, and a depth over all."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
             "num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": tiny.VOCABULARY,
             "initializer_range": 0.2}  # fmt: skip
    value = {"blocks": BLOCKS, "adapt": ["self_attn.q_proj"], "groups": {"depth": DEPTHS}}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_hidden_layers=5, **settings))
    model.set_experts_implementation("eager")  # which takes float64
    return model.double().eval(), SearchSpace.from_dict(value)


def test_blocks_that_a_configuration_names_by_number_are_named_anew(tmp_path):
    base, space = mixed(mlp_only_layers=[1, 3])
    net = Supernet(base, space, tiny.ADAPTERS["lora"], order={DEPTH: torch.tensor([0, 4, 3, 2, 1])})
    tiny.randomize_(net)
    sub = net.space.at({DEPTH: 1})
    with torch.no_grad():
        expected, small = one_function(net, sub, output, 1e-10)
        again = hf.load(hf.write(small, None, tmp_path), torch.float64)
        again.set_experts_implementation("eager")
        close(output(again), expected, 1e-10)
    assert small.config.mlp_only_layers == [2] and base.config.mlp_only_layers == [1, 3]


def test_blocks_whose_kinds_follow_a_rule_are_not_free_to_go():
    """Every second one: without one of them the others would change theirs."""
    base, space = mixed(decoder_sparse_step=2)
    with pytest.raises(
        ConfigError, match=r"layers\.2 is built otherwise.*a rule that knows no gaps"
    ):
        space.bind(base, tiny.RANK)


def test_one_block_has_no_depth():
    with pytest.raises(ConfigError, match="a depth counts several blocks of one list"):
        SearchSpace.from_dict(declared(choices=[1.0, 0.5])).bind(
            tiny.llama(num_hidden_layers=1), tiny.RANK
        )


def test_two_depths_of_one_list_are_refused():
    value = declared()
    value["groups"]["other"] = DEPTHS
    with pytest.raises(ConfigError, match=r"is cut by both 'model\.layers\.\*\.depth'"):
        SearchSpace.from_dict(value).bind(tiny.llama(num_hidden_layers=5), tiny.RANK)


def test_a_width_of_the_whole_model_has_no_depth_beside_it():
    value = declared()
    value["groups"]["mlp_width"]["share"] = "model"
    with pytest.raises(ConfigError, match="'mlp_width' has one choice for the whole model"):
        SearchSpace.from_dict(value).bind(tiny.llama(num_hidden_layers=5), tiny.RANK)


def test_processes_that_gather_blocks_draw_one_depth(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    base = tiny.save_tiny(tmp_path / "base", num_hidden_layers=5)
    config = train_config(base, tmp_path / "run", space=space_file(tmp_path, declared()),
                          sample_each="process")  # fmt: skip
    with pytest.raises(ConfigError, match="DeepSpeed gathers every block"):
        train_one(config)


def test_a_latency_table_is_of_one_order_of_blocks(tmp_path):
    """What it holds of sub-adapters names the blocks that they leave out."""
    base = tiny.save_tiny(tmp_path / "base", num_hidden_layers=5)
    runs = [
        train_one(train_config(base, tmp_path / order / "run", order=order, stages=[StageConfig()],
                           space=space_file(tmp_path, declared())))
        for order in ("none", "norm", "activation")
    ]  # fmt: skip
    orders = [tuple(read_tensors(run.super_adapter / ORDER)[DEPTH].tolist()) for run in runs]
    targets = [Target.of(run, TimingConfig()) for run in runs]
    assert len(set(orders)) > 1
    for (one, mine), (other, theirs) in itertools.combinations(
        zip(orders, targets, strict=True), 2
    ):
        assert (one == other) is (mine == theirs)


def test_a_space_without_factors_is_refused():
    value = {"blocks": BLOCKS, "groups": {"depth": DEPTHS}}
    with pytest.raises(ConfigError, match="no layer carries factors"):
        SearchSpace.from_dict(value)
