"""What is counted on tensors without data is what real ones take, of few blocks as of all."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from elastic.config import AdapterConfig, ModelConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import collate
from elastic.data.encoding import Encoded
from elastic.models import loading
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from elastic.training import dry_run as dry
from elastic.training import estimate, fake_step
from tests.helpers import tiny
from tests.helpers.families import save_bloom
from tests.helpers.flops import Flops
from tests.helpers.hybrids import save_hybrid
from tests.helpers.tiny_runs import train_config


def real(net: Supernet, batch: dict, distill: float) -> tuple[int, int]:
    """The micro-batch of `rehearse` on real tensors, counted by other means: saved bytes beside
    what was there before, operations by torch's own counter."""
    given = {p.untyped_storage().data_ptr() for p in (*net.model.parameters(), *batch.values())}
    saved, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # or its address might be used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), Flops() as flops:
        logits, labels = answer_logits(net.model, batch)
        teacher = None
        if distill:
            with torch.no_grad(), net.active(net.space.maximal()):
                teacher, _ = answer_logits(net.model, batch)
        answer_loss(logits, labels, teacher, distill).backward()
    return sum(saved.values()), flops.get_total_flops()


KINDS = {
    "llama": (tiny.save_tiny, "llama", {"hidden_size": 256, "intermediate_size": 512,
                                        "num_hidden_layers": 6}),
    "llama-grouped": (tiny.save_tiny, "llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "bloom": (save_bloom, "bloom", {}),
    "t5": (tiny.save_t5, "t5-qv", {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype", "method", "dropout", "distill"),
    [
        ("llama", "float32", "lora", 0.0, 0.0),
        ("llama-grouped", "bfloat16", "sorsa", 0.1, 0.0),
        ("bloom", "bfloat16", "lora", 0.0, 0.0),
        ("t5", "float32", "lora", 0.0, 0.5),
    ],
)
def test_fake_tensors_count_what_real_ones_do(tmp_path, kind, dtype, method, dropout, distill):
    save, space, overrides = KINDS[kind]
    settings = dict(
        space=space,
        adapter=AdapterConfig(method=method, rank=8, dropout=dropout),
        distill=distill,
        model=ModelConfig(path=str(tmp_path / "base"), dtype=dtype, device="cpu"),
    )
    config = train_config(save(tmp_path / "base", **overrides), tmp_path / "run", **settings)
    steps, rehearse = [], fake_step.rehearse

    def spied(net, sub, batch, distill=0.0):
        steps.append((sub, distill, rehearse(net, sub, batch, distill)))
        return steps[-1][-1]

    batch = estimate.Batch(3, 24, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry, "rehearse", spied)
        patch.setattr(dry, "_data", lambda *_: (batch, [32]))
        found = dry.estimate(config)
    assert len(steps) == (3 if distill else 2)

    net = Supernet(loading.load(config.model).model, SearchSpace.load(space), config.adapter)
    net.model.train()
    there = sum(tensor.nbytes for tensor in (*net.model.parameters(), *net.model.buffers()))
    assert there == found.memory.base + found.memory.factors
    ids = tiny.tokens(3, 24).tolist()
    # One row is shorter, as in nearly every batch: else attention would leave out its mask.
    rows = [Encoded(tuple(row[:size]), 8) for row, size in zip(ids, (24, 24, 17), strict=True)]
    if kind == "t5":
        rows = [Encoded(tuple(row[:8]), 8, tuple(row)) for row in ids]
    inputs = collate(rows, tiny.PAD)
    for sub, taught, fake in steps:
        with net.active(sub):
            saved, flops = real(net, inputs, taught)
        # Places of answers as numbers, 8 bytes each, instead of a mask of 1: values decide which.
        assert (fake.saved, fake.flops) == (saved + 7 * 3 * 8 * bool(taught), flops)
    memory, compute = found.memory, found.compute
    assert memory.activations == steps[-1 if distill else 0][-1].saved
    assert (compute.maximal, compute.minimal) == tuple(fake.flops for *_, fake in steps[:2])
    assert memory.temporaries > 0


DEEP = {
    "llama": KINDS["llama"],
    "t5": (tiny.save_t5, "t5-qv", {"num_layers": 8, "num_decoder_layers": 7}),
    "lfm2": (partial(save_hybrid, name="lfm2"), "auto", {
             "num_hidden_layers": 12, "layer_types": ["conv", "full_attention"] * 6}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "checkpointing", "distill"),
    [
        ("llama", True, 0.5),
        ("lfm2", False, 0.0),
        pytest.param("t5", False, 0.0, marks=pytest.mark.slow),
    ],
)
def test_few_blocks_tell_what_all_of_them_take(tmp_path, kind, checkpointing, distill):
    save, space, overrides = DEEP[kind]
    config = train_config(
        save(tmp_path / "base", **overrides), tmp_path / "run", space=space, distill=distill,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trained, train, rehearse = [], fake_step._train, fake_step.rehearse

    def spied(net, *arguments, **settings):
        trained.append(len(settings.get("left_out", ())))
        return train(net, *arguments, **settings)

    def twice(*arguments):
        compared.append(arguments)
        few = rehearse(*arguments)
        if len(compared) == 1 and distill:  # the third is the maximal one too, with a teacher
            return few
        assert min(trained) > 0  # blocks were left out in every measurement
        trained.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fake_step, "alike", lambda model: [])
            assert rehearse(*arguments) == few
        assert trained == [0]
        trained.clear()
        return few

    compared = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_step, "_train", spied)
        patch.setattr(dry, "rehearse", twice)
        assert dry.estimate(config).compute
    assert len(compared) == (3 if distill else 2)


def test_blocks_that_differ_are_not_taken_for_each_other():
    def kinds(change) -> list[list[str]]:
        net = tiny.supernet(num_hidden_layers=8)
        with net.active(net.space.maximal()):
            change(net)
            return fake_step.alike(net.model)

    names = [f"model.layers.{number}" for number in range(8)]
    layer = names[3]
    assert kinds(lambda net: None) == [names]
    one_out = [[name for name in names if name != layer]]

    def narrow(net):
        group = f"{layer}.mlp_width"
        choices = {**net.current.as_dict(), group: net.space.minimal()[group]}
        net.activate(SubAdapter(tuple(choices.items())))

    def other(net):
        net.model.get_submodule(f"{layer}.self_attn").is_causal = False

    def wider(net):
        net.model.get_submodule(f"{layer}.input_layernorm").weight = torch.nn.Parameter(
            torch.ones(48)
        )

    for change in (narrow, other, wider):
        assert kinds(change) == one_out
    assert kinds(lambda net: (narrow(net), setattr(net.model.model, "layers",
                              net.model.model.layers[:5]))) == []  # fmt: skip
